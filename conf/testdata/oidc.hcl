oidc_discovery {
  address   = "8444"
  cert_file = "tls.crt"
  key_file  = "/run/deputy/public/tls.key"
  issuer    = "https://issuer.example.org"
}
authority "local" { jwt_issuer = "http://issuer.example.org//a/../b" }
