package endpoint

import (
	"context"
	"crypto"
	"encoding/json"
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc/codes"

	"github.com/deputy-id/deputy/attestor"
	"github.com/deputy-id/deputy/svid"
	"github.com/deputy-id/deputy/svid/local"
	"github.com/deputy-id/deputy/svid/registry"
)

// withWIT switches WIT-SVIDs on.
func withWIT(c *Config, o *local.Options) { c.WIT, o.WIT = true, true }

func witStream(t testing.TB, api workload.SpiffeWorkloadAPIClient, id string) workload.SpiffeWorkloadAPI_FetchWITSVIDClient {
	t.Helper()
	st, err := api.FetchWITSVID(call(t), &workload.WITSVIDRequest{SpiffeId: id})
	if err != nil {
		t.Fatal(err)
	}
	return st
}

// recvWIT wants these paths next, each with a token that the bundle of now
// verifies and the key that it is bound to, and returns the key IDs' thumbprints.
func (w *world) recvWIT(st workload.SpiffeWorkloadAPI_FetchWITSVIDClient, want ...string) []string {
	w.t.Helper()
	r, err := st.Recv()
	if err != nil {
		w.t.Fatalf("got %v, want %q", err, want)
	}
	bundles, _ := w.authority.Bundles()
	var got, keys []string
	for _, s := range r.Svids {
		got = append(got, strings.TrimPrefix(s.SpiffeId, domain.IDString()))
		b, err := svid.ValidateWIT(s.WitSvid, bundles)
		if err != nil {
			w.t.Fatal(err)
		}
		var key jose.JSONWebKey
		if err := key.UnmarshalJSON([]byte(s.WitSvidKey)); err != nil || key.IsPublic() {
			w.t.Fatalf("got a key that is none: %v", err)
		}
		if b.ID.String() != s.SpiffeId || !b.Key.(interface{ Equal(crypto.PublicKey) bool }).Equal(key.Public().Key) || key.Algorithm != string(b.Algorithm) {
			w.t.Errorf("got a token for %s in the place of %s, or of another key", b.ID, s.SpiffeId)
		}
		print, err := key.Thumbprint(crypto.SHA256)
		if err != nil {
			w.t.Fatal(err)
		}
		keys = append(keys, string(print))
	}
	if !slices.Equal(got, want) {
		w.t.Fatalf("got %q, want %q", got, want)
	}
	return keys
}

func TestWITStreamIsTheFullStateAndFollowsEntries(t *testing.T) {
	w := start(t, withWIT)
	api := w.workloadAPI()
	w.evidence.set(func(ev *attestor.Evidence) { ev.Selectors = []attestor.Selector{mine, image} })
	w.entry("/a", nil, mine)
	all, one := witStream(t, api, ""), witStream(t, api, "spiffe://test.example/a")
	first := w.recvWIT(all, "/a")
	if again := w.recvWIT(one, "/a"); !slices.Equal(again, first) {
		t.Error("two streams of a process have two keys")
	}
	b := w.entry("/b", func(e *registry.Entry) { e.Hint = "second" }, mine)
	if keys := w.recvWIT(all, "/a", "/b"); keys[0] != first[0] || keys[1] == keys[0] {
		t.Error("the key changed, or both have one")
	}
	named := witStream(t, api, "spiffe://test.example/b")
	w.recvWIT(named, "/b")
	if _, err := w.Registry.Delete(context.Background(), b.ID); err != nil {
		t.Fatal(err)
	}
	if keys := w.recvWIT(all, "/a"); keys[0] != first[0] {
		t.Error("the key changed")
	}
	_, err := named.Recv()
	wantCode(t, err, codes.PermissionDenied)
	// To the one who asked for /a alone nothing happened.
	w.entry("/a", func(e *registry.Entry) { e.Hint = "again" }, mine, image)
	w.recvWIT(one, "/a", "/a")
}

func TestHintsOfWITs(t *testing.T) {
	w := start(t, withWIT)
	for _, path := range []string{"/first", "/later"} {
		w.entry(path, func(e *registry.Entry) { e.Hint = "h" }, mine)
	}
	r, err := witStream(t, w.workloadAPI(), "").Recv()
	if err != nil || len(r.Svids) != 1 || r.Svids[0].Hint != "h" || r.Svids[0].SpiffeId != "spiffe://test.example/first" {
		t.Errorf("got %v, %v, want the first alone", r, err)
	}
}

