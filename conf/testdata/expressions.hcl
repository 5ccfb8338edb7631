trust_domain = "${domain}"
data_dir     = file("/etc/x")
log_level    = true ? "info" : "warn"
log_format   = <<END
text
END
entry "/agent/${name}" {
  x509_ttl = 60 * 60
  jwt_ttl  = -5
}
