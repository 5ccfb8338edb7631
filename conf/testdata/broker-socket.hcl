broker {
  socket  = "broker.sock"
  address = "localhost"
  client "spiffe://other.org/runtime" { references = ["pid"] }
}
broker {
  socket = "/run/deputy/broker/broker.sock"
  client "spiffe://other.org/runtime" {
    references = ["pid"]
    over_tcp   = ["pid"]
  }
}
