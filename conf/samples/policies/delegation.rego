# What an API asks OPA when an agent calls it with a JWT-SVID. The API verifies
# the token first, and hands in its claims:
#
#   input.token           the claims of the verified token
#   input.request.scope   what the call needs, such as "crm:read"
#   data.issuers          who may vouch for the subjects of agents
#   data.max_depth        how many agents a call may pass through
#
# The claim says what the control plane held true at the time of issue. It can
# only take away here: the API's own rights for the agent stay to be checked.
#
# Each deny is "not" and a rule. A comparison with something that is not there
# is neither true nor false, so "deny if a > b" would let a call through whose
# token lacks a.
package deputy.delegation

import rego.v1

default decision := {"allow": false, "reasons": ["no decision"]}

decision := {"allow": count(deny) == 0, "reasons": sort([r | some r in deny])}

delegation := input.token.delegation

deny contains "no delegation that this policy can read" if not readable

deny contains "the delegation is another agent's" if not own

deny contains "the subject's issuer is not trusted" if not vouched

deny contains "the scope is not delegated" if not scoped

deny contains "too many agents" if not shallow

deny contains "the delegation has ended" if not current

readable if delegation.v == 1

own if delegation.act.sub == input.token.sub

vouched if {
	delegation.sub != ""
	delegation.iss in data.issuers
}

scoped if input.request.scope in delegation.scopes

# The chain is counted, and not only believed.
shallow if {
	actors := [1 | some actor; walk(delegation.act, [_, actor]); is_object(actor)]
	count(actors) == delegation.depth
	delegation.depth <= data.max_depth
}

current if {
	delegation.v
	not has_end
}

current if time.parse_rfc3339_ns(delegation.not_after) > time.now_ns()

has_end if _ = delegation.not_after
