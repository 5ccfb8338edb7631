trust_domain = "example.org"
log_level = "info
data_dir = "/var/lib/deputy"
