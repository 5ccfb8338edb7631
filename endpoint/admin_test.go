package endpoint

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"net/url"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	loggerv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/logger/v1"
	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"
	healthv1 "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/protobuf/testing/protocmp"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/deputy-id/deputy/attestor"
	"github.com/deputy-id/deputy/attestor/peer"
	adminv1 "github.com/deputy-id/deputy/proto/deputy/admin/v1"
	"github.com/deputy-id/deputy/svid/local"
	"github.com/deputy-id/deputy/svid/registry"
)

func id(path string) *types.SPIFFEID {
	return &types.SPIFFEID{TrustDomain: domain.Name(), Path: path}
}

var (
	node   = id("/spire/agent/deputy/local")
	server = id("/spire/server")
)

func selectors(list ...string) []*types.Selector {
	var out []*types.Selector
	for _, s := range list {
		typ, value, _ := strings.Cut(s, ":")
		out = append(out, &types.Selector{Type: typ, Value: value})
	}
	return out
}

func spire(change func(*types.Entry)) *types.Entry {
	e := &types.Entry{SpiffeId: id("/a"), ParentId: node, Selectors: selectors("unix:uid:1")}
	change(e)
	return e
}

func TestBatchCreateEntrySaysOfEachWhatIsWrong(t *testing.T) {
	w := start(t)
	api := entryv1.NewEntryClient(w.dial(w.admin))
	for _, c := range []struct {
		name  string
		entry *types.Entry
		want  codes.Code
	}{
		{"of this node", spire(func(e *types.Entry) { e.Id = "first" }), codes.OK},
		{"similar", spire(func(*types.Entry) {}), codes.AlreadyExists},
		{"ID taken", spire(func(e *types.Entry) { e.Id, e.SpiffeId = "first", id("/taken") }), codes.AlreadyExists},
		{"of the server", spire(func(e *types.Entry) { e.ParentId = server }), codes.OK},
		{"missing", nil, codes.InvalidArgument},
		{"no SPIFFE ID", spire(func(e *types.Entry) { e.SpiffeId = nil }), codes.InvalidArgument},
		{"no path", spire(func(e *types.Entry) { e.SpiffeId = id("") }), codes.InvalidArgument},
		{"reserved", spire(func(e *types.Entry) { e.SpiffeId = id("/spire/x") }), codes.InvalidArgument},
		{"of another trust domain", spire(func(e *types.Entry) { e.SpiffeId.TrustDomain = "other.example" }), codes.InvalidArgument},
		{"no parent", spire(func(e *types.Entry) { e.ParentId = nil }), codes.InvalidArgument},
		{"of another node", spire(func(e *types.Entry) { e.ParentId = id("/spire/agent/join_token/x") }), codes.InvalidArgument},
		{"no selectors", spire(func(e *types.Entry) { e.Selectors = nil }), codes.InvalidArgument},
		{"selector without value", spire(func(e *types.Entry) { e.Selectors = selectors("unix") }), codes.InvalidArgument},
		{"type with a colon", spire(func(e *types.Entry) { e.Selectors[0].Type = "a:b" }), codes.InvalidArgument},
		{"unknown type", spire(func(e *types.Entry) { e.SpiffeId, e.Selectors = id("/future"), selectors("quantum:spin:up") }), codes.OK},
		{"unknown type in the path", spire(func(e *types.Entry) { e.SpiffeId = id("/{{quantum.spin}}") }), codes.OK},
		{"key that our type lacks", spire(func(e *types.Entry) { e.Selectors = selectors("unix:uidd:0") }), codes.InvalidArgument},
		{"value that our key never has", spire(func(e *types.Entry) { e.Selectors = selectors("unix:uid:abc") }), codes.InvalidArgument},
		{"key that our type lacks in the path", spire(func(e *types.Entry) { e.SpiffeId = id("/{{unix.nope}}") }), codes.InvalidArgument},
		{"pod as a delegate describes it", spire(func(e *types.Entry) { e.SpiffeId, e.Selectors = id("/pod"), selectors("k8s:container-name:web") }), codes.OK},
		{"admin", spire(func(e *types.Entry) { e.Admin = true }), codes.InvalidArgument},
		{"downstream", spire(func(e *types.Entry) { e.Downstream = true }), codes.InvalidArgument},
		{"store SVID", spire(func(e *types.Entry) { e.StoreSvid = true }), codes.InvalidArgument},
		{"negative TTL", spire(func(e *types.Entry) { e.X509SvidTtl = -1 }), codes.InvalidArgument},
		{"negative expiry", spire(func(e *types.Entry) { e.ExpiresAt = -1 }), codes.InvalidArgument},
		{"bad DNS name", spire(func(e *types.Entry) { e.DnsNames = []string{"-"} }), codes.InvalidArgument},
		{"hint too long", spire(func(e *types.Entry) { e.Hint = strings.Repeat("h", 1025) }), codes.InvalidArgument},
		{"federated with nobody known", spire(func(e *types.Entry) { e.FederatesWith = []string{"other.example"} }), codes.FailedPrecondition},
		{"federated with no name", spire(func(e *types.Entry) { e.FederatesWith = []string{"Ö"} }), codes.InvalidArgument},
	} {
		t.Run(c.name, func(t *testing.T) {
			in := &entryv1.BatchCreateEntryRequest{Entries: []*types.Entry{c.entry}}
			if c.entry == nil {
				in.Entries = []*types.Entry{{}}
			}
			r, err := api.BatchCreateEntry(context.Background(), in)
			if err != nil {
				t.Fatal(err)
			}
			if got := codes.Code(r.Results[0].Status.Code); got != c.want {
				t.Fatalf("got %v %q, want %v", got, r.Results[0].Status.Message, c.want)
			}
			if there := r.Results[0].Entry != nil; there != (c.want == codes.OK || c.want == codes.AlreadyExists) {
				t.Errorf("an entry in the answer: %v", there)
			}
		})
	}
}

