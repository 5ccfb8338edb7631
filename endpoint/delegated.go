package endpoint

import (
	"context"
	"fmt"
	"slices"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	delegatedv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/agent/delegatedidentity/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"

	"github.com/deputy-id/deputy/svid"
	"github.com/deputy-id/deputy/svid/registry"
)

// newDelegated returns the server of the delegates' socket. Everybody may
// connect; what a caller may do is found out at each call.
func (s *Server) newDelegated() *grpc.Server {
	g := s.newGate(&handshaker{s: s, accept: acceptAny, counted: true}, s.admitPinned, s.denyPinned)
	delegatedv1.RegisterDelegatedIdentityServer(g, &delegated{s: s})
	return g.Server
}

// delegated is SPIRE's Delegated Identity API.
type delegated struct {
	delegatedv1.UnimplementedDelegatedIdentityServer
	s *Server
}

// A delegate is a process that may act for others as long as it is attested as
// one of the authorized ones.
type delegate struct {
	s *Server
	l *link
}

func (s *Server) delegateOf(ctx context.Context) (*delegate, error) {
	l := linkOf(ctx)
	if l == nil {
		return nil, errForeign
	}
	d := &delegate{s, l}
	return d, d.check(ctx)
}

func (d *delegate) check(ctx context.Context) error {
	v, _, err := d.s.identify(ctx, d.l, nil)
	if err != nil {
		return err
	}
	if slices.ContainsFunc(v.Entries, func(e registry.Entry) bool { return d.s.isDelegate(e.SPIFFEID) }) {
		return d.s.check(d.l)
	}
	if err := v.verdict(); err != nil {
		return err
	}
	if len(v.Unknown) > 0 {
		return errUnknown // the entry that makes it one may depend on that
	}
	return errDelegate
}

func (d *delegate) account() *account { return d.l.seat.account() }

func (d *delegate) ended() ending { return d.l.ended() }

// subject is whom a request is about: exactly one of selectors and PID.
func (d *delegate) subject(selectors []*types.Selector, pid int32) (subject, error) {
	if (len(selectors) > 0) == (pid != 0) {
		return nil, invalid("must provide either selectors or non-zero PID, but not both")
	}
	if pid == 0 {
		read, err := readSelectors(selectors)
		if err != nil {
			return nil, err
		}
		return newTold(read)
	}
	// In another PID namespace the delegate would name a process, and we find
	// another one under the same number.
	theirs, err := d.l.Process().Namespace("pid")
	if err != nil {
		return nil, err
	}
	ours, err := ownNamespace("pid")
	switch {
	case err != nil:
		return nil, err
	case theirs != ours:
		return nil, invalid("PIDs are those of the daemon's PID namespace, and the caller is in another")
	}
	return d.s.pin(pid, d.account())
}

func (a *delegated) SubscribeToX509SVIDs(in *delegatedv1.SubscribeToX509SVIDsRequest, st delegatedv1.DelegatedIdentity_SubscribeToX509SVIDsServer) error {
	return a.answer(st.Context(), "SubscribeToX509SVIDs", in.Pid, func(d *delegate) error {
		o, err := a.lend(d, in.Selectors, in.Pid)
		if err != nil {
			return err
		}
		defer o.close()
		return o.stream(st.Context(), st, o.x509State)
	})
}

