# Rules of deputy-claims. Check them before they are in force:
#   deputy-claims check /etc/spire/claims.hcl
#   deputy-claims show /etc/spire/claims.hcl spiffe://example.org/agent/crm/researcher

rule "/agent/{team}/researcher" {
  subject    = "head-of-{team}@example.org"
  issuer     = "https://idp.example.org"
  owner      = "team-{team}"
  agent_type = "ai_agent"
  purpose    = "literature research"
  scopes     = ["crm:read", "web:search"]
  chain      = ["/agent/{team}/planner"]
  may_act    = ["/agent/{team}/extractor"]
  max_depth  = 3

  constraints {
    rate = "120/60s"
  }
}
