# The policy "agent" of vault-role.json: an agent reads its team's secrets.
# Put the accessor of the JWT auth method in the place of ACCESSOR:
#   vault auth list -format=json | jq -r '."jwt/".accessor'
#
# owner comes from the rules, as "team-{team}": it has no slash and no star. Do
# not put a claim into a path whose rule does not see to that.
path "kv/data/{{identity.entity.aliases.ACCESSOR.metadata.owner}}/*" {
  capabilities = ["read"]
}

path "kv/metadata/{{identity.entity.aliases.ACCESSOR.metadata.owner}}/*" {
  capabilities = ["list"]
}
