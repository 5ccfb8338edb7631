authority "local" {
  ca_ttl            = "999999h"
  key_type          = "rsa-4096"
  workload_key_type = "ed25519"
  keys              = "tpm"
  upstream_cert     = "ca.pem"
  jwt_issuer        = "example.org"
}