func TestWITErrors(t *testing.T) {
	w := start(t, withWIT)
	api := w.workloadAPI()
	w.entry("/a", nil, mine)
	w.entry("/others", nil, other)
	has := func(ev *attestor.Evidence) {
		ev.Selectors, ev.Unknown, ev.Traced = []attestor.Selector{mine}, nil, false
	}
	for _, c := range []struct {
		name, id string
		evidence func(*attestor.Evidence)
		want     codes.Code
	}{
		{"all", "", has, codes.OK},
		{"one that is held", "spiffe://test.example/a", has, codes.OK},
		{"one of another", "spiffe://test.example/others", has, codes.PermissionDenied},
		{"one of nobody", "spiffe://test.example/none", has, codes.PermissionDenied},
		{"one of another trust domain", "spiffe://other.example/a", has, codes.PermissionDenied},
		{"malformed", "a", has, codes.InvalidArgument},
		{"without identity", "", func(ev *attestor.Evidence) { has(ev); ev.Selectors = nil }, codes.PermissionDenied},
		{"traced", "", func(ev *attestor.Evidence) { has(ev); ev.Traced = true }, codes.PermissionDenied},
		{"one that may be held", "spiffe://test.example/others", func(ev *attestor.Evidence) {
			has(ev)
			ev.Unknown = []attestor.Unknown{{Prefixes: []string{"unix:uid:2"}, Err: errors.New("timeout")}}
		}, codes.Unavailable},
	} {
		t.Run(c.name, func(t *testing.T) {
			w.evidence.set(c.evidence)
			ctx, cancel := context.WithCancel(call(t))
			defer cancel()
			st, err := api.FetchWITSVID(ctx, &workload.WITSVIDRequest{SpiffeId: c.id})
			if err == nil {
				_, err = st.Recv()
			}
			wantCode(t, err, c.want)
		})
	}
}

func TestWITRotationBringsANewKeyByNewEvidence(t *testing.T) {
	t.Parallel()
	w := start(t, withWIT, func(_ *Config, o *local.Options) { o.X509TTL = 5 * time.Second })
	w.entry("/a", nil, mine)
	st := witStream(t, w.workloadAPI(), "")
	first := w.recvWIT(st, "/a")
	before := w.evidence.times()
	if second := w.recvWIT(st, "/a"); second[0] == first[0] {
		t.Error("got the same key after a rotation")
	}
	if got := w.evidence.times() - before; got != 1 {
		t.Errorf("evidence was gathered %d times for a rotation, want once", got)
	}
	w.evidence.set(func(ev *attestor.Evidence) { ev.Selectors = []attestor.Selector{other} })
	_, err := st.Recv()
	wantCode(t, err, codes.PermissionDenied)
}

// What cannot be found out is not held against the client, until it is.
func TestUnknownEvidenceLeavesWITsAsTheyAre(t *testing.T) {
	w := start(t, withWIT)
	w.entry("/a", nil, mine)
	b := w.entry("/b", nil, image)
	hidden := w.entry("/hidden", func(e *registry.Entry) { e.AllowTraced = false }, mine, image)
	w.entry("/open", func(e *registry.Entry) { e.AllowTraced = true }, mine)
	both := func(ev *attestor.Evidence) {
		ev.Selectors, ev.Unknown, ev.Traced = []attestor.Selector{mine, image}, nil, false
	}
	w.evidence.set(both)
	w.recvWIT(witStream(t, w.workloadAPI(), ""), "/a", "/b", "/hidden", "/open")
	l, none := w.onlyLink(), spiffeid.ID{}
	look := func(has *state, want ...string) *state {
		t.Helper()
		now, err := w.witState(call(t), l, has, none)
		if err != nil {
			t.Fatal(err)
		}
		var got []string
		for _, x := range now.wits {
			got = append(got, x.Entry.SPIFFEID.Path())
		}
		if !slices.Equal(got, want) {
			t.Fatalf("got %q, want %q", got, want)
		}
		return now
	}
	has := look(nil, "/a", "/b", "/hidden", "/open")
	lacking := func(change func(*attestor.Evidence)) {
		t.Helper()
		w.evidence.set(func(ev *attestor.Evidence) { both(ev); change(ev) })
		if _, err := w.witState(call(t), l, has, none); !errors.Is(err, errUnknown) {
			t.Errorf("got %v, want that it is not known", err)
		}
	}
	unknown := func(ev *attestor.Evidence) {
		ev.Selectors = []attestor.Selector{mine}
		ev.Unknown = []attestor.Unknown{{Prefixes: []string{"docker:"}, Err: errors.New("timeout")}}
	}
	lacking(unknown)
	lacking(func(ev *attestor.Evidence) { ev.Traced = true })
	// To one who comes now the rest is served.
	w.evidence.set(func(ev *attestor.Evidence) { both(ev); unknown(ev) })
	look(nil, "/a", "/open")
	// Entries that go meanwhile are gone, and what is known not to match too.
	for _, e := range []registry.Entry{b, hidden} {
		if _, err := w.Registry.Delete(context.Background(), e.ID); err != nil {
			t.Fatal(err)
		}
	}
	look(has, "/a", "/open")
	w.evidence.set(func(ev *attestor.Evidence) { both(ev); ev.Selectors = []attestor.Selector{image} })
	if _, err := w.witState(call(t), l, has, none); !errors.Is(err, errNoIdentity) {
		t.Errorf("got %v, want no identity", err)
	}
	// What ends is not kept for ever.
	if !has.lives(time.Now()) || has.lives(has.wits[0].Expires) {
		t.Errorf("lives until %v, want %v", has.expires(), has.wits[0].Expires)
	}
}

