authority "local" { jwt_issuer = "issuer.example.org" }
oidc_discovery "x" {}
oidc_discovery {
  address   = "0.0.0.0:0"
  cert_file = "/etc/deputy/tls.crt"
  key_file  = "/etc/deputy/tls.key"
}
