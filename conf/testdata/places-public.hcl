workload_socket {
  path = "/var/lib/workload.sock"
}
