workload_socket {
  path = "/run/deputy/private/public/workload.sock"
}
