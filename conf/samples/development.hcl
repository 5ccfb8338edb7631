# For trying things out as an ordinary user. Every process of that user can read
# the daemon's memory and files, so its identities prove nothing to others.

trust_domain = "dev.example.org"

log_level = "debug"

authority "local" {
  # Nothing is left behind; each start makes a new trust bundle.
  keys = "memory"

  # Short lives show rotation within a minute.
  ca_ttl = "10m"
}

# Each user, whoever it is, has an identity of its own: the value of the
# selector unix:user goes into the path. Values are escaped, so that no user's
# name can be made to look like another's.
entry "/user/{{unix.user}}" {
  selectors = ["process:host:true"]
  x509_ttl  = "30s"
  jwt_ttl   = "30s"

  # A debugger is part of development. Elsewhere a traced process gets nothing.
  allow_traced = true
}
