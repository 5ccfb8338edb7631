trust_domian = "example.org"
claim {}
data_dir {}
workload_socket = "/run/x.sock"
entry "/a" {
  selectors = ["unix:uid:1"]
  x509_tll  = "1h"
  template {}
}
attestor "systemd" {
  socket = "/run/x"
}
