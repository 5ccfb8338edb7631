workload_socket { path = "/run/d/public/w.sock" }
federation {
  bundle_endpoint {
    address      = "0.0.0.0:8443"
    refresh_hint = "0s"
    profile "https_web" {
      cert_file = "/etc/deputy/tls.pem"
      key_file  = "/run/d/public/tls.key"
    }
  }
}
