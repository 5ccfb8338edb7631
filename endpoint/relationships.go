package endpoint

import (
	"context"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	trustdomainv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/trustdomain/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/protobuf/types/known/emptypb"

	adminv1 "github.com/deputy-id/deputy/proto/deputy/admin/v1"
	"github.com/deputy-id/deputy/svid/federation"
)

// follower keeps the bundles of other trust domains fresh; federation.Follower
// is what does.
type follower interface {
	Relationships() []federation.Status
	Follows(spiffeid.TrustDomain) bool
	Refresh(context.Context, spiffeid.TrustDomain) error
}

var (
	errFiled      = &fault{errInUse, "relationships are the configuration file's: change federates_with there"}
	errUnfollowed = &fault{errNotFound, "federation relationship does not exist"}
)

// relationships is SPIRE's trust domain API, and ours beside it. Relationships
// come from the configuration file alone, which says whom to trust.
type relationships struct {
	trustdomainv1.UnimplementedTrustDomainServer
	adminv1.UnimplementedFederationServer
	s *Server
}

func (a *relationships) all() ([]federation.Status, error) {
	if a.s.Follower == nil {
		return nil, errElsewhere
	}
	return a.s.Follower.Relationships(), nil
}

func (a *relationships) ListFederationRelationships(_ context.Context, in *trustdomainv1.ListFederationRelationshipsRequest) (*trustdomainv1.ListFederationRelationshipsResponse, error) {
	all, err := a.all()
	if err != nil {
		return nil, adminStatus(err)
	}
	out := &trustdomainv1.ListFederationRelationshipsResponse{}
	for _, r := range all {
		if in.PageSize > 0 {
			if in.PageToken != "" && r.TrustDomain.Name() <= in.PageToken {
				continue
			}
			if n := len(out.FederationRelationships); n == int(in.PageSize) {
				out.NextPageToken = out.FederationRelationships[n-1].TrustDomain
				break
			}
		}
		one, err := spireRelationship(r, in.OutputMask)
		if err != nil {
			return nil, adminStatus(err)
		}
		out.FederationRelationships = append(out.FederationRelationships, one)
	}
	return out, nil
}

func (a *relationships) GetFederationRelationship(_ context.Context, in *trustdomainv1.GetFederationRelationshipRequest) (*types.FederationRelationship, error) {
	td, err := spiffeid.TrustDomainFromString(in.TrustDomain)
	if err != nil {
		return nil, adminStatus(invalid("trust domain argument is not valid: %v", err))
	}
	all, err := a.all()
	if err != nil {
		return nil, adminStatus(err)
	}
	at := slices.IndexFunc(all, func(r federation.Status) bool { return r.TrustDomain == td })
	if at < 0 {
		return nil, adminStatus(errUnfollowed)
	}
	out, err := spireRelationship(all[at], in.OutputMask)
	return out, adminStatus(err)
}

func (a *relationships) RefreshBundle(ctx context.Context, in *trustdomainv1.RefreshBundleRequest) (*emptypb.Empty, error) {
	td, err := spiffeid.TrustDomainFromString(in.TrustDomain)
	if err != nil {
		return nil, adminStatus(invalid("trust domain argument is not valid: %v", err))
	}
	if a.s.Follower == nil {
		return nil, adminStatus(errElsewhere)
	}
	if err := a.s.Follower.Refresh(ctx, td); err != nil {
		return nil, adminStatus(err)
	}
	return &emptypb.Empty{}, nil
}

func (a *relationships) BatchCreateFederationRelationship(_ context.Context, in *trustdomainv1.BatchCreateFederationRelationshipRequest) (*trustdomainv1.BatchCreateFederationRelationshipResponse, error) {
	out := &trustdomainv1.BatchCreateFederationRelationshipResponse{}
	for range in.FederationRelationships {
		out.Results = append(out.Results, &trustdomainv1.BatchCreateFederationRelationshipResponse_Result{Status: itemStatus(errFiled)})
	}
	return out, nil
}

func (a *relationships) BatchUpdateFederationRelationship(_ context.Context, in *trustdomainv1.BatchUpdateFederationRelationshipRequest) (*trustdomainv1.BatchUpdateFederationRelationshipResponse, error) {
	out := &trustdomainv1.BatchUpdateFederationRelationshipResponse{}
	for range in.FederationRelationships {
		out.Results = append(out.Results, &trustdomainv1.BatchUpdateFederationRelationshipResponse_Result{Status: itemStatus(errFiled)})
	}
	return out, nil
}

func (a *relationships) BatchDeleteFederationRelationship(_ context.Context, in *trustdomainv1.BatchDeleteFederationRelationshipRequest) (*trustdomainv1.BatchDeleteFederationRelationshipResponse, error) {
	out := &trustdomainv1.BatchDeleteFederationRelationshipResponse{}
	for _, td := range in.TrustDomains {
		out.Results = append(out.Results, &trustdomainv1.BatchDeleteFederationRelationshipResponse_Result{TrustDomain: td, Status: itemStatus(errFiled)})
	}
	return out, nil
}

// ListRelationships is our own, which also says how each stands.
func (a *relationships) ListRelationships(context.Context, *adminv1.ListRelationshipsRequest) (*adminv1.ListRelationshipsResponse, error) {
	all, err := a.all()
	if err != nil {
		return nil, adminStatus(err)
	}
	out := &adminv1.ListRelationshipsResponse{}
	for _, r := range all {
		one := &adminv1.Relationship{
			FetchedAt: epoch(r.Fetched),
			NextAt:    epoch(r.Next),
			Failures:  int32(min(r.Failures, 1<<30)),
			Stale:     r.Stale,
		}
		if r.Err != nil {
			one.Error = r.Err.Error()
		}
		if one.Relationship, err = spireRelationship(r, nil); err != nil {
			return nil, adminStatus(err)
		}
		out.Relationships = append(out.Relationships, one)
	}
	return out, nil
}

func epoch(t time.Time) int64 {
	if t.IsZero() {
		return 0
	}
	return t.Unix()
}

func spireRelationship(r federation.Status, mask *types.FederationRelationshipMask) (*types.FederationRelationship, error) {
	if mask == nil {
		mask = &types.FederationRelationshipMask{BundleEndpointUrl: true, BundleEndpointProfile: true, TrustDomainBundle: true}
	}
	out := &types.FederationRelationship{TrustDomain: r.TrustDomain.Name()}
	if mask.BundleEndpointUrl {
		out.BundleEndpointUrl = r.URL
	}
	if mask.BundleEndpointProfile {
		if r.EndpointID.IsZero() {
			out.BundleEndpointProfile = &types.FederationRelationship_HttpsWeb{HttpsWeb: &types.HTTPSWebProfile{}}
		} else {
			out.BundleEndpointProfile = &types.FederationRelationship_HttpsSpiffe{HttpsSpiffe: &types.HTTPSSPIFFEProfile{EndpointSpiffeId: r.EndpointID.String()}}
		}
	}
	if mask.TrustDomainBundle && r.Bundle != nil {
		b, err := spireBundle(r.Bundle, nil)
		if err != nil {
			return nil, err
		}
		out.TrustDomainBundle = b
	}
	return out, nil
}
