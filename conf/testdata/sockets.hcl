workload_socket {
  path = "run/workload.sock"
}
admin_socket {
  path  = "/aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa.sock"
  group = ""
}
attestor "docker" {
  socket = "tcp://127.0.0.1:2375"
  env    = ["ROLE=a"]
}
