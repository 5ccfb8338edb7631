trust_domain = "Example.org"
