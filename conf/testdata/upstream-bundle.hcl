authority "local" {
  upstream_bundle = "/etc/deputy/root.pem"
}
