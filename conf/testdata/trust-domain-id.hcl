trust_domain = "spiffe://example.org"
entry "/a" {
  selectors      = ["unix:uid:1"]
  federates_with = ["spiffe://other.org", "not a domain"]
}
