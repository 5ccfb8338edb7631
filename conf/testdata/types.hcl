trust_domain = 7
data_dir     = ["/var/lib/deputy"]
log_level    = info
log_format   = null
entry "/a" {
  selectors = "unix:uid:1"
  x509_ttl  = 3600
  instance  = "true"
  dns_names = [true, "", {}]
}
