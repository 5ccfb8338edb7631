workload_socket {}
workload_socket {}
authority "local" {}
authority "local" {}
attestor "docker" {}
attestor "docker" {}
entry "/a" {
  selectors = ["unix:uid:1", "unix:gid:1"]
}
entry "spiffe://deputy.internal/a" {
  selectors = ["unix:gid:1", "unix:uid:1", "unix:uid:1"]
}
