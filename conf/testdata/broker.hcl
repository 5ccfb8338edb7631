trust_domain = "example.org"

broker {
  address = "0.0.0.0:8089"
  client "spiffe://example.org/a" {
    references = ["pid", "docker"]
    over_tcp   = ["pid", "kubernetes"]
  }
  client "spiffe://example.org/b" { references = [] }
  client "spiffe://example.org/b" { references = ["pid"] }
  client "example.org/c" { references = ["pid"] }
  client "spiffe://example.org/d" { references = ["kubernetes"] }
  client "spiffe://example.org/e" {}
  client { references = ["pid"] }
}
