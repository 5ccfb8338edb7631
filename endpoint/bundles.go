package endpoint

import (
	"context"
	"crypto"
	"crypto/x509"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"

	"github.com/deputy-id/deputy/svid"
	"github.com/deputy-id/deputy/svid/registry"
)

// bundleStore keeps the bundles of other trust domains. What it has shows in
// the authority's Bundles.
type bundleStore interface {
	SetFederated(*svid.Bundle) error
	UpdateFederated(td spiffeid.TrustDomain, next func(had *svid.Bundle) (*svid.Bundle, error)) error
	DeleteFederated(spiffeid.TrustDomain) error
}

// bundles is SPIRE's bundle API. Our own bundle is the authority's alone:
// nothing can be appended to it or published into it.
type bundles struct {
	bundlev1.UnimplementedBundleServer
	s *Server

	mu sync.Mutex // held while a federated bundle is looked at and changed
}

func (a *bundles) all() (*svid.Bundles, error) {
	b, _ := a.s.Authority.Bundles()
	if b == nil || b.Own == nil {
		return nil, svid.ErrNotReady
	}
	return b, nil
}

func (a *bundles) CountBundles(context.Context, *bundlev1.CountBundlesRequest) (*bundlev1.CountBundlesResponse, error) {
	b, err := a.all()
	if err != nil {
		return nil, adminStatus(err)
	}
	return &bundlev1.CountBundlesResponse{Count: int32(1 + len(b.Federated))}, nil
}

func (a *bundles) GetBundle(_ context.Context, in *bundlev1.GetBundleRequest) (*types.Bundle, error) {
	b, err := a.all()
	if err != nil {
		return nil, adminStatus(err)
	}
	out, err := spireBundle(b.Own, in.OutputMask)
	return out, adminStatus(err)
}

func (a *bundles) GetFederatedBundle(_ context.Context, in *bundlev1.GetFederatedBundleRequest) (*types.Bundle, error) {
	td, err := a.otherDomain(in.TrustDomain)
	if err != nil {
		return nil, adminStatus(err)
	}
	b, err := a.all()
	if err != nil {
		return nil, adminStatus(err)
	}
	f, ok := b.Federated[td]
	if !ok {
		return nil, adminStatus(errNoBundle)
	}
	out, err := spireBundle(f, in.OutputMask)
	return out, adminStatus(err)
}

var errNoBundle = &fault{errNotFound, "bundle not found"}

func (a *bundles) ListFederatedBundles(_ context.Context, in *bundlev1.ListFederatedBundlesRequest) (*bundlev1.ListFederatedBundlesResponse, error) {
	b, err := a.all()
	if err != nil {
		return nil, adminStatus(err)
	}
	out := &bundlev1.ListFederatedBundlesResponse{}
	for _, td := range slices.SortedFunc(maps.Keys(b.Federated), spiffeid.TrustDomain.Compare) {
		if in.PageSize > 0 {
			if in.PageToken != "" && td.Name() <= in.PageToken {
				continue
			}
			if n := len(out.Bundles); n == int(in.PageSize) {
				out.NextPageToken = out.Bundles[n-1].TrustDomain
				break
			}
		}
		one, err := spireBundle(b.Federated[td], in.OutputMask)
		if err != nil {
			return nil, adminStatus(err)
		}
		out.Bundles = append(out.Bundles, one)
	}
	return out, nil
}

func (a *bundles) BatchCreateFederatedBundle(_ context.Context, in *bundlev1.BatchCreateFederatedBundleRequest) (*bundlev1.BatchCreateFederatedBundleResponse, error) {
	out := &bundlev1.BatchCreateFederatedBundleResponse{}
	for _, one := range in.Bundle {
		r := &bundlev1.BatchCreateFederatedBundleResponse_Result{}
		b, err := a.change(one, func(had, b *svid.Bundle) (*svid.Bundle, error) {
			if had != nil {
				return nil, &fault{errExists, "bundle already exists"}
			}
			return b, nil
		})
		if err == nil {
			r.Bundle, err = spireBundle(b, in.OutputMask)
		}
		r.Status = itemStatus(err)
		out.Results = append(out.Results, r)
	}
	return out, nil
}

func (a *bundles) BatchSetFederatedBundle(_ context.Context, in *bundlev1.BatchSetFederatedBundleRequest) (*bundlev1.BatchSetFederatedBundleResponse, error) {
	out := &bundlev1.BatchSetFederatedBundleResponse{}
	for _, one := range in.Bundle {
		r := &bundlev1.BatchSetFederatedBundleResponse_Result{}
		b, err := a.change(one, nil)
		if err == nil {
			r.Bundle, err = spireBundle(b, in.OutputMask)
		}
		r.Status = itemStatus(err)
		out.Results = append(out.Results, r)
	}
	return out, nil
}