func (a *delegated) FetchJWTSVIDs(ctx context.Context, in *delegatedv1.FetchJWTSVIDsRequest) (*delegatedv1.FetchJWTSVIDsResponse, error) {
	out := &delegatedv1.FetchJWTSVIDsResponse{}
	err := a.answer(ctx, "FetchJWTSVIDs", in.Pid, func(d *delegate) error {
		if err := checkAudiences(in.Audience); err != nil {
			return err
		}
		o, err := a.lend(d, in.Selectors, in.Pid)
		if err != nil {
			return err
		}
		defer o.close()
		tokens, err := o.tokens(ctx, spiffeid.ID{}, in.Audience)
		for _, t := range tokens {
			out.Svids = append(out.Svids, &types.JWTSVID{
				Token: t.Compact, Id: spireID(t.SPIFFEID), ExpiresAt: t.Expires.Unix(), IssuedAt: t.Issued.Unix(), Hint: t.Hint,
			})
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	return out, nil
}

func (a *delegated) SubscribeToX509Bundles(_ *delegatedv1.SubscribeToX509BundlesRequest, st delegatedv1.DelegatedIdentity_SubscribeToX509BundlesServer) error {
	return a.bundles("SubscribeToX509Bundles", st, func(all []*svid.Bundle) (encoded, error) {
		out := &delegatedv1.SubscribeToX509BundlesResponse{CaCertificates: make(map[string][]byte)}
		for _, b := range all {
			out.CaCertificates[b.TrustDomain.IDString()] = b.DER()
		}
		return deterministic.Marshal(out)
	})
}

func (a *delegated) SubscribeToJWTBundles(_ *delegatedv1.SubscribeToJWTBundlesRequest, st delegatedv1.DelegatedIdentity_SubscribeToJWTBundlesServer) error {
	return a.bundles("SubscribeToJWTBundles", st, func(all []*svid.Bundle) (encoded, error) {
		out := &delegatedv1.SubscribeToJWTBundlesResponse{Bundles: make(map[string][]byte)}
		for _, b := range all {
			jwks, err := b.JWKS()
			if err != nil {
				return nil, err
			}
			out.Bundles[b.TrustDomain.IDString()] = jwks
		}
		return deterministic.Marshal(out)
	})
}

// bundles sends all that there are: of our trust domain, and of every other
// that the daemon knows.
func (a *delegated) bundles(method string, st grpc.ServerStream, encode func([]*svid.Bundle) (encoded, error)) error {
	ctx := st.Context()
	return a.answer(ctx, method, 0, func(d *delegate) error {
		return a.s.followFor(ctx, st, d.ended(), ending{}, func(*state) (*state, error) {
			_, entries := a.s.Registry.Set()
			if err := d.check(ctx); err != nil {
				return nil, err
			}
			b, stale := a.s.Authority.Bundles()
			if !ready(b) {
				return nil, svid.ErrNotReady
			}
			all := []*svid.Bundle{b.Own}
			for _, f := range b.Federated {
				all = append(all, f)
			}
			body, err := encode(all)
			if err != nil {
				return nil, fmt.Errorf("encode bundles: %w", err)
			}
			return &state{body: body, stale: stale, entries: entries, poll: processPoll}, nil
		})
	})
}

// lend begins to hand out what one request is about.
func (a *delegated) lend(d *delegate, selectors []*types.Selector, pid int32) (*loan, error) {
	sub, err := d.subject(selectors, pid)
	if err != nil {
		return nil, err
	}
	o := a.s.lend(d, sub)
	// As SPIRE has it: that no entry matches is an answer, and one that comes
	// later follows.
	o.encode, o.empty = encodeDelegated, true
	return o, nil
}

// answer lets a delegate in, and turns the end of its call into a status. The
// PID is that of whom the call is about, 0 for nobody's.
func (a *delegated) answer(ctx context.Context, method string, pid int32, serve func(*delegate) error) error {
	d, err := a.s.delegateOf(ctx)
	if err == nil {
		err = serve(d)
	}
	if d == nil || err == nil {
		return delegateStatus(err)
	}
	a.s.noteDelegate(d.l, method, pid, err)
	return delegateStatus(err)
}

func encodeDelegated(svids []svid.X509, bundles *svid.Bundles) (encoded, error) {
	out := &delegatedv1.SubscribeToX509SVIDsResponse{}
	for _, x := range svids {
		key, err := x.KeyDER()
		if err != nil {
			return nil, fmt.Errorf("encode key of %s: %w", x.Entry.SPIFFEID, err)
		}
		one := &types.X509SVID{Id: spireID(x.Entry.SPIFFEID), ExpiresAt: x.Chain[0].NotAfter.Unix(), Hint: x.Entry.Hint}
		for _, c := range x.Chain {
			one.CertChain = append(one.CertChain, c.Raw)
		}
		out.X509Svids = append(out.X509Svids, &delegatedv1.X509SVIDWithKey{X509Svid: one, X509SvidKey: key})
		for _, td := range x.Entry.FederatesWith {
			if _, ok := bundles.Federated[td]; ok {
				out.FederatesWith = append(out.FederatesWith, td.IDString())
			}
		}
	}
	slices.Sort(out.FederatesWith)
	out.FederatesWith = slices.Compact(out.FederatesWith)
	body, err := deterministic.Marshal(out)
	if err != nil {
		return nil, fmt.Errorf("encode X.509-SVIDs: %w", err)
	}
	return body, nil
}
