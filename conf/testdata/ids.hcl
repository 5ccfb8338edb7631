trust_domain = "example.org"
entry "agent" {
  selectors = ["unix:uid:1"]
}
entry "/agent/" {
  selectors = ["unix:uid:1"]
}
entry "/agent/é" {
  selectors = ["unix:uid:1"]
}
entry "" {
  selectors = ["unix:uid:1"]
}
entry "spiffe://example.org" {
  selectors = ["unix:uid:1"]
}
entry "spiffe://example.com/agent" {
  selectors = ["unix:uid:1"]
}
entry "spiffe://example.org.evil/agent" {
  selectors = ["unix:uid:1"]
}
entry "{{unix.user}}" {
  selectors = ["unix:uid:1"]
}
