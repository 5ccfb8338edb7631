# A host with programs that act for others: a node proxy over SPIRE's Delegated
# Identity API, and the runtime of the agents over the SPIFFE Broker API.

trust_domain = "example.org"

# Who may use it can become every workload of this host that entries describe:
# it describes them itself. Each caller is attested, on each call, and must have
# one of these IDs by an entry. Mount this socket's directory into the proxy and
# into nothing else.
delegated_identity {
  socket               = "/run/deputy/delegated/delegated.sock"
  authorized_delegates = ["spiffe://example.org/node-proxy"]
}

# Brokers come with an X.509-SVID, over mutual TLS, and name a workload; what it
# is, the daemon finds out itself.
broker {
  socket = "/run/deputy/broker/broker.sock"

  # Where the runtime cannot have the socket. Every process of the host reaches
  # it; TLS keeps out who has no SVID.
  address = "127.0.0.1:8089"

  # By "pid" the broker names a process of this host, by "kubernetes" a pod of
  # this node. Over TCP only what over_tcp lists.
  client "spiffe://example.org/runtime" {
    references = ["pid", "kubernetes"]
    over_tcp   = ["kubernetes"]
  }

  # The kubelet of this node knows its pods. The token needs get on nodes/pods
  # (before Kubernetes 1.33: nodes/proxy), and is read again at each request. This
  # is for a pod, where the cluster's CA signs the kubelets' certificates.
  kubelet {
    url        = "https://127.0.0.1:10250"
    token_file = "/var/run/secrets/kubernetes.io/serviceaccount/token"
    ca_file    = "/var/run/secrets/kubernetes.io/serviceaccount/ca.crt"
  }
}

entry "/node-proxy" {
  selectors = ["cgroup:unit:node-proxy.service", "process:leader:true"]
}

entry "/runtime" {
  selectors = ["cgroup:unit:runtime.service", "process:leader:true"]
}

# What the runtime gets for a pod that it names.
entry "/ns/{{k8s.ns}}/sa/{{k8s.sa}}" {
  selectors = ["k8s:node-name:node-1"]
}
