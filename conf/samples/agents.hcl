# Many agents of one kind: each run is a principal of its own, and its tokens
# are good for two services only.

trust_domain = "example.org"

attestor "docker" {
  # Variables are not evidence of anything unless you set them for the
  # container yourself; only those named here become selectors.
  env = ["AGENT_TEAM"]
}

entry "/agent/worker/{{container.name}}" {
  selectors = ["docker:label:com.example.role:worker", "docker:env:AGENT_TEAM=search"]

  # Appends an ID of the process: two runs never have the same SPIFFE ID.
  instance = true

  # A JWT-SVID for anything else is refused.
  audiences = ["https://search.example.org", "https://mail.example.org"]

  # Never from the cache, so that each token has a jti of its own, at the price
  # of a signature for each.
  jwt_fresh = true
}
