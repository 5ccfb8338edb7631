package endpoint

import (
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"

	"github.com/deputy-id/deputy/attestor"
	adminv1 "github.com/deputy-id/deputy/proto/deputy/admin/v1"
	"github.com/deputy-id/deputy/svid/registry"
)

// spireEntry is an entry in SPIRE's words. What only Deputy has is not in it.
func spireEntry(e registry.Entry) *types.Entry {
	out := &types.Entry{
		Id:             e.ID,
		SpiffeId:       &types.SPIFFEID{TrustDomain: e.ParentID.TrustDomain().Name(), Path: e.Path},
		ParentId:       spireID(e.ParentID),
		Selectors:      spireSelectors(e.Selectors),
		X509SvidTtl:    int32(e.X509TTL / time.Second),
		JwtSvidTtl:     int32(e.JWTTTL / time.Second),
		DnsNames:       slices.Clone(e.DNSNames),
		Hint:           e.Hint,
		RevisionNumber: e.Revision,
		CreatedAt:      unixSeconds(e.CreatedAt),
		ExpiresAt:      unixSeconds(e.ExpiresAt),
	}
	for _, td := range e.FederatesWith {
		out.FederatesWith = append(out.FederatesWith, td.Name())
	}
	if e.JWTFresh {
		out.AdditionalAttributes = &types.Entry_AdditionalAttributes{JwtSvidIncludeJti: true}
	}
	return out
}

// ourEntry is an entry in full.
func ourEntry(e registry.Entry) *adminv1.Entry {
	origin := adminv1.Origin_ORIGIN_API
	if e.FromFile {
		origin = adminv1.Origin_ORIGIN_FILE
	}
	return &adminv1.Entry{
		Entry:       spireEntry(e),
		Audiences:   slices.Clone(e.Audiences),
		Instance:    e.Instance,
		AllowTraced: e.AllowTraced,
		Origin:      origin,
	}
}

func spireID(id spiffeid.ID) *types.SPIFFEID {
	return &types.SPIFFEID{TrustDomain: id.TrustDomain().Name(), Path: id.Path()}
}

func spireSelectors(selectors []attestor.Selector) []*types.Selector {
	out := make([]*types.Selector, 0, len(selectors))
	for _, s := range selectors {
		out = append(out, &types.Selector{Type: s.Type, Value: s.Value})
	}
	return out
}

// unixSeconds is seconds since the epoch; the zero time is 0, as SPIRE has it.
func unixSeconds(t time.Time) int64 {
	if t.IsZero() {
		return 0
	}
	return t.Unix()
}

// every masks nothing.
var every = &types.EntryMask{
	SpiffeId: true, ParentId: true, Selectors: true, X509SvidTtl: true, FederatesWith: true, Admin: true,
	Downstream: true, ExpiresAt: true, DnsNames: true, RevisionNumber: true, StoreSvid: true, JwtSvidTtl: true,
	Hint: true, CreatedAt: true, AdditionalAttributes: true,
}

// applySPIRE sets the fields of e that the mask names. What a value must be
// like is the registry's to check; here it is only read.
func applySPIRE(e *registry.Entry, in *types.Entry, mask *types.EntryMask, td spiffeid.TrustDomain) error {
	if in == nil {
		return invalid("missing entry")
	}
	if mask == nil {
		mask = every
	}
	switch {
	case mask.Admin && in.Admin:
		return invalid("admin entries are not supported: administrators use the admin socket")
	case mask.Downstream && in.Downstream:
		return invalid("downstream entries are not supported")
	case mask.StoreSvid && in.StoreSvid:
		return invalid("entries with store_svid are not supported: SVIDs are not stored")
	}
	if mask.SpiffeId {
		switch id := in.SpiffeId; {
		case id == nil || id.Path == "":
			return invalid("invalid SPIFFE ID: it is missing, or has no path")
		case id.TrustDomain != td.Name():
			return invalid("invalid SPIFFE ID: %q is not of the trust domain %q", id.TrustDomain+id.Path, td.Name())
		default:
			e.Path, e.SPIFFEID = id.Path, spiffeid.ID{}
		}
	}
	if mask.ParentId {
		id, err := memberID(in.ParentId, td)
		if err != nil {
			return invalid("invalid parent ID: %v", err)
		}
		e.ParentID = id
	}
	if mask.Selectors {
		selectors, err := readSelectors(in.Selectors)
		if err != nil {
			return err
		}
		e.Selectors = selectors
	}
	if mask.X509SvidTtl {
		if in.X509SvidTtl < 0 {
			return invalid("x509_svid_ttl is negative")
		}
		e.X509TTL = time.Duration(in.X509SvidTtl) * time.Second
	}
	if mask.JwtSvidTtl {
		if in.JwtSvidTtl < 0 {
			return invalid("jwt_svid_ttl is negative")
		}
		e.JWTTTL = time.Duration(in.JwtSvidTtl) * time.Second
	}
	if mask.FederatesWith {
		e.FederatesWith = nil
		for _, name := range in.FederatesWith {
			other, err := spiffeid.TrustDomainFromString(name)
			if err != nil {
				return invalid("invalid federated trust domain: %v", err)
			}
			e.FederatesWith = append(e.FederatesWith, other)
		}
	}
	if mask.ExpiresAt {
		switch {
		case in.ExpiresAt < 0:
			return invalid("expires_at is negative")
		case in.ExpiresAt == 0:
			e.ExpiresAt = time.Time{}
		default:
			e.ExpiresAt = time.Unix(in.ExpiresAt, 0)
		}
	}
	if mask.DnsNames {
		e.DNSNames = slices.Clone(in.DnsNames)
	}
	if mask.Hint {
		e.Hint = in.Hint
	}
	if mask.AdditionalAttributes {
		e.JWTFresh = in.AdditionalAttributes.GetJwtSvidIncludeJti()
	}
	return nil
}

