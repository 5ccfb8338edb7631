package endpoint

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	trustdomainv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/trustdomain/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/testing/protocmp"

	adminv1 "github.com/deputy-id/deputy/proto/deputy/admin/v1"
	"github.com/deputy-id/deputy/svid"
	"github.com/deputy-id/deputy/svid/federation"
	"github.com/deputy-id/deputy/svid/local"
)

// following has relationships and knows how each refresh ends.
type following struct {
	all     []federation.Status
	refresh map[string]error
}

func (f *following) Relationships() []federation.Status { return f.all }

func (f *following) Follows(td spiffeid.TrustDomain) bool {
	_, ok := f.refresh[td.Name()]
	return ok
}

func (f *following) Refresh(_ context.Context, td spiffeid.TrustDomain) error {
	if err, ok := f.refresh[td.Name()]; ok {
		return err
	}
	return fmt.Errorf("%s: %w", td, federation.ErrNotFollowed)
}

func someone() *following {
	a, b := spiffeid.RequireTrustDomainFromString("a.example"), spiffeid.RequireTrustDomainFromString("b.example")
	f := &following{
		all: []federation.Status{
			{
				Relationship: federation.Relationship{TrustDomain: a, URL: "https://a.example/", EndpointID: spiffeid.RequireFromString("spiffe://a.example/x")},
				Bundle:       &svid.Bundle{TrustDomain: a, Sequence: 7, RefreshHint: time.Minute},
				Fetched:      time.Unix(100, 0), Next: time.Unix(160, 0),
			},
			{
				Relationship: federation.Relationship{TrustDomain: b, URL: "https://b.example/"},
				Next:         time.Unix(170, 0), Failures: 9, Err: errors.New("no answer"), Stale: true,
			},
		},
		refresh: map[string]error{"a.example": nil, "b.example": errors.New("no answer")},
	}
	return f
}

func TestRelationshipsAreListed(t *testing.T) {
	w := start(t, func(c *Config, _ *local.Options) { c.Follower = someone() })
	api := trustdomainv1.NewTrustDomainClient(w.dial(w.admin))
	a := &types.FederationRelationship{
		TrustDomain: "a.example", BundleEndpointUrl: "https://a.example/",
		BundleEndpointProfile: &types.FederationRelationship_HttpsSpiffe{HttpsSpiffe: &types.HTTPSSPIFFEProfile{EndpointSpiffeId: "spiffe://a.example/x"}},
		TrustDomainBundle:     &types.Bundle{TrustDomain: "a.example", SequenceNumber: 7, RefreshHint: 60},
	}
	b := &types.FederationRelationship{
		TrustDomain: "b.example", BundleEndpointUrl: "https://b.example/",
		BundleEndpointProfile: &types.FederationRelationship_HttpsWeb{HttpsWeb: &types.HTTPSWebProfile{}},
	}
	var got []*types.FederationRelationship
	for in := (&trustdomainv1.ListFederationRelationshipsRequest{PageSize: 1}); ; {
		page, err := api.ListFederationRelationships(t.Context(), in)
		if err != nil || len(page.FederationRelationships) != 1 {
			t.Fatalf("got %v, %v, want a page of one", page, err)
		}
		got = append(got, page.FederationRelationships...)
		if in.PageToken = page.NextPageToken; in.PageToken == "" {
			break
		}
	}
	if diff := cmp.Diff([]*types.FederationRelationship{a, b}, got, protocmp.Transform()); diff != "" {
		t.Error(diff)
	}
	one, err := api.GetFederationRelationship(t.Context(), &trustdomainv1.GetFederationRelationshipRequest{
		TrustDomain: "a.example", OutputMask: &types.FederationRelationshipMask{BundleEndpointUrl: true}})
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(&types.FederationRelationship{TrustDomain: "a.example", BundleEndpointUrl: "https://a.example/"}, one, protocmp.Transform()); diff != "" {
		t.Error(diff)
	}
	ours, err := adminv1.NewFederationClient(w.dial(w.admin)).ListRelationships(t.Context(), &adminv1.ListRelationshipsRequest{})
	if err != nil {
		t.Fatal(err)
	}
	want := []*adminv1.Relationship{
		{Relationship: a, FetchedAt: 100, NextAt: 160},
		{Relationship: b, NextAt: 170, Failures: 9, Error: "no answer", Stale: true},
	}
	if diff := cmp.Diff(want, ours.Relationships, protocmp.Transform()); diff != "" {
		t.Error(diff)
	}
}

func TestRelationshipsAreTheFiles(t *testing.T) {
	w := start(t, func(c *Config, _ *local.Options) { c.Follower = someone() })
	w.federate(spiffeid.RequireTrustDomainFromString("a.example"))
	w.federate(spiffeid.RequireTrustDomainFromString("c.example"))
	conn := w.dial(w.admin)
	api := trustdomainv1.NewTrustDomainClient(conn)
	ctx := t.Context()
	one := []*types.FederationRelationship{{TrustDomain: "c.example"}}
	for name, do := range map[string]func() (*types.Status, error){
		"create": func() (*types.Status, error) {
			r, err := api.BatchCreateFederationRelationship(ctx, &trustdomainv1.BatchCreateFederationRelationshipRequest{FederationRelationships: one})
			return r.GetResults()[0].GetStatus(), err
		},
		"update": func() (*types.Status, error) {
			r, err := api.BatchUpdateFederationRelationship(ctx, &trustdomainv1.BatchUpdateFederationRelationshipRequest{FederationRelationships: one})
			return r.GetResults()[0].GetStatus(), err
		},
		"delete": func() (*types.Status, error) {
			r, err := api.BatchDeleteFederationRelationship(ctx, &trustdomainv1.BatchDeleteFederationRelationshipRequest{TrustDomains: []string{"a.example"}})
			return r.GetResults()[0].GetStatus(), err
		},
		"delete the bundle of one": func() (*types.Status, error) {
			r, err := bundlev1.NewBundleClient(conn).BatchDeleteFederatedBundle(ctx, &bundlev1.BatchDeleteFederatedBundleRequest{TrustDomains: []string{"a.example"}})
			return r.GetResults()[0].GetStatus(), err
		},
	} {
		if got, err := do(); err != nil || codes.Code(got.GetCode()) != codes.FailedPrecondition {
			t.Errorf("%s: got %v, %v, want FailedPrecondition", name, got, err)
		}
	}
	r, err := bundlev1.NewBundleClient(conn).BatchDeleteFederatedBundle(ctx, &bundlev1.BatchDeleteFederatedBundleRequest{TrustDomains: []string{"c.example"}})
	if err != nil || r.Results[0].Status.Code != 0 {
		t.Errorf("delete the bundle of another: got %v, %v", r, err)
	}
}

func TestRefreshBundle(t *testing.T) {
	for _, c := range []struct {
		td   string
		none bool
		want codes.Code
	}{
		{"a.example", false, codes.OK},
		{"b.example", false, codes.Internal},
		{"c.example", false, codes.NotFound},
		{"Ö", false, codes.InvalidArgument},
		{"a.example", true, codes.Unimplemented},
	} {
		w := start(t, func(cfg *Config, _ *local.Options) {
			if !c.none {
				cfg.Follower = someone()
			}
		})
		_, err := trustdomainv1.NewTrustDomainClient(w.dial(w.admin)).RefreshBundle(t.Context(), &trustdomainv1.RefreshBundleRequest{TrustDomain: c.td})
		if got := status.Code(err); got != c.want {
			t.Errorf("%s: got %v, want %v", c.td, err, c.want)
		}
	}
}