func TestEntryComesBackAsItWasGiven(t *testing.T) {
	w := start(t)
	w.federate(spiffeid.RequireTrustDomainFromString("other.example"))
	api := entryv1.NewEntryClient(w.dial(w.admin))
	in := spire(func(e *types.Entry) {
		e.Id, e.X509SvidTtl, e.JwtSvidTtl, e.Hint = "x", 600, 60, "h"
		e.DnsNames, e.FederatesWith = []string{"a.example"}, []string{"other.example"}
		e.ExpiresAt = time.Now().Add(time.Hour).Unix()
		e.AdditionalAttributes = &types.Entry_AdditionalAttributes{JwtSvidIncludeJti: true}
	})
	r, err := api.BatchCreateEntry(context.Background(), &entryv1.BatchCreateEntryRequest{Entries: []*types.Entry{in}})
	if err != nil {
		t.Fatal(err)
	}
	got, err := api.GetEntry(context.Background(), &entryv1.GetEntryRequest{Id: "x"})
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(r.Results[0].Entry, got, protocmp.Transform()); diff != "" {
		t.Errorf("created and got differ:\n%s", diff)
	}
	if diff := cmp.Diff(in, got, protocmp.Transform(), protocmp.IgnoreFields(&types.Entry{}, "created_at")); diff != "" {
		t.Errorf("entry differs (-given +got):\n%s", diff)
	}
	masked, err := api.GetEntry(context.Background(), &entryv1.GetEntryRequest{Id: "x", OutputMask: &types.EntryMask{Hint: true}})
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(&types.Entry{Id: "x", Hint: "h"}, masked, protocmp.Transform()); diff != "" {
		t.Errorf("masked entry differs (-want +got):\n%s", diff)
	}
	_, err = api.GetEntry(context.Background(), &entryv1.GetEntryRequest{Id: "y"})
	wantCode(t, err, codes.NotFound)
	_, err = api.GetEntry(context.Background(), &entryv1.GetEntryRequest{})
	wantCode(t, err, codes.InvalidArgument)
}

func TestUpdateChangesWhatTheMaskNames(t *testing.T) {
	w := start(t)
	api := entryv1.NewEntryClient(w.dial(w.admin))
	e := w.entry("/a", func(e *registry.Entry) {
		e.Audiences, e.Instance, e.AllowTraced, e.X509TTL = []string{"db"}, true, true, time.Hour
	}, mine)
	if err := w.Registry.ReplaceFile([]registry.Entry{{Path: "/file", Selectors: []attestor.Selector{other}}}); err != nil {
		t.Fatal(err)
	}
	set, _ := w.Registry.Set()
	filed := set.Entries()[0].ID
	update := func(mask *types.EntryMask, in *types.Entry) *entryv1.BatchUpdateEntryResponse_Result {
		t.Helper()
		r, err := api.BatchUpdateEntry(context.Background(), &entryv1.BatchUpdateEntryRequest{Entries: []*types.Entry{in}, InputMask: mask})
		if err != nil {
			t.Fatal(err)
		}
		return r.Results[0]
	}
	r := update(&types.EntryMask{Hint: true}, &types.Entry{Id: e.ID, Hint: "new", Selectors: selectors("unix:uid:7")})
	want := spireEntry(e)
	want.Hint, want.RevisionNumber = "new", 1
	if diff := cmp.Diff(want, r.Entry, protocmp.Transform()); diff != "" || r.Status.Code != 0 {
		t.Errorf("got status %v, entry differs (-want +got):\n%s", r.Status, diff)
	}
	r = update(nil, spire(func(in *types.Entry) { in.Id, in.SpiffeId = e.ID, id("/b") }))
	if r.Status.Code != 0 || r.Entry.Hint != "" || r.Entry.X509SvidTtl != 0 || r.Entry.SpiffeId.Path != "/b" {
		t.Errorf("got %v, want every field as given", r)
	}
	now, err := w.Registry.Get(context.Background(), e.ID)
	if err != nil {
		t.Fatal(err)
	}
	if !now.Instance || !now.AllowTraced || !slices.Equal(now.Audiences, []string{"db"}) {
		t.Errorf("got %+v, want what only Deputy has to stay", now)
	}
	for in, want := range map[*types.Entry]codes.Code{
		{Id: "none", Hint: "x"}: codes.NotFound,
		{Id: filed, Hint: "x"}:  codes.FailedPrecondition,
		{Id: e.ID, Hint: "\n"}:  codes.InvalidArgument,
	} {
		if got := codes.Code(update(&types.EntryMask{Hint: true}, in).Status.Code); got != want {
			t.Errorf("got %v for %v, want %v", got, in, want)
		}
	}
	d, err := api.BatchDeleteEntry(context.Background(), &entryv1.BatchDeleteEntryRequest{Ids: []string{"", "none", filed, e.ID, e.ID}})
	if err != nil {
		t.Fatal(err)
	}
	var got []codes.Code
	for _, r := range d.Results {
		got = append(got, codes.Code(r.Status.Code))
	}
	if want := []codes.Code{codes.InvalidArgument, codes.NotFound, codes.FailedPrecondition, codes.OK, codes.NotFound}; !slices.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
}

