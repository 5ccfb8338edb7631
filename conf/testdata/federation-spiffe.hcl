federation {
  bundle_endpoint {
    refresh_hint = "5"
    profile "https_spiffe" { cert_file = "/etc/deputy/tls.pem" }
  }
}
federation {}
