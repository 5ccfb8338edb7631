# One host whose agents are services and containers: the usual case.

# Names everybody's identities: spiffe://example.org/... Choose it once. A data
# directory belongs to one trust domain and is refused under another.
trust_domain = "example.org"

# Holds the CA's keys and the entries that were made through the API. Only root
# may read it. Two daemons never share one.
data_dir = "/var/lib/deputy"

# "debug" adds a line for each request. Changes at a reload.
log_level = "info"

# "json" where a collector reads the log.
log_format = "text"

# Every process of the host may connect. Containers mount the directory, not
# the socket, so that a restart of the daemon gives them the new one; nothing
# that is private may be in it or below it.
workload_socket {
  path = "/run/deputy/public/workload.sock"
}

# Only root may connect. With group = "NAME" its members may, too; each of them
# can then become any identity.
admin_socket {
  path = "/run/deputy/private/admin.sock"
}

authority "local" {
  # The next key is made at half of this, and signs from five sixths on, so that
  # everybody has seen it by then. No SVID lives longer than a sixth of it.
  ca_ttl = "24h"

  # "ec-p384" or "rsa-2048" where a verifier needs them. RSA costs a CPU about
  # a hundred times as much per key.
  key_type          = "ec-p256"
  workload_key_type = "ec-p256"
}

# Kernel facts (unix, process, cgroup) are always on. These two ask others:
# systemd which unit a process is of, and Docker what is in a container.
attestor "systemd" {}

attestor "docker" {
  socket = "/run/docker.sock"
}

# An agent that is a service. Its executable may be an interpreter that anybody
# can run; its unit is not. process:leader leaves out what it starts itself.
entry "/agent/researcher" {
  selectors = ["cgroup:unit:researcher.service", "process:leader:true"]
  x509_ttl  = "1h"
  jwt_ttl   = "5m"
}

# An agent in a container, by the digest of what it really runs. A tag that is
# moved afterwards does not matter.
entry "/agent/writer" {
  selectors = ["image:digest:sha256:4bcff63911fcb4448bd4fdacec207030997caf25e9bea4045fa6c8c44de311d1", "process:leader:true"]
}

# An agent that root starts by hand: deputy exec --name reviewer -- COMMAND
entry "/agent/reviewer" {
  selectors = ["process:exec:reviewer"]
}
