trust_domain = "example.org"
entry "/a" {
  selectors = ["unix:uid:1"]