func TestListEntriesFilters(t *testing.T) {
	w := start(t)
	for _, name := range []string{"x", "y", "z"} {
		w.federate(spiffeid.RequireTrustDomainFromString(name))
	}
	api := entryv1.NewEntryClient(w.dial(w.admin))
	create := func(change func(*types.Entry)) {
		r, err := api.BatchCreateEntry(context.Background(), &entryv1.BatchCreateEntryRequest{Entries: []*types.Entry{spire(change)}})
		if err != nil || r.Results[0].Status.Code != 0 {
			t.Fatal(err, r)
		}
	}
	create(func(e *types.Entry) {
		e.Id, e.SpiffeId, e.Hint, e.Selectors, e.FederatesWith = "1", id("/one"), "h", selectors("a:1", "b:2", "c:3"), []string{"x", "y", "z"}
	})
	create(func(e *types.Entry) {
		e.Id, e.SpiffeId, e.Selectors, e.FederatesWith = "2", id("/two"), selectors("a:1", "b:2"), []string{"x", "y"}
	})
	create(func(e *types.Entry) {
		e.Id, e.SpiffeId, e.ParentId, e.Selectors, e.FederatesWith = "3", id("/three"), server, selectors("a:1"), []string{"x"}
	})
	create(func(e *types.Entry) { e.Id, e.SpiffeId, e.Selectors = "4", id("/one"), selectors("d:4") })

	type f = entryv1.ListEntriesRequest_Filter
	sel := func(m types.SelectorMatch_MatchBehavior, list ...string) *f {
		return &f{BySelectors: &types.SelectorMatch{Match: m, Selectors: selectors(list...)}}
	}
	fed := func(m types.FederatesWithMatch_MatchBehavior, list ...string) *f {
		return &f{ByFederatesWith: &types.FederatesWithMatch{Match: m, TrustDomains: list}}
	}
	for _, c := range []struct {
		name   string
		filter *f
		want   string
		code   codes.Code
	}{
		{"none", nil, "1234", 0},
		{"empty", &f{}, "1234", 0},
		{"by SPIFFE ID", &f{BySpiffeId: id("/one")}, "14", 0},
		{"by parent", &f{ByParentId: server}, "3", 0},
		{"by hint", &f{ByHint: wrapperspb.String("h")}, "1", 0},
		{"by empty hint", &f{ByHint: wrapperspb.String("")}, "1234", 0},
		{"downstream", &f{ByDownstream: wrapperspb.Bool(true)}, "", 0},
		{"not downstream", &f{ByDownstream: wrapperspb.Bool(false)}, "1234", 0},
		{"both of two", &f{BySpiffeId: id("/one"), ByHint: wrapperspb.String("h")}, "1", 0},
		{"selectors exact", sel(types.SelectorMatch_MATCH_EXACT, "b:2", "a:1"), "2", 0},
		{"selectors subset", sel(types.SelectorMatch_MATCH_SUBSET, "a:1", "b:2"), "23", 0},
		{"selectors superset", sel(types.SelectorMatch_MATCH_SUPERSET, "a:1", "b:2"), "12", 0},
		{"selectors any", sel(types.SelectorMatch_MATCH_ANY, "b:2", "d:4"), "124", 0},
		{"selectors twice", sel(types.SelectorMatch_MATCH_EXACT, "a:1", "a:1"), "3", 0},
		{"selectors unknown way", sel(9, "a:1"), "", codes.InvalidArgument},
		{"selectors none", sel(types.SelectorMatch_MATCH_ANY), "", codes.InvalidArgument},
		{"selectors malformed", sel(types.SelectorMatch_MATCH_ANY, "a"), "", codes.InvalidArgument},
		{"federates exact", fed(types.FederatesWithMatch_MATCH_EXACT, "x", "y"), "2", 0},
		{"federates exact, as IDs", fed(types.FederatesWithMatch_MATCH_EXACT, "spiffe://x", "spiffe://y"), "2", 0},
		{"federates subset", fed(types.FederatesWithMatch_MATCH_SUBSET, "x", "y"), "23", 0},
		{"federates superset", fed(types.FederatesWithMatch_MATCH_SUPERSET, "x", "y"), "12", 0},
		{"federates any", fed(types.FederatesWithMatch_MATCH_ANY, "y", "z"), "12", 0},
		{"federates none", fed(types.FederatesWithMatch_MATCH_ANY), "", codes.InvalidArgument},
		{"federates malformed", fed(types.FederatesWithMatch_MATCH_ANY, "Ö"), "", codes.InvalidArgument},
		{"SPIFFE ID of another", &f{BySpiffeId: &types.SPIFFEID{TrustDomain: "o.example", Path: "/a"}}, "", codes.InvalidArgument},
		{"SPIFFE ID reserved", &f{BySpiffeId: server}, "", codes.InvalidArgument},
		{"parent malformed", &f{ByParentId: &types.SPIFFEID{}}, "", codes.InvalidArgument},
	} {
		t.Run(c.name, func(t *testing.T) {
			for _, size := range []int32{0, 1, 3, 100} {
				var got []string
				in := &entryv1.ListEntriesRequest{Filter: c.filter, PageSize: size}
				for {
					r, err := api.ListEntries(context.Background(), in)
					wantCode(t, err, c.code)
					if size > 0 && len(r.GetEntries()) > int(size) {
						t.Fatalf("got a page of %d, want at most %d", len(r.Entries), size)
					}
					for _, e := range r.GetEntries() {
						got = append(got, e.Id)
					}
					if in.PageToken = r.GetNextPageToken(); in.PageToken == "" {
						break
					}
				}
				if strings.Join(slices.Sorted(slices.Values(got)), "") != c.want {
					t.Errorf("got %q in pages of %d, want %q", got, size, c.want)
				}
			}
			var f *entryv1.CountEntriesRequest_Filter
			if c.filter != nil {
				f = &entryv1.CountEntriesRequest_Filter{
					BySpiffeId: c.filter.BySpiffeId, ByParentId: c.filter.ByParentId, BySelectors: c.filter.BySelectors,
					ByFederatesWith: c.filter.ByFederatesWith, ByHint: c.filter.ByHint, ByDownstream: c.filter.ByDownstream,
				}
			}
			n, err := api.CountEntries(context.Background(), &entryv1.CountEntriesRequest{Filter: f})
			wantCode(t, err, c.code)
			if int(n.GetCount()) != len(c.want) {
				t.Errorf("got count %d, want %d", n.GetCount(), len(c.want))
			}
		})
	}
}

