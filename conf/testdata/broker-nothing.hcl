broker {
  kubelet {
    url = "http://127.0.0.1:10255"
  }
}
