workload_socket "a" {}
authority {}
authority "vault" {}
attestor {}
attestor "k8s" {}
attestor "unix" {}
attestor "docker" "rootless" {}
entry {}
