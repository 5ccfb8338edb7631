# Tokens that clouds and other relying parties of OpenID Connect accept.

trust_domain = "example.org"

authority "local" {
  # The iss claim of every JWT-SVID. Relying parties fetch
  # https://issuer.example.org/.well-known/openid-configuration and the keys
  # that it names, so this must lead to the address below.
  jwt_issuer = "https://issuer.example.org"

  # Some take RS256 only; others want P-256 or RSA. This is for all of them.
  key_type = "rsa-2048"
}

oidc_discovery {
  address = "0.0.0.0:8444"

  # For the host in jwt_issuer, from a CA that the relying parties trust. Both
  # files are looked at again when somebody connects.
  cert_file = "/etc/deputy/tls/issuer.crt"
  key_file  = "/etc/deputy/tls/issuer.key"
}

entry "/agent/uploader" {
  selectors = ["cgroup:unit:uploader.service", "process:leader:true"]

  # Only tokens for that cloud.
  audiences = ["sts.amazonaws.com"]
}
