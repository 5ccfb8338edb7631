sds {
  default_svid_name        = "one"
  default_bundle_name      = "one"
  default_all_bundles_name = ""
}