func TestBundlesHaveTheKeysOfTheirUseAlone(t *testing.T) {
	w := start(t, withWIT)
	foreign := spiffeid.RequireTrustDomainFromString("other.example")
	w.entry("/a", func(e *registry.Entry) { e.FederatesWith = []spiffeid.TrustDomain{foreign} }, mine)
	key, err := svid.ECP256.Generate()
	if err != nil {
		t.Fatal(err)
	}
	own, _ := w.authority.Bundles()
	theirs := map[string]crypto.PublicKey{"theirs": key.Public()}
	if err := w.authority.SetFederated(&svid.Bundle{TrustDomain: foreign, WITAuthorities: theirs}); err != nil {
		t.Fatal(err)
	}
	api := w.workloadAPI()
	ids := func(text string) (ids []string) {
		var set struct{ Keys []struct{ Kid, Use string } }
		if err := json.Unmarshal([]byte(text), &set); err != nil {
			t.Fatal(err)
		}
		for _, k := range set.Keys {
			ids = append(ids, k.Kid+" "+k.Use)
		}
		return ids
	}
	kid := func(keys map[string]crypto.PublicKey) string {
		for id := range keys {
			return id
		}
		return ""
	}
	st, err := api.FetchWITBundles(call(t), &workload.WITBundlesRequest{})
	if err != nil {
		t.Fatal(err)
	}
	r, err := st.Recv()
	if err != nil {
		t.Fatal(err)
	}
	if got := ids(r.Bundles["spiffe://test.example"]); !slices.Equal(got, []string{kid(own.Own.WITAuthorities) + " wit-svid"}) {
		t.Errorf("our WIT bundle has %q", got)
	}
	if got := ids(r.Bundles["spiffe://other.example"]); !slices.Equal(got, []string{"theirs wit-svid"}) || len(r.Bundles) != 2 {
		t.Errorf("their WIT bundle has %q", got)
	}
	jwts, err := api.FetchJWTBundles(call(t), &workload.JWTBundlesRequest{})
	if err != nil {
		t.Fatal(err)
	}
	j, err := jwts.Recv()
	if err != nil {
		t.Fatal(err)
	}
	if got := ids(string(j.Bundles["spiffe://test.example"])); !slices.Equal(got, []string{kid(own.Own.JWTAuthorities) + " jwt-svid"}) {
		t.Errorf("our JWT bundle has %q", got)
	}
	if got := ids(string(j.Bundles["spiffe://other.example"])); len(got) != 0 {
		t.Errorf("their JWT bundle has %q", got)
	}
	// A change is pushed, and nobody without identity is told of it.
	if err := w.authority.DeleteFederated(foreign); err != nil {
		t.Fatal(err)
	}
	if r, err = st.Recv(); err != nil || len(r.Bundles) != 1 {
		t.Errorf("got %v, %v, want ours alone", r, err)
	}
	w.evidence.set(func(ev *attestor.Evidence) { ev.Selectors = nil })
	st, err = api.FetchWITBundles(call(t), &workload.WITBundlesRequest{})
	if err == nil {
		_, err = st.Recv()
	}
	wantCode(t, err, codes.PermissionDenied)
}
