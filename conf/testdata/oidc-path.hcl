authority "local" { jwt_issuer = "https://issuer.example.org/a%2Fb" }
oidc_discovery {
  address   = "issuer.example.org:https"
  cert_file = "/etc/deputy/tls.crt"
  key_file  = "/etc/deputy/tls.key"
}
