# A host whose CA hangs under one that you have already.

trust_domain = "example.org"

authority "local" {
  # The certificate of an intermediate CA for this trust domain, with its chain,
  # and its key.
  upstream_cert = "/etc/deputy/intermediate.pem"
  upstream_key  = "/etc/deputy/intermediate.key"

  # What others verify with: the root. It becomes the trust bundle.
  upstream_bundle = "/etc/deputy/root.pem"

  ca_ttl = "12h"

  # Makes JWT-SVIDs known to services that speak OpenID Connect.
  jwt_issuer = "https://issuer.example.org"
}

entry "/agent/billing" {
  selectors = ["unix:user:billing", "unix:path:/usr/bin/billing"]

  # The first is the certificate's common name too, for clients that know no
  # SPIFFE IDs.
  dns_names = ["billing.example.org"]

  # Which SVID is which, for a client that gets several.
  hint = "internal"

  # The bundles of these trust domains come with the SVID. Set them with
  # deputy bundle set.
  federates_with = ["partner.example.com"]
}
