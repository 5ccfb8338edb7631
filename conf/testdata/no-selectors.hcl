entry "/a" {}
entry "/b" {
  selectors = []
}
