package delegation

import (
	"encoding/json"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/types/known/structpb"
)

func full() *Claims {
	return &Claims{
		Version: Version, ChainID: "dlg_1", ID: "dlg_3", Depth: 3, MaxDepth: 4,
		Issuer: "https://idp.example", Subject: "248289761001",
		Act:    Chain("spiffe://prod.example/extractor", "spiffe://prod.example/researcher", "spiffe://prod.example/planner"),
		MayAct: []string{"spiffe://prod.example/helper"}, Scopes: []string{"crm:read", "web:search"},
		Constraints: &Constraints{Rate: &Rate{Limit: 120, Window: 60}},
		NotAfter:    time.Date(2026, 11, 21, 23, 16, 40, 0, time.UTC),
		Principal:   "248289761001|extractor", Owner: "team-rag", AgentType: "ai_agent", Purpose: "<research> & more",
	}
}

func TestJSON(t *testing.T) {
	for name, tc := range map[string]struct {
		claims *Claims
		want   string
	}{
		"everything": {full(), `{"v":1,"chain_id":"dlg_1","id":"dlg_3","depth":3,"max_depth":4,"iss":"https://idp.example","sub":"248289761001",` +
			`"act":{"sub":"spiffe://prod.example/extractor","act":{"sub":"spiffe://prod.example/researcher","act":{"sub":"spiffe://prod.example/planner"}}},` +
			`"may_act":["spiffe://prod.example/helper"],"scopes":["crm:read","web:search"],"constraints":{"rate":{"limit":120,"window":60}},` +
			`"not_after":"2026-11-21T23:16:40Z","principal":"248289761001|extractor","owner":"team-rag","agent_type":"ai_agent","purpose":"\u003cresearch\u003e \u0026 more"}`},
		"what is empty is not there": {&Claims{Version: Version, Depth: 1, Act: Chain("spiffe://a/b")}, `{"v":1,"depth":1,"act":{"sub":"spiffe://a/b"}}`},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := json.Marshal(tc.claims)
			if err != nil || string(got) != tc.want {
				t.Errorf("got %s, %v, want %s", got, err, tc.want)
			}
		})
	}
}

// What a verifier reads is the same whether it came straight from here or
// through SPIRE, which carries claims in a Struct.
func TestMapSurvivesAStruct(t *testing.T) {
	for name, c := range map[string]*Claims{
		"everything": full(),
		"little":     {Version: Version, Depth: 1, Act: Chain("spiffe://a/b")},
		"the largest number": {Version: Version, Depth: 1, Constraints: &Constraints{
			Rate: &Rate{Limit: MaxNumber, Window: MaxNumber},
		}},
	} {
		t.Run(name, func(t *testing.T) {
			s, err := structpb.NewStruct(c.Map())
			if err != nil {
				t.Fatal(err)
			}
			through, err := json.Marshal(s.AsMap())
			if err != nil {
				t.Fatal(err)
			}
			var got Claims
			if err := json.Unmarshal(through, &got); err != nil {
				t.Fatalf("decode %s: %v", through, err)
			}
			if diff := cmp.Diff(c, &got); diff != "" {
				t.Error(diff)
			}
		})
	}
}
