authority "local" { jwt_issuer = "https://id.example" }
oidc_discovery {
  address   = "300.1.1.1:8443"
  cert_file = "/etc/deputy/tls.pem"
  key_file  = "/etc/deputy/tls.key"
}
broker {
  address = "a host:8444"
  client "spiffe://deputy.internal/x" {
    references = ["pid"]
  }
}
federation {
  bundle_endpoint {
    address = "under_score.example..:8445"
    profile "https_spiffe" {}
  }
}
