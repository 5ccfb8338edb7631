package endpoint

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/types/known/structpb"

	"github.com/deputy-id/deputy/svid"
	"github.com/deputy-id/deputy/svid/registry"
)

// Bounds of what a JWT-SVID may be asked for.
const (
	maxAudiences = 32
	maxAudience  = 2048 // bytes
)

func checkAudiences(audiences []string) error {
	switch {
	case len(audiences) == 0:
		return invalid("audience must be specified")
	case len(audiences) > maxAudiences:
		return invalid("more than %d audiences", maxAudiences)
	}
	for _, a := range audiences {
		switch {
		case a == "":
			return invalid("audience must not be empty")
		case len(a) > maxAudience:
			return invalid("audience is longer than %d bytes", maxAudience)
		}
	}
	return nil
}

func (s *Server) fetchJWTSVID(ctx context.Context, l *link, in *workload.JWTSVIDRequest) (*workload.JWTSVIDResponse, error) {
	if err := checkAudiences(in.Audience); err != nil {
		return nil, err
	}
	var id spiffeid.ID
	if in.SpiffeId != "" {
		var err error
		if id, err = spiffeid.FromString(in.SpiffeId); err != nil {
			return nil, invalid("invalid SPIFFE ID: %v", err)
		}
	}
	v, _, err := s.identify(ctx, l, nil)
	if err != nil {
		return nil, err
	}
	if err := v.verdict(); err != nil {
		return nil, err
	}
	entries, err := v.forToken(id, in.Audience)
	if err != nil {
		return nil, err
	}
	if err := l.seat.account().mint(ctx, len(entries), false); err != nil {
		return nil, err
	}
	out := &workload.JWTSVIDResponse{Svids: make([]*workload.JWTSVID, 0, len(entries))}
	for _, e := range entries {
		token, err := s.Keeper.JWT(ctx, l.session.holder, e, in.Audience)
		if err != nil {
			return nil, err
		}
		out.Svids = append(out.Svids, &workload.JWTSVID{SpiffeId: e.SPIFFEID.String(), Svid: token.Token, Hint: e.Hint})
	}
	// Signing may have waited: whoever reads the answer is still the one.
	if err := s.check(l); err != nil {
		return nil, err
	}
	return out, nil
}

// forToken picks the entries that a token is wanted under: of the ID, if one
// is named, and allowed for all of the audiences.
func (v *view) forToken(id spiffeid.ID, audiences []string) ([]registry.Entry, error) {
	var fit []registry.Entry
	held := false
	for _, e := range v.Entries {
		if !id.IsZero() && e.SPIFFEID != id {
			continue
		}
		held = true
		if allows(e, audiences) {
			fit = append(fit, e)
		}
	}
	switch {
	case len(fit) > 0:
		return fit, nil
	case len(v.Unknown) > 0:
		return nil, errUnknown // one that depends on what is unknown might do
	case held:
		return nil, &fault{errNoIdentity, "audience is not allowed"}
	}
	return nil, &fault{errNoIdentity, "SPIFFE ID is not held"}
}

func allows(e registry.Entry, audiences []string) bool {
	if len(e.Audiences) == 0 {
		return true
	}
	return !slices.ContainsFunc(audiences, func(a string) bool { return !slices.Contains(e.Audiences, a) })
}

// validateJWTSVID needs no identity for tokens of our own trust domain. Those
// of another are only believed for a process that has an entry which
// federates with it.
func (s *Server) validateJWTSVID(ctx context.Context, l *link, in *workload.ValidateJWTSVIDRequest) (*workload.ValidateJWTSVIDResponse, error) {
	if err := checkAudiences([]string{in.Audience}); err != nil {
		return nil, err
	}
	if in.Svid == "" {
		return nil, invalid("svid must be specified")
	}
	bundles, _ := s.Authority.Bundles()
	if bundles == nil || bundles.Own == nil {
		return nil, svid.ErrNotReady
	}
	id, claims, err := svid.Validate(in.Svid, in.Audience, bundles.Restrict(nil))
	if errors.Is(err, svid.ErrNoBundle) && len(bundles.Federated) > 0 {
		v, _, unsure := s.identify(ctx, l, nil)
		if unsure != nil {
			return nil, unsure
		}
		var tds []spiffeid.TrustDomain
		for _, e := range v.Entries {
			tds = append(tds, e.FederatesWith...)
		}
		id, claims, err = svid.Validate(in.Svid, in.Audience, bundles.Restrict(tds))
		if errors.Is(err, svid.ErrNoBundle) && len(v.Unknown) > 0 {
			return nil, errUnknown // an entry that depends on what is unknown might federate
		}
	}
	if err != nil {
		return nil, &fault{errInvalid, err.Error()}
	}
	fields, err := claimsStruct(claims)
	if err != nil {
		return nil, &fault{errInvalid, err.Error()}
	}
	return &workload.ValidateJWTSVIDResponse{SpiffeId: id.String(), Claims: fields}, nil
}

// claimsStruct converts claims. A single audience becomes a list: who reads a
// Struct should not have to know both forms.
func claimsStruct(claims map[string]any) (*structpb.Struct, error) {
	if aud, ok := claims["aud"].(string); ok {
		claims["aud"] = []any{aud}
	}
	out := &structpb.Struct{Fields: make(map[string]*structpb.Value, len(claims))}
	for k, c := range claims {
		v, err := claimValue(c)
		if err != nil {
			return nil, fmt.Errorf("claim %q: %w", k, err)
		}
		out.Fields[k] = v
	}
	return out, nil
}

func claimValue(c any) (*structpb.Value, error) {
	switch c := c.(type) {
	case json.Number:
		f, err := c.Float64()
		if err != nil {
			return nil, fmt.Errorf("number is out of range")
		}
		return structpb.NewNumberValue(f), nil
	case []any:
		list := &structpb.ListValue{Values: make([]*structpb.Value, 0, len(c))}
		for _, e := range c {
			v, err := claimValue(e)
			if err != nil {
				return nil, err
			}
			list.Values = append(list.Values, v)
		}
		return structpb.NewListValue(list), nil
	case map[string]any:
		fields := &structpb.Struct{Fields: make(map[string]*structpb.Value, len(c))}
		for k, e := range c {
			v, err := claimValue(e)
			if err != nil {
				return nil, err
			}
			fields.Fields[k] = v
		}
		return structpb.NewStructValue(fields), nil
	}
	return structpb.NewValue(c)
}
