package endpoint

import (
	"errors"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/spiffe/go-spiffe/v2/bundle/jwtbundle"
	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/grpc/codes"

	"github.com/deputy-id/deputy/attestor"
	"github.com/deputy-id/deputy/svid"
	"github.com/deputy-id/deputy/svid/local"
	"github.com/deputy-id/deputy/svid/registry"
)

func (w *world) client() *workloadapi.Client {
	w.t.Helper()
	c, err := workloadapi.New(call(w.t), workloadapi.WithAddr("unix://"+w.socket))
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() { c.Close() })
	return c
}

func TestGoSPIFFEReadsEverything(t *testing.T) {
	w := start(t)
	w.entry("/a", nil, mine)
	w.entry("/b", nil, mine)
	c := w.client()
	x, err := c.FetchX509Context(call(t))
	if err != nil {
		t.Fatal(err)
	}
	if len(x.SVIDs) != 2 || x.DefaultSVID().ID.Path() != "/a" {
		t.Fatalf("got %d SVIDs, the first %s, want 2 and /a", len(x.SVIDs), x.DefaultSVID().ID)
	}
	tokens, err := c.FetchJWTSVIDs(call(t), jwtsvid.Params{Audience: "db"})
	if err != nil || len(tokens) != 2 {
		t.Fatalf("got %d tokens, %v, want 2", len(tokens), err)
	}
	bundles, err := c.FetchJWTBundles(call(t))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := jwtsvid.ParseAndValidate(tokens[0].Marshal(), bundles, []string{"db"}); err != nil {
		t.Errorf("the token does not validate: %v", err)
	}
	svid, err := c.ValidateJWTSVID(call(t), tokens[1].Marshal(), "db")
	if err != nil || svid.ID.Path() != "/b" {
		t.Errorf("got %v, %v, want /b", svid, err)
	}
	if _, err := c.FetchX509Bundles(call(t)); err != nil {
		t.Error(err)
	}
}

func TestTokensOnlyUnderEntriesThatAllowTheAudience(t *testing.T) {
	w := start(t)
	w.entry("/any", nil, mine)
	w.entry("/db", func(e *registry.Entry) { e.Audiences = []string{"db"} }, mine)
	w.entry("/web", func(e *registry.Entry) { e.Audiences = []string{"web"} }, mine)
	api := w.workloadAPI()
	for audience, want := range map[string][]string{"db": {"/any", "/db"}, "web": {"/any", "/web"}, "mail": {"/any"}} {
		r, err := api.FetchJWTSVID(call(t), &workload.JWTSVIDRequest{Audience: []string{audience}})
		if err != nil {
			t.Fatal(err)
		}
		var got []string
		for _, s := range r.Svids {
			got = append(got, strings.TrimPrefix(s.SpiffeId, domain.IDString()))
		}
		if !slices.Equal(got, want) {
			t.Errorf("got %q for %s, want %q", got, audience, want)
		}
	}
}

func TestFirstEntryWithAHintCounts(t *testing.T) {
	w := start(t)
	w.entry("/first", func(e *registry.Entry) { e.Hint = "h" }, mine)
	w.entry("/second", func(e *registry.Entry) { e.Hint = "h" }, mine)
	w.entry("/none", nil, mine)
	api := w.workloadAPI()
	recv(t, x509Stream(t, api), "/first", "/none")
	r, err := api.FetchJWTSVID(call(t), &workload.JWTSVIDRequest{Audience: []string{"db"}})
	if err != nil || len(r.Svids) != 2 || r.Svids[0].Hint != "h" {
		t.Fatalf("got %v, %v, want the first and the one without a hint", r, err)
	}
	_, err = api.FetchJWTSVID(call(t), &workload.JWTSVIDRequest{Audience: []string{"db"}, SpiffeId: domain.IDString() + "/second"})
	wantCode(t, err, codes.PermissionDenied)
}

func TestClaimsComeAsAStruct(t *testing.T) {
	w := start(t)
	w.entry("/a", nil, mine)
	api := w.workloadAPI()
	r, err := api.FetchJWTSVID(call(t), &workload.JWTSVIDRequest{Audience: []string{"db"}})
	if err != nil {
		t.Fatal(err)
	}
	v, err := api.ValidateJWTSVID(call(t), &workload.ValidateJWTSVIDRequest{Audience: "db", Svid: r.Svids[0].Svid})
	if err != nil {
		t.Fatal(err)
	}
	claims := v.Claims.AsMap()
	if diff := cmp.Diff([]any{"db"}, claims["aud"]); diff != "" {
		t.Errorf("aud differs (-want +got):\n%s", diff)
	}
	if _, ok := claims["exp"].(float64); !ok || claims["sub"] != v.SpiffeId || claims["jti"] == "" {
		t.Errorf("got claims %v, want sub, exp as a number and jti", claims)
	}
}