func (a *bundles) BatchUpdateFederatedBundle(_ context.Context, in *bundlev1.BatchUpdateFederatedBundleRequest) (*bundlev1.BatchUpdateFederatedBundleResponse, error) {
	out := &bundlev1.BatchUpdateFederatedBundleResponse{}
	for _, one := range in.Bundle {
		r := &bundlev1.BatchUpdateFederatedBundleResponse_Result{}
		b, err := a.change(one, func(had, b *svid.Bundle) (*svid.Bundle, error) {
			if had == nil {
				return nil, errNoBundle
			}
			return updated(had, b, in.InputMask), nil
		})
		if err == nil {
			r.Bundle, err = spireBundle(b, in.OutputMask)
		}
		r.Status = itemStatus(err)
		out.Results = append(out.Results, r)
	}
	return out, nil
}

// updated is had with the fields of b that the mask names.
func updated(had, b *svid.Bundle, mask *types.BundleMask) *svid.Bundle {
	if mask == nil {
		return b
	}
	next := &svid.Bundle{
		TrustDomain:     had.TrustDomain,
		X509Authorities: had.X509Authorities,
		JWTAuthorities:  had.JWTAuthorities,
		WITAuthorities:  had.WITAuthorities,
		RefreshHint:     had.RefreshHint,
		Sequence:        had.Sequence,
	}
	if mask.X509Authorities {
		next.X509Authorities = b.X509Authorities
	}
	if mask.JwtAuthorities {
		next.JWTAuthorities = b.JWTAuthorities
	}
	if mask.WitAuthorities {
		next.WITAuthorities = b.WITAuthorities
	}
	if mask.RefreshHint {
		next.RefreshHint = b.RefreshHint
	}
	if mask.SequenceNumber {
		next.Sequence = b.Sequence
	}
	return next
}

