authority "local" {
  ca_ttl = "29s"
}