// applyOurs sets what only Deputy's own message has.
func applyOurs(e *registry.Entry, in *adminv1.Entry) {
	e.Audiences = slices.Clone(in.Audiences)
	e.Instance, e.AllowTraced = in.Instance, in.AllowTraced
}

// memberID reads an ID of the trust domain that has a path.
func memberID(in *types.SPIFFEID, td spiffeid.TrustDomain) (spiffeid.ID, error) {
	if in == nil {
		return spiffeid.ID{}, invalid("request must specify SPIFFE ID")
	}
	other, err := spiffeid.TrustDomainFromString(in.TrustDomain)
	if err != nil {
		return spiffeid.ID{}, err
	}
	id, err := spiffeid.FromPath(other, in.Path)
	switch {
	case err != nil:
		return spiffeid.ID{}, err
	case other != td:
		return spiffeid.ID{}, invalid("%q is not a member of trust domain %q", id, td.Name())
	case id.Path() == "":
		return spiffeid.ID{}, invalid("%q has no path", id)
	}
	return id, nil
}

// workloadID is a memberID outside of what SPIRE keeps for itself.
func workloadID(in *types.SPIFFEID, td spiffeid.TrustDomain) (spiffeid.ID, error) {
	id, err := memberID(in, td)
	if err != nil {
		return id, err
	}
	return id, checkWorkload(id)
}

func checkWorkload(id spiffeid.ID) error {
	if id.Path() == "/spire" || strings.HasPrefix(id.Path(), "/spire/") {
		return invalid("%q is in the namespace that is reserved for SPIRE", id)
	}
	return nil
}

func readSelectors(in []*types.Selector) ([]attestor.Selector, error) {
	out := make([]attestor.Selector, 0, len(in))
	for _, s := range in {
		if s.GetType() == "" || s.GetValue() == "" || strings.Contains(s.GetType(), ":") {
			return nil, invalid("selector %q: type and value must be there, and no colon in the type", s.GetType()+":"+s.GetValue())
		}
		out = append(out, attestor.Selector{Type: s.Type, Value: s.Value})
	}
	return out, nil
}

// maskEntry clears what the mask does not name. The ID always stays.
func maskEntry(e *types.Entry, mask *types.EntryMask) *types.Entry {
	if mask == nil {
		return e
	}
	out := &types.Entry{Id: e.Id}
	if mask.SpiffeId {
		out.SpiffeId = e.SpiffeId
	}
	if mask.ParentId {
		out.ParentId = e.ParentId
	}
	if mask.Selectors {
		out.Selectors = e.Selectors
	}
	if mask.X509SvidTtl {
		out.X509SvidTtl = e.X509SvidTtl
	}
	if mask.JwtSvidTtl {
		out.JwtSvidTtl = e.JwtSvidTtl
	}
	if mask.FederatesWith {
		out.FederatesWith = e.FederatesWith
	}
	if mask.ExpiresAt {
		out.ExpiresAt = e.ExpiresAt
	}
	if mask.DnsNames {
		out.DnsNames = e.DnsNames
	}
	if mask.RevisionNumber {
		out.RevisionNumber = e.RevisionNumber
	}
	if mask.Hint {
		out.Hint = e.Hint
	}
	if mask.CreatedAt {
		out.CreatedAt = e.CreatedAt
	}
	if mask.AdditionalAttributes {
		out.AdditionalAttributes = e.AdditionalAttributes
	}
	return out
}
