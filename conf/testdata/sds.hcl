sds "x" {}
sds {
  default_svid_name              = "spiffe://example.org/a"
  default_bundle_name            = "*"
  default_all_bundles_name       = "a b"
  disable_spiffe_cert_validation = "yes"
  names                          = []
}
sds {}