// federate lets w know the bundle of another trust domain, and returns its
// authority.
func (w *world) federate(td spiffeid.TrustDomain) *local.Authority {
	w.t.Helper()
	a, err := local.Open(call(w.t), local.Options{TrustDomain: td, Memory: true})
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() { a.Close() })
	b, _ := a.Bundles()
	if err := w.authority.SetFederated(b.Own); err != nil {
		w.t.Fatal(err)
	}
	return a
}

// bundleOf is the bundle of a trust domain as an authority of its own has it.
func bundleOf(t testing.TB, td spiffeid.TrustDomain) *svid.Bundle {
	t.Helper()
	a, err := local.Open(t.Context(), local.Options{TrustDomain: td, Memory: true, WIT: true})
	if err != nil {
		t.Fatal(err)
	}
	defer a.Close()
	all, _ := a.Bundles()
	return all.Own
}

// Whether another trust domain is believed hangs on what the process is; a
// token of our own does not.
func TestValidationAsksWhoCallsForOtherTrustDomainsAlone(t *testing.T) {
	w := start(t)
	friend := spiffeid.RequireTrustDomainFromString("friend.example")
	friends := w.federate(friend)
	w.entry("/container", func(e *registry.Entry) { e.FederatesWith = []spiffeid.TrustDomain{friend} }, image)
	w.evidence.set(func(ev *attestor.Evidence) {
		ev.Selectors = []attestor.Selector{mine}
		ev.Unknown = []attestor.Unknown{{Prefixes: []string{"docker:"}, Err: errors.New("engine does not answer")}}
	})
	api := w.workloadAPI()
	validate := func(a *local.Authority, td spiffeid.TrustDomain, want codes.Code) {
		t.Helper()
		token, err := a.MintJWT(spiffeid.RequireFromPath(td, "/w"), []string{"db"}, 0)
		if err != nil {
			t.Fatal(err)
		}
		_, err = api.ValidateJWTSVID(call(t), &workload.ValidateJWTSVIDRequest{Audience: "db", Svid: token.Compact})
		wantCode(t, err, want)
	}
	validate(friends, friend, codes.Unavailable) // the entry might be this process's
	w.evidence.mu.Lock()
	w.evidence.err = errors.New("the process does not hold still")
	w.evidence.mu.Unlock()
	validate(friends, friend, codes.Unavailable)
	validate(w.authority, domain, codes.OK)
}

func TestFederation(t *testing.T) {
	w := start(t)
	friend, stranger := spiffeid.RequireTrustDomainFromString("friend.example"), spiffeid.RequireTrustDomainFromString("stranger.example")
	friends := w.federate(friend)
	strangers := w.federate(stranger)
	w.entry("/a", func(e *registry.Entry) { e.FederatesWith = []spiffeid.TrustDomain{friend} }, mine)
	api := w.workloadAPI()
	st := x509Stream(t, api)
	r := recv(t, st, "/a")
	ofFriend, _ := friends.Bundles()
	if diff := cmp.Diff(map[string][]byte{"spiffe://friend.example": ofFriend.Own.DER()}, r.FederatedBundles); diff != "" {
		t.Errorf("federated bundles differ (-want +got):\n%s", diff)
	}
	jb, err := api.FetchJWTBundles(call(t), &workload.JWTBundlesRequest{})
	if err != nil {
		t.Fatal(err)
	}
	jwts, err := jb.Recv()
	if err != nil {
		t.Fatal(err)
	}
	if len(jwts.Bundles) != 2 || jwts.Bundles["spiffe://friend.example"] == nil || jwts.Bundles["spiffe://test.example"] == nil {
		t.Fatalf("got bundles of %d trust domains, want ours and the friend's", len(jwts.Bundles))
	}
	if _, err := jwtbundle.Parse(friend, jwts.Bundles["spiffe://friend.example"]); err != nil {
		t.Error(err)
	}

	for _, c := range []struct {
		name string
		a    *local.Authority
		td   spiffeid.TrustDomain
		want codes.Code
	}{{"friend", friends, friend, codes.OK}, {"stranger", strangers, stranger, codes.InvalidArgument}} {
		id := spiffeid.RequireFromPath(c.td, "/w")
		var token svid.Token
		if token, err = c.a.MintJWT(id, []string{"db"}, 0); err != nil {
			t.Fatal(err)
		}
		_, err := api.ValidateJWTSVID(call(t), &workload.ValidateJWTSVIDRequest{Audience: "db", Svid: token.Compact})
		wantCode(t, err, c.want)
	}

	if err := w.authority.DeleteFederated(friend); err != nil {
		t.Fatal(err)
	}
	if r := recv(t, st, "/a"); len(r.FederatedBundles) != 0 {
		t.Errorf("got %d federated bundles, want none after it was deleted", len(r.FederatedBundles))
	}
	if next, err := jb.Recv(); err != nil || len(next.Bundles) != 1 {
		t.Errorf("got %v, %v, want our bundle alone", next, err)
	}
}