// An entry that anybody who may run the program has is taken, and warned of.
func TestWeakEntriesAreLogged(t *testing.T) {
	w := start(t)
	conn := w.dial(w.admin)
	api, ours := entryv1.NewEntryClient(conn), adminv1.NewAdminClient(conn)
	for _, c := range []struct {
		name      string
		selectors string
		do        func(*types.Entry) error
		warned    bool
	}{
		{"created through SPIRE's API", "unix:path:/usr/bin/python3", func(e *types.Entry) error {
			_, err := api.BatchCreateEntry(call(t), &entryv1.BatchCreateEntryRequest{Entries: []*types.Entry{e}})
			return err
		}, true},
		{"updated through SPIRE's API", "unix:path:/usr/bin/node", func(e *types.Entry) error {
			_, err := api.BatchUpdateEntry(call(t), &entryv1.BatchUpdateEntryRequest{Entries: []*types.Entry{e}})
			return err
		}, true},
		{"updated through ours", "unix:path:/usr/bin/perl", func(e *types.Entry) error {
			_, err := ours.UpdateEntry(call(t), &adminv1.UpdateEntryRequest{Entry: &adminv1.Entry{Entry: e}})
			return err
		}, true},
		{"not weak", "unix:uid:1", func(e *types.Entry) error {
			_, err := ours.UpdateEntry(call(t), &adminv1.UpdateEntryRequest{Entry: &adminv1.Entry{Entry: e}})
			return err
		}, false},
	} {
		before := strings.Count(w.log.String(), "weak entry: entry=w reason=")
		e := spire(func(*types.Entry) {})
		e.Id, e.Selectors = "w", selectors(c.selectors)
		if err := c.do(e); err != nil {
			t.Fatalf("%s: %v", c.name, err)
		}
		if got := strings.Count(w.log.String(), "weak entry: entry=w reason=") - before; (got == 1) != c.warned {
			t.Errorf("%s: got %d warnings, want one %v", c.name, got, c.warned)
		}
		if strings.Contains(w.log.String(), "/usr/bin") {
			t.Errorf("%s: the log has a selector", c.name)
		}
	}
}

// What an administrator brings at once may be far more than a workload asks.
func TestBatchOfManyEntries(t *testing.T) {
	w := start(t)
	ids := slices.Repeat([]string{"0f5e2b9c-6a1d-4c07-9d3e-2b8f4a6c1e70"}, 40_000)
	r, err := entryv1.NewEntryClient(w.dial(w.admin)).BatchDeleteEntry(context.Background(), &entryv1.BatchDeleteEntryRequest{Ids: ids})
	if err != nil {
		t.Fatal(err)
	}
	if len(r.Results) != len(ids) || codes.Code(r.Results[0].Status.Code) != codes.NotFound {
		t.Errorf("got %d results, want %d of NotFound", len(r.Results), len(ids))
	}
}

