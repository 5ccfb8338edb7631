data_dir = "/srv/d/data"
delegated_identity {
  socket               = "/srv/d/delegated.sock"
  authorized_delegates = ["spiffe://deputy.internal/cilium"]
}
broker {
  socket = "/run/deputy/private/broker/broker.sock"
  client "spiffe://deputy.internal/runtime" { references = ["pid", "kubernetes"] }
  kubelet {
    url        = "https://127.0.0.1:10250"
    token_file = "/srv/d/token"
    ca_file    = "/srv/d/ca.pem"
  }
}
