# a comment
claim_name = "delegation"

unmapped = "omit"

rule "/agent/{team}/researcher" {
  subject = "head-of-{team}@example.org" # trailing
  issuer  = "https://idp.example.org"
  scopes  = ["crm:read", "web:search"]

  owner = "x\\ \" ü"

  chain = [
    "/agent/{team}/planner",
    "/b",
  ]

  max_depth = 3

  constraints {
    rate = "120/60s"
  }
}

// slash
rule "/z" {
  purpose = "p"
}

rule "/zz" {}