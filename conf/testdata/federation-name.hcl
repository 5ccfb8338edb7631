trust_domain = "example.org"
workload_socket { path = "/run/d/public/w.sock" }
admin_socket { path = "/run/d/private/a.sock" }
federation {
  federates_with "example.org" {
    bundle_endpoint_url = "http://example.org/"
    profile "https_web" { endpoint_spiffe_id = "spiffe://example.org/x" }
  }
  federates_with "spiffe://third.example" {
    profile "https_spiffe" {
      endpoint_spiffe_id = "third.example/x"
      bootstrap_bundle   = "third.json"
    }
    profile "https_web" {}
  }
  federates_with "spiffe://fourth.example" {
    bundle_endpoint_url = "https://fourth.example/"
    profile "https_spiffe" {
      endpoint_spiffe_id = "spiffe://fourth.example/x"
      bootstrap_bundle   = "/etc/deputy/fourth.json"
    }
  }
}
