# An agent whose tokens say whom it acts for. The rules are those of the
# deputy-claims plugin; docs/spire-plugins.md has all of their keys.

trust_domain = "example.org"
data_dir     = "/var/lib/deputy"

entry "/agent/crm/researcher" {
  selectors = ["cgroup:unit:researcher.service", "process:leader:true"]
}

claims {
  # The object's name in the token. One that is not this needs the policies
  # that read it to say so.
  claim_name = "delegation"

  # "deny" gives no JWT-SVID to an ID without a rule.
  unmapped = "omit"

  # What becomes of a token whose claims cannot be made: "omit" signs it
  # without them, and who bounds an agent by them then sees no bounds.
  on_error = "deny"

  # {team} is one segment of the SPIFFE ID, and its value in what follows.
  rule "/agent/{team}/researcher" {
    # Whom the agent acts for, and who vouches for that subject.
    subject = "head-of-{team}@example.org"
    issuer  = "https://idp.example.org"

    # Who answers for the agent, what it is, and what it is for.
    owner      = "team-{team}"
    agent_type = "ai_agent"
    purpose    = "literature research"

    # The most that it is meant to do.
    scopes = ["crm:read", "web:search"]

    # Who delegated to it, the nearest first; and to whom it may in turn.
    chain     = ["/agent/{team}/planner"]
    may_act   = ["/agent/{team}/extractor"]
    max_depth = 3

    # After this there is no claim.
    expires = "2030-01-01T00:00:00Z"

    # 120 uses in each minute.
    constraints {
      rate = "120/60s"
    }
  }

  # Everybody else of a team, at any depth.
  rule "/agent/{team}/*" {
    owner = "team-{team}"
  }
}
