authority "local" {
  upstream_key    = "/run/deputy/public/ca.key"
  upstream_bundle = "/etc/deputy/root.pem"
}