func TestFederatedBundles(t *testing.T) {
	w := start(t, func(_ *Config, o *local.Options) { o.WIT = true })
	api := bundlev1.NewBundleClient(w.dial(w.admin))
	ctx := context.Background()
	own, err := api.GetBundle(ctx, &bundlev1.GetBundleRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if len(own.WitAuthorities) != 1 || own.WitAuthorities[0].KeyId == own.JwtAuthorities[0].KeyId {
		t.Errorf("got WIT authorities %v, want one with an ID of its own", own.WitAuthorities)
	}
	b, err := spireBundle(bundleOf(t, spiffeid.RequireTrustDomainFromString("other.example")), nil)
	if err != nil {
		t.Fatal(err)
	}
	b.RefreshHint, b.SequenceNumber = 60, 7

	one := func(s *types.Status, want codes.Code) {
		t.Helper()
		if got := codes.Code(s.Code); got != want {
			t.Errorf("got %v %q, want %v", got, s.Message, want)
		}
	}
	update := func(mask *types.BundleMask, b *types.Bundle) *bundlev1.BatchUpdateFederatedBundleResponse_Result {
		r, err := api.BatchUpdateFederatedBundle(ctx, &bundlev1.BatchUpdateFederatedBundleRequest{Bundle: []*types.Bundle{b}, InputMask: mask})
		if err != nil {
			t.Fatal(err)
		}
		return r.Results[0]
	}
	create := func(b *types.Bundle) *types.Status {
		r, err := api.BatchCreateFederatedBundle(ctx, &bundlev1.BatchCreateFederatedBundleRequest{Bundle: []*types.Bundle{b}})
		if err != nil {
			t.Fatal(err)
		}
		return r.Results[0].Status
	}
	one(update(nil, b).Status, codes.NotFound)
	one(create(b), codes.OK)
	one(create(b), codes.AlreadyExists)
	one(create(own), codes.InvalidArgument)
	one(create(&types.Bundle{TrustDomain: "Ö"}), codes.InvalidArgument)
	one(create(&types.Bundle{TrustDomain: "x", X509Authorities: []*types.X509Certificate{{Asn1: []byte("x")}}}), codes.InvalidArgument)
	one(create(&types.Bundle{TrustDomain: "x", X509Authorities: []*types.X509Certificate{{}}}), codes.InvalidArgument)
	one(create(&types.Bundle{TrustDomain: "x", JwtAuthorities: []*types.JWTKey{{PublicKey: own.JwtAuthorities[0].PublicKey}}}), codes.InvalidArgument)
	one(create(&types.Bundle{TrustDomain: "x", JwtAuthorities: []*types.JWTKey{{KeyId: "k"}}}), codes.InvalidArgument)
	one(create(&types.Bundle{TrustDomain: "x", WitAuthorities: []*types.WITKey{{PublicKey: own.WitAuthorities[0].PublicKey}}}), codes.InvalidArgument)
	one(create(&types.Bundle{TrustDomain: "x", WitAuthorities: []*types.WITKey{{KeyId: "k"}}}), codes.InvalidArgument)

	got, err := api.GetFederatedBundle(ctx, &bundlev1.GetFederatedBundleRequest{TrustDomain: "other.example"})
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(b, got, protocmp.Transform()); diff != "" {
		t.Errorf("bundle differs (-given +got):\n%s", diff)
	}
	r := update(&types.BundleMask{RefreshHint: true}, &types.Bundle{TrustDomain: "other.example", RefreshHint: 120})
	one(r.Status, codes.OK)
	b.RefreshHint = 120
	if diff := cmp.Diff(b, r.Bundle, protocmp.Transform()); diff != "" {
		t.Errorf("updated bundle differs (-want +got):\n%s", diff)
	}
	r = update(&types.BundleMask{WitAuthorities: true}, &types.Bundle{TrustDomain: "other.example"})
	one(r.Status, codes.OK)
	b.WitAuthorities = nil
	if diff := cmp.Diff(b, r.Bundle, protocmp.Transform()); diff != "" {
		t.Errorf("updated bundle differs (-want +got):\n%s", diff)
	}
	// Ours is nobody else's, in whatever part and by whichever call it comes.
	one(update(&types.BundleMask{X509Authorities: true}, &types.Bundle{TrustDomain: "other.example", X509Authorities: own.X509Authorities}).Status, codes.InvalidArgument)
	one(update(&types.BundleMask{JwtAuthorities: true}, &types.Bundle{TrustDomain: "other.example", JwtAuthorities: own.JwtAuthorities}).Status, codes.InvalidArgument)
	one(create(&types.Bundle{TrustDomain: "new.example", X509Authorities: own.X509Authorities}), codes.InvalidArgument)
	set, err := api.BatchSetFederatedBundle(ctx, &bundlev1.BatchSetFederatedBundleRequest{Bundle: []*types.Bundle{{TrustDomain: "new.example", JwtAuthorities: own.JwtAuthorities}}})
	if err != nil {
		t.Fatal(err)
	}
	one(set.Results[0].Status, codes.InvalidArgument)
	_, err = api.GetFederatedBundle(ctx, &bundlev1.GetFederatedBundleRequest{TrustDomain: "none.example"})
	wantCode(t, err, codes.NotFound)
	_, err = api.GetFederatedBundle(ctx, &bundlev1.GetFederatedBundleRequest{TrustDomain: domain.Name()})
	wantCode(t, err, codes.InvalidArgument)

	for _, td := range []string{"a.example", "b.example"} {
		set, err := api.BatchSetFederatedBundle(ctx, &bundlev1.BatchSetFederatedBundleRequest{Bundle: []*types.Bundle{{TrustDomain: td, X509Authorities: b.X509Authorities}}})
		if err != nil {
			t.Fatal(err)
		}
		one(set.Results[0].Status, codes.OK)
	}
	if n, err := api.CountBundles(ctx, &bundlev1.CountBundlesRequest{}); err != nil || n.Count != 4 {
		t.Errorf("got %v, %v, want ours and three others", n, err)
	}
	var all []string
	in := &bundlev1.ListFederatedBundlesRequest{PageSize: 2}
	for {
		r, err := api.ListFederatedBundles(ctx, in)
		if err != nil {
			t.Fatal(err)
		}
		for _, b := range r.Bundles {
			all = append(all, b.TrustDomain)
		}
		if in.PageToken = r.NextPageToken; in.PageToken == "" {
			break
		}
	}
	if want := []string{"a.example", "b.example", "other.example"}; !slices.Equal(all, want) {
		t.Errorf("got %q, want %q", all, want)
	}
	_, err = api.AppendBundle(ctx, &bundlev1.AppendBundleRequest{})
	wantCode(t, err, codes.Unimplemented)
}

func TestDeletingABundleThatEntriesFederateWith(t *testing.T) {
	td := spiffeid.RequireTrustDomainFromString("other.example")
	with := func(e *registry.Entry) { e.FederatesWith = []spiffeid.TrustDomain{td} }
	type mode = bundlev1.BatchDeleteFederatedBundleRequest_Mode
	for _, c := range []struct {
		name    string
		mode    mode
		file    bool
		want    codes.Code
		entries int // that are left
		fed     int // of them with the trust domain
	}{
		{"restrict", bundlev1.BatchDeleteFederatedBundleRequest_RESTRICT, false, codes.FailedPrecondition, 2, 1},
		{"delete", bundlev1.BatchDeleteFederatedBundleRequest_DELETE, false, codes.OK, 1, 0},
		{"dissociate", bundlev1.BatchDeleteFederatedBundleRequest_DISSOCIATE, false, codes.OK, 2, 0},
		{"delete with an entry of the file", bundlev1.BatchDeleteFederatedBundleRequest_DELETE, true, codes.FailedPrecondition, 3, 2},
	} {
		t.Run(c.name, func(t *testing.T) {
			w := start(t)
			w.federate(td)
			w.entry("/with", with, mine)
			w.entry("/without", nil, mine)
			if c.file {
				e := registry.Entry{Path: "/file", Selectors: []attestor.Selector{mine}}
				with(&e)
				if err := w.Registry.ReplaceFile([]registry.Entry{e}); err != nil {
					t.Fatal(err)
				}
			}
			r, err := bundlev1.NewBundleClient(w.dial(w.admin)).BatchDeleteFederatedBundle(context.Background(),
				&bundlev1.BatchDeleteFederatedBundleRequest{TrustDomains: []string{"other.example"}, Mode: c.mode})
			if err != nil {
				t.Fatal(err)
			}
			if got := codes.Code(r.Results[0].Status.Code); got != c.want {
				t.Errorf("got %v, want %v", got, c.want)
			}
			set, _ := w.Registry.Set()
			fed := 0
			for _, e := range set.Entries() {
				fed += len(e.FederatesWith)
			}
			if set.Len() != c.entries || fed != c.fed {
				t.Errorf("got %d entries, %d federating, want %d and %d", set.Len(), fed, c.entries, c.fed)
			}
			b, _ := w.authority.Bundles()
			if _, there := b.Federated[td]; there != (c.want != codes.OK) {
				t.Errorf("the bundle is there: %v", there)
			}
		})
	}
}

func TestMint(t *testing.T) {
	w := start(t)
	api := svidv1.NewSVIDClient(w.dial(w.admin))
	ctx := context.Background()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	csr := func(dns []string, uris ...string) []byte {
		in := &x509.CertificateRequest{Subject: pkix.Name{CommonName: "x"}, DNSNames: dns}
		for _, u := range uris {
			parsed, err := url.Parse(u)
			if err != nil {
				t.Fatal(err)
			}
			in.URIs = append(in.URIs, parsed)
		}
		der, err := x509.CreateCertificateRequest(rand.Reader, in, key)
		if err != nil {
			t.Fatal(err)
		}
		return der
	}
	forged := csr(nil, "spiffe://test.example/m")
	forged[len(forged)-1] ^= 1
	for _, c := range []struct {
		name string
		csr  []byte
		ttl  int32
		want codes.Code
	}{
		{"good", csr([]string{"a.example"}, "spiffe://test.example/m"), 60, codes.OK},
		{"none", nil, 0, codes.InvalidArgument},
		{"malformed", []byte("x"), 0, codes.InvalidArgument},
		{"signature broken", forged, 0, codes.InvalidArgument},
		{"no ID", csr(nil), 0, codes.InvalidArgument},
		{"two IDs", csr(nil, "spiffe://test.example/m", "spiffe://test.example/n"), 0, codes.InvalidArgument},
		{"no SPIFFE ID", csr(nil, "https://test.example/m"), 0, codes.InvalidArgument},
		{"of another", csr(nil, "spiffe://other.example/m"), 0, codes.InvalidArgument},
		{"reserved", csr(nil, "spiffe://test.example/spire/server"), 0, codes.InvalidArgument},
		{"of the trust domain", csr(nil, "spiffe://test.example"), 0, codes.InvalidArgument},
		{"bad DNS name", csr([]string{"a..example"}, "spiffe://test.example/m"), 0, codes.InvalidArgument},
		{"negative TTL", csr(nil, "spiffe://test.example/m"), -1, codes.InvalidArgument},
	} {
		t.Run(c.name, func(t *testing.T) {
			r, err := api.MintX509SVID(ctx, &svidv1.MintX509SVIDRequest{Csr: c.csr, Ttl: c.ttl})
			wantCode(t, err, c.want)
			if err != nil {
				return
			}
			leaf, err := x509.ParseCertificate(r.Svid.CertChain[0])
			if err != nil {
				t.Fatal(err)
			}
			if leaf.URIs[0].String() != "spiffe://test.example/m" || !slices.Equal(leaf.DNSNames, []string{"a.example"}) || !leaf.PublicKey.(*ecdsa.PublicKey).Equal(key.Public()) {
				t.Errorf("got %v %v, want what was asked for", leaf.URIs, leaf.DNSNames)
			}
		})
	}
	for _, c := range []struct {
		name string
		in   *svidv1.MintJWTSVIDRequest
		want codes.Code
	}{
		{"good", &svidv1.MintJWTSVIDRequest{Id: id("/m"), Audience: []string{"a"}, Ttl: 60}, codes.OK},
		{"no ID", &svidv1.MintJWTSVIDRequest{Audience: []string{"a"}}, codes.InvalidArgument},
		{"reserved", &svidv1.MintJWTSVIDRequest{Id: server, Audience: []string{"a"}}, codes.InvalidArgument},
		{"no audience", &svidv1.MintJWTSVIDRequest{Id: id("/m")}, codes.InvalidArgument},
		{"empty audience", &svidv1.MintJWTSVIDRequest{Id: id("/m"), Audience: []string{""}}, codes.InvalidArgument},
		{"negative TTL", &svidv1.MintJWTSVIDRequest{Id: id("/m"), Audience: []string{"a"}, Ttl: -1}, codes.InvalidArgument},
	} {
		t.Run("JWT "+c.name, func(t *testing.T) {
			r, err := api.MintJWTSVID(ctx, c.in)
			wantCode(t, err, c.want)
			if err == nil && (r.Svid.Token == "" || r.Svid.ExpiresAt-r.Svid.IssuedAt != 60) {
				t.Errorf("got %v, want a token of a minute", r.Svid)
			}
		})
	}
	_, err = api.BatchNewX509SVID(ctx, &svidv1.BatchNewX509SVIDRequest{})
	wantCode(t, err, codes.Unimplemented)
}

func TestLogLevel(t *testing.T) {
	w := start(t)
	api := loggerv1.NewLoggerClient(w.dial(w.admin))
	ctx := context.Background()
	for _, c := range []struct {
		set  types.LogLevel
		want types.LogLevel
	}{
		{types.LogLevel_TRACE, types.LogLevel_TRACE}, {types.LogLevel_DEBUG, types.LogLevel_DEBUG}, {types.LogLevel_WARN, types.LogLevel_WARN},
		{types.LogLevel_FATAL, types.LogLevel_ERROR},
	} {
		r, err := api.SetLogLevel(ctx, &loggerv1.SetLogLevelRequest{NewLevel: c.set})
		if err != nil || r.CurrentLevel != c.want || r.LaunchLevel != types.LogLevel_INFO {
			t.Errorf("got %v, %v, want %v and launched with INFO", r, err, c.want)
		}
	}
	_, err := api.SetLogLevel(ctx, &loggerv1.SetLogLevelRequest{})
	wantCode(t, err, codes.InvalidArgument)
	if r, err := api.ResetLogLevel(ctx, &loggerv1.ResetLogLevelRequest{}); err != nil || r.CurrentLevel != types.LogLevel_INFO {
		t.Errorf("got %v, %v, want INFO", r, err)
	}
	if r, err := api.GetLogger(ctx, &loggerv1.GetLoggerRequest{}); err != nil || r.CurrentLevel != types.LogLevel_INFO {
		t.Errorf("got %v, %v, want INFO", r, err)
	}
}

// exec keeps names as attestor.Exec does.
type exec map[uint64]string

func (e exec) Register(p *peer.Process, name string) error {
	if name == "refused" {
		return errors.New("refused")
	}
	e[p.ID()] = name
	return nil
}

func TestRegisteredCommandTakesItsEntryWithIt(t *testing.T) {
	names := exec{}
	w := start(t, func(c *Config, _ *local.Options) { c.Names = names })
	api := adminv1.NewAdminClient(w.dial(w.admin))
	ctx := context.Background()
	entry := &adminv1.Entry{Entry: &types.Entry{SpiffeId: id("/job"), Selectors: selectors("process:exec:job")}, Instance: true}
	_, err := api.RegisterExec(ctx, &adminv1.RegisterExecRequest{Pid: int32(os.Getpid()), Name: "refused", Entry: entry})
	wantCode(t, err, codes.Internal)
	if set, _ := w.Registry.Set(); set.Len() != 0 {
		t.Error("the entry of a refused registration stays")
	}
	for name, want := range map[string]codes.Code{"": codes.InvalidArgument, "a b": codes.InvalidArgument, strings.Repeat("a", 65): codes.InvalidArgument} {
		_, err := api.RegisterExec(ctx, &adminv1.RegisterExecRequest{Pid: int32(os.Getpid()), Name: name})
		wantCode(t, err, want)
	}
	_, err = api.RegisterExec(ctx, &adminv1.RegisterExecRequest{Pid: 1 << 30, Name: "job"})
	wantCode(t, err, codes.NotFound)

	sleeper := w.sleeper()
	r, err := api.RegisterExec(ctx, &adminv1.RegisterExecRequest{Pid: int32(sleeper.Process.Pid), Name: "job", Entry: entry})
	if err != nil {
		t.Fatal(err)
	}
	if e, err := w.Registry.Get(ctx, r.EntryId); err != nil || !e.Instance {
		t.Errorf("got %+v, %v, want the entry", e, err)
	}
	sleeper.in.Close()
	sleeper.Wait()
	eventually(t, "the entry goes with the process", func() bool {
		_, err := w.Registry.Get(ctx, r.EntryId)
		return errors.Is(err, registry.ErrNotFound)
	})
}

func TestAttestProcess(t *testing.T) {
	w := start(t)
	w.entry("/a", nil, mine)
	named, err := w.Registry.Create(context.Background(), registry.Entry{Path: "/{{unix.user}}", Selectors: []attestor.Selector{mine}})
	if err != nil {
		t.Fatal(err)
	}
	w.evidence.set(func(ev *attestor.Evidence) {
		ev.Unknown = []attestor.Unknown{{Prefixes: []string{"docker:"}, Err: errors.New("engine does not answer")}}
	})
	api := adminv1.NewAdminClient(w.dial(w.admin))
	r, err := api.AttestProcess(context.Background(), &adminv1.AttestProcessRequest{Pid: int32(os.Getpid())})
	if err != nil {
		t.Fatal(err)
	}
	want := &adminv1.AttestProcessResponse{
		Selectors: selectors("unix:uid:1"), SpiffeIds: []string{"spiffe://test.example/a"},
		Unknown:  []*adminv1.Unknown{{Prefixes: []string{"docker:"}, Reason: "engine does not answer"}},
		Unfilled: []*adminv1.Unfilled{{EntryId: named.ID, Path: "/{{unix.user}}", Reason: "the process has no value for {{unix.user}}"}},
	}
	if diff := cmp.Diff(want, r, protocmp.Transform(), cmpopts.EquateEmpty()); diff != "" {
		t.Errorf("answer differs (-want +got):\n%s", diff)
	}
	for pid, want := range map[int32]codes.Code{0: codes.InvalidArgument, -1: codes.InvalidArgument, 1 << 30: codes.NotFound} {
		_, err := api.AttestProcess(context.Background(), &adminv1.AttestProcessRequest{Pid: pid})
		wantCode(t, err, want)
	}
}

func TestOurEntriesKeepEveryField(t *testing.T) {
	w := start(t)
	api := adminv1.NewAdminClient(w.dial(w.admin))
	ctx := context.Background()
	in := &adminv1.Entry{
		Entry:     &types.Entry{Id: "x", SpiffeId: id("/{{unix.user}}"), Selectors: selectors("unix:gid:1")},
		Audiences: []string{"db"}, Instance: true, AllowTraced: true,
	}
	r, err := api.CreateEntry(ctx, &adminv1.CreateEntryRequest{Entry: in})
	if err != nil {
		t.Fatal(err)
	}
	in.Entry.ParentId, in.Origin = node, adminv1.Origin_ORIGIN_API
	ignore := protocmp.IgnoreFields(&types.Entry{}, "created_at")
	if diff := cmp.Diff(in, r.Entry, protocmp.Transform(), ignore); diff != "" {
		t.Errorf("entry differs (-given +got):\n%s", diff)
	}
	_, err = api.CreateEntry(ctx, &adminv1.CreateEntryRequest{Entry: in})
	wantCode(t, err, codes.AlreadyExists)
	_, err = api.CreateEntry(ctx, &adminv1.CreateEntryRequest{})
	wantCode(t, err, codes.InvalidArgument)
	in.AllowTraced, in.Entry.Hint = false, "h"
	u, err := api.UpdateEntry(ctx, &adminv1.UpdateEntryRequest{Entry: in})
	if err != nil || u.Entry.AllowTraced || u.Entry.Entry.Hint != "h" || u.Entry.Entry.RevisionNumber != 1 {
		t.Errorf("got %v, %v, want it updated", u, err)
	}
	_, err = api.UpdateEntry(ctx, &adminv1.UpdateEntryRequest{Entry: &adminv1.Entry{Entry: spire(func(e *types.Entry) { e.Id = "none" })}})
	wantCode(t, err, codes.NotFound)
	w.entry("/other", nil, other)
	for _, c := range []struct {
		in   *adminv1.ListEntriesRequest
		want int
	}{
		{&adminv1.ListEntriesRequest{}, 2},
		{&adminv1.ListEntriesRequest{Id: "x"}, 1},
		{&adminv1.ListEntriesRequest{SpiffeId: "spiffe://test.example/other"}, 1},
		{&adminv1.ListEntriesRequest{Selectors: selectors("unix:uid:2")}, 1},
		{&adminv1.ListEntriesRequest{Selectors: selectors("unix:uid:2", "unix:uid:3")}, 0},
	} {
		if r, err := api.ListEntries(ctx, c.in); err != nil || len(r.Entries) != c.want {
			t.Errorf("got %d, %v for %v, want %d", len(r.GetEntries()), err, c.in, c.want)
		}
	}
	_, err = api.ListEntries(ctx, &adminv1.ListEntriesRequest{Id: "none"})
	wantCode(t, err, codes.NotFound)
}

func TestProfile(t *testing.T) {
	w := start(t)
	api := adminv1.NewAdminClient(w.dial(w.admin))
	take := func(in *adminv1.ProfileRequest) ([]byte, error) {
		st, err := api.Profile(context.Background(), in)
		if err != nil {
			return nil, err
		}
		var all []byte
		for {
			r, err := st.Recv()
			if err != nil {
				if len(all) > 0 {
					err = nil
				}
				return all, err
			}
			all = append(all, r.Chunk...)
		}
	}
	for kind := range profiles {
		got, err := take(&adminv1.ProfileRequest{Kind: kind})
		if err != nil || len(got) < 2 || got[0] != 0x1f || got[1] != 0x8b {
			t.Errorf("%v: got %d bytes, %v, want a profile, which is gzip", kind, len(got), err)
		}
	}
	_, err := take(&adminv1.ProfileRequest{})
	wantCode(t, err, codes.InvalidArgument)
	_, err = take(&adminv1.ProfileRequest{Kind: adminv1.ProfileRequest_KIND_CPU, Seconds: 61})
	wantCode(t, err, codes.InvalidArgument)
	var both sync.WaitGroup
	both.Go(func() {
		if got, err := take(&adminv1.ProfileRequest{Kind: adminv1.ProfileRequest_KIND_CPU, Seconds: 1}); err != nil || len(got) == 0 {
			t.Errorf("got %d bytes, %v, want a CPU profile", len(got), err)
		}
	})
	both.Wait()
}

func TestHealthOnBothSockets(t *testing.T) {
	w := start(t)
	for _, path := range []string{w.socket, w.admin} {
		api := healthv1.NewHealthClient(w.dial(path))
		eventually(t, "it is healthy", func() bool {
			r, err := api.Check(context.Background(), &healthv1.HealthCheckRequest{})
			return err == nil && r.Status == healthv1.HealthCheckResponse_SERVING
		})
		_, err := api.Check(context.Background(), &healthv1.HealthCheckRequest{Service: "nobody's"})
		wantCode(t, err, codes.NotFound)
	}
}

func TestAdminAPIsAreNotOnTheWorkloadSocket(t *testing.T) {
	w := start(t)
	c := w.dial(w.socket)
	_, err := entryv1.NewEntryClient(c).CountEntries(context.Background(), &entryv1.CountEntriesRequest{})
	wantCode(t, err, codes.Unimplemented)
	_, err = adminv1.NewAdminClient(c).AttestProcess(context.Background(), &adminv1.AttestProcessRequest{Pid: 1})
	wantCode(t, err, codes.Unimplemented)
}
