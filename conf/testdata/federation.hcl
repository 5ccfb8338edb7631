trust_domain = "example.org"
workload_socket { path = "/run/d/public/w.sock" }
admin_socket { path = "/run/d/private/a.sock" }
federation {
  poll = "1m"
  bundle_endpoint {
    address      = "nowhere"
    refresh_hint = "3h"
    profile "https_web" { cert_file = "relative.pem" }
  }
  bundle_endpoint {}
  federates_with "example.org" {
    bundle_endpoint_url = "https://example.org"
    profile "https_web" {}
  }
  federates_with "a.example" {
    bundle_endpoint_url = "http://a.example"
    profile "https_web" { ca_file = "/run/d/public/ca.pem" }
  }
  federates_with "a.example" {
    bundle_endpoint_url = "https://a.example"
    profile "https_web" {}
  }
  federates_with "b.example" {
    bundle_endpoint_url = "https://user:secret@b.example/"
    profile "https_spiffe" {}
    profile "https_web" {}
  }
  federates_with "c.example" {
    bundle_endpoint_url = "https://c.example/#x"
    profile "https_spiffe" {
      endpoint_spiffe_id = "spiffe://other.example/x"
      bootstrap_bundle   = "/etc/deputy/c.json"
    }
  }
  federates_with "d.example" {
    bundle_endpoint_url = "d.example:8443"
    profile "https_spiffe" { endpoint_spiffe_id = "spiffe://d.example" }
  }
  federates_with "e.example" {
    profile "https_spiffe" { endpoint_spiffe_id = "d.example/x" }
  }
  federates_with "f.example" { bundle_endpoint_url = "https:///x" }
  federates_with "g.example" {
    bundle_endpoint_url = "https://g.example"
    profile "http" {}
  }
  federates_with "h.example" {
    bundle_endpoint_url = "https://h.example"
    profile {}
  }
  federates_with "Bad_Name!" {}
  federates_with {}
  federates_with "i.example" {
    bundle_endpoint_url = "https://i.example:84430/"
    profile "https_web" {}
  }
}
