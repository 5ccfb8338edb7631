trust_domain = "example.org"

delegated_identity {
  socket               = "/run/deputy/public/delegated.sock"
  authorized_delegates = ["spiffe://other.org/cilium", "cilium", "spiffe://example.org", "spiffe://example.org/spire/agent/x"]
  delegates            = []
}
delegated_identity {
  authorized_delegates = ["spiffe://example.org/cilium"]
}
