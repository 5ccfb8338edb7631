package peers

import (
	"maps"
	"os"
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