// change stores what edit makes of the bundle that is there, nil if none is,
// and the one in the request, or that one as it is.
func (a *bundles) change(in *types.Bundle, edit func(had, b *svid.Bundle) (*svid.Bundle, error)) (*svid.Bundle, error) {
	if a.s.Federation == nil {
		return nil, errElsewhere
	}
	td, err := a.otherDomain(in.GetTrustDomain())
	if err != nil {
		return nil, err
	}
	b, err := readBundle(td, in)
	if err != nil {
		return nil, err
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if edit == nil {
		err = a.s.Federation.SetFederated(b)
	} else {
		var refused error
		err = a.s.Federation.UpdateFederated(td, func(had *svid.Bundle) (*svid.Bundle, error) {
			b, refused = edit(had, b)
			return b, refused
		})
		if refused != nil {
			return nil, refused // in the words of SPIRE's API alone
		}
	}
	if err != nil {
		return nil, err
	}
	a.s.Log.Info("federated bundle set", "trust_domain", td.Name())
	return b, nil
}

func (a *bundles) BatchDeleteFederatedBundle(ctx context.Context, in *bundlev1.BatchDeleteFederatedBundleRequest) (*bundlev1.BatchDeleteFederatedBundleResponse, error) {
	if _, ok := bundlev1.BatchDeleteFederatedBundleRequest_Mode_name[int32(in.Mode)]; !ok {
		return nil, adminStatus(invalid("unhandled delete mode %d", in.Mode))
	}
	out := &bundlev1.BatchDeleteFederatedBundleResponse{}
	for _, name := range in.TrustDomains {
		out.Results = append(out.Results, &bundlev1.BatchDeleteFederatedBundleResponse_Result{
			TrustDomain: name,
			Status:      itemStatus(a.delete(ctx, name, in.Mode)),
		})
	}
	return out, nil
}

func (a *bundles) delete(ctx context.Context, name string, mode bundlev1.BatchDeleteFederatedBundleRequest_Mode) error {
	if a.s.Federation == nil {
		return errElsewhere
	}
	td, err := a.otherDomain(name)
	if err != nil {
		return err
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	b, err := a.all()
	if err != nil {
		return err
	}
	if _, ok := b.Federated[td]; !ok {
		return errNoBundle
	}
	// It would be back at the next fetch, and whoever deletes it may do so to
	// stop trusting them.
	if a.s.Follower != nil && a.s.Follower.Follows(td) {
		return &fault{errInUse, "cannot delete bundle; it is followed: take federates_with out of the configuration file first"}
	}
	if err := a.part(ctx, td, mode); err != nil {
		return err
	}
	if err := a.s.Federation.DeleteFederated(td); err != nil {
		return err
	}
	a.s.Log.Info("federated bundle deleted", "trust_domain", name, "mode", mode)
	return nil
}

// part does to the entries that federate with the trust domain what the mode
// says. Those of the configuration file cannot be changed, so they stand in
// the way in every mode, before anything is done.
func (a *bundles) part(ctx context.Context, td spiffeid.TrustDomain, mode bundlev1.BatchDeleteFederatedBundleRequest_Mode) error {
	set, _ := a.s.Registry.Set()
	with := slices.DeleteFunc(set.Entries(), func(e registry.Entry) bool { return !slices.Contains(e.FederatesWith, td) })
	filed := 0
	for _, e := range with {
		if e.FromFile {
			filed++
		}
	}
	switch {
	case len(with) == 0:
		return nil
	case filed > 0:
		return &fault{errInUse, fmt.Sprintf("cannot delete bundle; federated with %d registration entries, %d of them of the configuration file: "+
			"take it out of their federates_with first; --dissociate takes it out of the others", len(with), filed)}
	case mode == bundlev1.BatchDeleteFederatedBundleRequest_RESTRICT:
		return &fault{errInUse, fmt.Sprintf("cannot delete bundle; federated with %d registration entries; --dissociate takes it out of them", len(with))}
	}
	for _, e := range with {
		var err error
		if mode == bundlev1.BatchDeleteFederatedBundleRequest_DELETE {
			_, err = a.s.Registry.Delete(ctx, e.ID)
		} else {
			_, err = a.s.Registry.Update(ctx, e.ID, func(e *registry.Entry) error {
				e.FederatesWith = slices.DeleteFunc(e.FederatesWith, func(o spiffeid.TrustDomain) bool { return o == td })
				return nil
			})
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func (a *bundles) otherDomain(name string) (spiffeid.TrustDomain, error) {
	td, err := spiffeid.TrustDomainFromString(name)
	switch {
	case err != nil:
		return td, invalid("trust domain argument is not valid: %v", err)
	case td == a.s.TrustDomain:
		return td, invalid("%s is the server's own trust domain, not a federated one", td)
	}
	return td, nil
}

func spireBundle(b *svid.Bundle, mask *types.BundleMask) (*types.Bundle, error) {
	if mask == nil {
		mask = &types.BundleMask{X509Authorities: true, JwtAuthorities: true, WitAuthorities: true, RefreshHint: true, SequenceNumber: true}
	}
	out := &types.Bundle{TrustDomain: b.TrustDomain.Name()}
	if mask.RefreshHint {
		out.RefreshHint = int64(b.RefreshHint / time.Second)
	}
	if mask.SequenceNumber {
		out.SequenceNumber = b.Sequence
	}
	if mask.X509Authorities {
		for _, c := range b.X509Authorities {
			out.X509Authorities = append(out.X509Authorities, &types.X509Certificate{Asn1: c.Raw})
		}
	}
	if mask.JwtAuthorities {
		for _, id := range slices.Sorted(maps.Keys(b.JWTAuthorities)) {
			der, err := x509.MarshalPKIXPublicKey(b.JWTAuthorities[id])
			if err != nil {
				return nil, fmt.Errorf("encode JWT key %s of %s: %w", id, b.TrustDomain, err)
			}
			out.JwtAuthorities = append(out.JwtAuthorities, &types.JWTKey{KeyId: id, PublicKey: der})
		}
	}
	if mask.WitAuthorities {
		for _, id := range slices.Sorted(maps.Keys(b.WITAuthorities)) {
			der, err := x509.MarshalPKIXPublicKey(b.WITAuthorities[id])
			if err != nil {
				return nil, fmt.Errorf("encode WIT key %s of %s: %w", id, b.TrustDomain, err)
			}
			out.WitAuthorities = append(out.WitAuthorities, &types.WITKey{KeyId: id, PublicKey: der})
		}
	}
	return out, nil
}

func readBundle(td spiffeid.TrustDomain, in *types.Bundle) (*svid.Bundle, error) {
	b := &svid.Bundle{
		TrustDomain:    td,
		Sequence:       in.SequenceNumber,
		JWTAuthorities: make(map[string]crypto.PublicKey),
		WITAuthorities: make(map[string]crypto.PublicKey),
	}
	if in.RefreshHint < 0 || in.RefreshHint > int64(365*24*time.Hour/time.Second) {
		return nil, invalid("refresh hint of %d seconds is out of range", in.RefreshHint)
	}
	b.RefreshHint = time.Duration(in.RefreshHint) * time.Second
	for _, c := range in.X509Authorities {
		certs, err := x509.ParseCertificates(c.GetAsn1())
		if err != nil || len(certs) == 0 {
			return nil, invalid("unable to parse X.509 authority: %v", err)
		}
		b.X509Authorities = append(b.X509Authorities, certs...)
	}
	for _, k := range in.JwtAuthorities {
		key, err := x509.ParsePKIXPublicKey(k.GetPublicKey())
		switch {
		case err != nil:
			return nil, invalid("unable to parse JWT authority: %v", err)
		case k.KeyId == "":
			return nil, invalid("unable to parse JWT authority: missing key ID")
		}
		b.JWTAuthorities[k.KeyId] = key
	}
	for _, k := range in.WitAuthorities {
		key, err := x509.ParsePKIXPublicKey(k.GetPublicKey())
		switch {
		case err != nil:
			return nil, invalid("unable to parse WIT authority: %v", err)
		case k.KeyId == "":
			return nil, invalid("unable to parse WIT authority: missing key ID")
		}
		b.WITAuthorities[k.KeyId] = key
	}
	return b, nil
}
