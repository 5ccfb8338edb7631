package peers

import (
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"path"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/open-policy-agent/opa/v1/rego"
	"github.com/open-policy-agent/opa/v1/storage/inmem"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
)

const policies = "../../conf/samples/policies/"

// minted are the claims of a token of the stock server by the sample's rules.
func minted(t *testing.T, audience string) map[string]any {
	t.Helper()
	s := newSPIRE(t, changes{agent: withoutAttest})
	s.startServer(t)
	token := s.cli(t, "jwt", "mint", "-spiffeID", "spiffe://example.org"+researcher, "-audience", audience)
	svid, err := jwtsvid.ParseInsecure(strings.TrimSpace(token), []string{audience})
	if err != nil {
		t.Fatal(err)
	}
	return svid.Claims
}

func TestOPAPolicyReadsTheClaims(t *testing.T) {
	text, err := os.ReadFile(policies + "delegation.rego")
	if err != nil {
		t.Fatal(err)
	}
	token := minted(t, "https://crm.example.org")
	data := map[string]any{"issuers": []any{"https://idp.example.org"}, "max_depth": 3}
	decide := func(t *testing.T, data, token map[string]any, scope string) (allow bool, reasons []any) {
		t.Helper()
		result, err := rego.New(
			rego.Query("data.deputy.delegation.decision"),
			rego.Module("delegation.rego", string(text)),
			rego.Store(inmem.NewFromObject(data)),
			rego.Input(map[string]any{"token": token, "request": map[string]any{"scope": scope}}),
			rego.StrictBuiltinErrors(true),
		).Eval(t.Context())
		if err != nil || len(result) != 1 {
			t.Fatalf("got %v, %v, want a decision", result, err)
		}
		decision := result[0].Expressions[0].Value.(map[string]any)
		return decision["allow"].(bool), decision["reasons"].([]any)
	}
	with := func(key string, value any) map[string]any {
		claim := maps.Clone(token["delegation"].(map[string]any))
		claim[key] = value
		changed := maps.Clone(token)
		changed["delegation"] = claim
		return changed
	}
	without := maps.Clone(token)
	delete(without, "delegation")
	for name, tc := range map[string]struct {
		data, token map[string]any
		scope       string
		want        []any
	}{
		"what is delegated":         {data, token, "crm:read", []any{}},
		"before the end":            {data, with("not_after", time.Now().Add(time.Hour).UTC().Format(time.RFC3339)), "crm:read", []any{}},
		"another scope":             {data, token, "crm:write", []any{"the scope is not delegated"}},
		"another agent":             {data, with("act", map[string]any{"sub": "spiffe://example.org/x", "act": map[string]any{"sub": "spiffe://example.org/y"}}), "crm:read", []any{"the delegation is another agent's"}},
		"a chain that is cut short": {data, with("act", map[string]any{"sub": token["sub"]}), "crm:read", []any{"too many agents"}},
		"an unknown issuer":         {data, with("iss", "https://evil.example"), "crm:read", []any{"the subject's issuer is not trusted"}},
		"an unknown version":        {data, with("v", 2), "crm:read", []any{"no delegation that this policy can read"}},
		"after the end":             {data, with("not_after", "2020-01-01T00:00:00Z"), "crm:read", []any{"the delegation has ended"}},
		"no limits to hold it against": {map[string]any{}, token, "crm:read",
			[]any{"the subject's issuer is not trusted", "too many agents"}},
		"no delegation": {data, without, "crm:read", []any{"no delegation that this policy can read", "the delegation has ended",
			"the delegation is another agent's", "the scope is not delegated", "the subject's issuer is not trusted", "too many agents"}},
	} {
		t.Run(name, func(t *testing.T) {
			allow, reasons := decide(t, tc.data, tc.token, tc.scope)
			if diff := cmp.Diff(tc.want, reasons); diff != "" || allow != (len(tc.want) == 0) {
				t.Errorf("got allow %t, reasons (-want +got):\n%s", allow, diff)
			}
		})
	}
}

// Vault and OpenBao read claims by JSON Pointers (RFC 6901), want strings for
// mapped claims and a list for groups, and refuse a login where a bound claim is
// missing. Their server is not started here.
func TestVaultRoleReadsTheClaims(t *testing.T) {
	text, err := os.ReadFile(policies + "vault-role.json")
	if err != nil {
		t.Fatal(err)
	}
	var role struct {
		Audiences []string            `json:"bound_audiences"`
		User      string              `json:"user_claim"`
		Bound     map[string][]string `json:"bound_claims"`
		Mappings  map[string]string   `json:"claim_mappings"`
		Groups    string              `json:"groups_claim"`
	}
	if err := json.Unmarshal(text, &role); err != nil {
		t.Fatal(err)
	}
	token := minted(t, role.Audiences[0])
	if got, ok := pointed(token, role.User).(string); !ok || got != "spiffe://example.org"+researcher {
		t.Errorf("user_claim: got %q", got)
	}
	for claim, patterns := range role.Bound {
		value, ok := pointed(token, claim).(string)
		if !ok || !matches(value, patterns) {
			t.Errorf("bound claim %s: got %q, want one of %q", claim, value, patterns)
		}
	}
	metadata := make(map[string]string)
	for claim, name := range role.Mappings {
		value, ok := pointed(token, claim).(string)
		if !ok {
			t.Errorf("mapped claim %s: got %v, want a string", claim, pointed(token, claim))
		}
		metadata[name] = value
	}
	want := map[string]string{"subject": "head-of-crm@example.org", "agent": "spiffe://example.org" + researcher, "owner": "team-crm"}
	if diff := cmp.Diff(want, metadata); diff != "" {
		t.Error(diff)
	}
	if diff := cmp.Diff(any([]any{"crm:read", "web:search"}), pointed(token, role.Groups)); diff != "" {
		t.Errorf("groups: %s", diff)
	}

	policy, err := os.ReadFile(policies + "vault-agent.hcl")
	if err != nil {
		t.Fatal(err)
	}
	for _, part := range strings.Split(string(policy), "metadata.")[1:] {
		name, _, _ := strings.Cut(part, "}}")
		if value := metadata[name]; value == "" || strings.ContainsAny(value, "/*+") {
			t.Errorf("the policy's path takes %s, which is %q", name, value)
		}
	}
}

// pointed is what a claim's name or JSON Pointer leads to.
func pointed(claims map[string]any, pointer string) any {
	if !strings.HasPrefix(pointer, "/") {
		return claims[pointer]
	}
	var at any = claims
	for _, key := range strings.Split(pointer[1:], "/") {
		object, ok := at.(map[string]any)
		if !ok {
			return fmt.Errorf("%s: %v has no %s", pointer, at, key)
		}
		at = object[strings.NewReplacer("~1", "/", "~0", "~").Replace(key)]
	}
	return at
}

// matches is Vault's glob, in which a star takes slashes too.
func matches(value string, patterns []string) bool {
	plain := strings.NewReplacer("/", "\x00")
	for _, p := range patterns {
		if ok, err := path.Match(plain.Replace(p), plain.Replace(value)); err == nil && ok {
			return true
		}
	}
	return false
}
