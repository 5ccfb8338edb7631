trust_domain = "example.org"
trust_domain = "example.com"
