# A host whose services speak mTLS through Envoys. Each Envoy connects to the
# workload socket and is attested like every other process.

trust_domain = "example.org"

# The names under which an Envoy finds its own certificate and the roots, where
# its configuration does not give a SPIFFE ID. These are SPIRE's and the
# defaults, so the block may be left out.
sds {
  default_svid_name        = "default"
  default_bundle_name      = "ROOTCA"
  default_all_bundles_name = "ALL"

  # true gives Envoys a plain list of roots in the place of the SPIFFE
  # validator, which compares a peer's certificate with its own trust domain's
  # roots. There is no ALL then. One Envoy alone says so in its node's metadata,
  # under the same key.
  disable_spiffe_cert_validation = false
}

# The Envoy beside a service, by its unit.
entry "/proxy/shop" {
  selectors = ["cgroup:unit:shop-envoy.service", "process:leader:true"]

  # Comes with ALL, and as spiffe://partner.example.com.
  federates_with = ["partner.example.com"]
}
