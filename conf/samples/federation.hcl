# Two trust domains that follow each other's bundles (docs/mesh.md, Federation).

trust_domain = "one.example"

federation {
  bundle_endpoint {
    address = "0.0.0.0:8443"

    # How often others are to look; a fifteenth of ca_ttl, at most 5m, unless set.
    refresh_hint = "2m"

    # A certificate that Deputy issues to itself: spiffe://one.example/spire/agent/deputy/local.
    profile "https_spiffe" {}
  }

  federates_with "two.example" {
    bundle_endpoint_url = "https://host-two.example.net:8443/"
    profile "https_spiffe" {
      endpoint_spiffe_id = "spiffe://two.example/spire/agent/deputy/local"

      # Whom to believe at first. The file must be there, and only root may write it.
      # bootstrap_bundle = "/etc/deputy/two.example.json"
    }
  }

  # One that serves by the Web PKI, and nothing else to know of it.
  federates_with "three.example" {
    bundle_endpoint_url = "https://bundles.three.example/"
    profile "https_web" {}
  }
}

entry "/agent/front" {
  selectors      = ["unix:user:front", "process:host:true"]
  federates_with = ["two.example", "three.example"]
}
