delegated_identity {
  socket               = "/srv/d/x.sock"
  authorized_delegates = ["spiffe://deputy.internal/cilium"]
}
broker {
  socket = "/srv/d/x.sock"
  client "spiffe://deputy.internal/runtime" { references = ["pid"] }
}
