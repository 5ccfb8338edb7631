package endpoint

import (
	"context"
	"fmt"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"

	"github.com/deputy-id/deputy/svid"
)

// A bundleMessage is the bundles for one process as its streams send them.
type bundleMessage struct {
	bundles        *svid.Bundles
	view           *view
	x509, jwt, wit encoded
}

func (s *Server) fetchX509Bundles(ctx context.Context, l *link, st grpc.ServerStream) error {
	return s.stream(ctx, l, st, func(ctx context.Context, l *link, has *state) (*state, error) {
		return s.bundleState(ctx, l, has, func(m *bundleMessage) encoded { return m.x509 })
	})
}

func (s *Server) fetchJWTBundles(ctx context.Context, l *link, st grpc.ServerStream) error {
	return s.stream(ctx, l, st, func(ctx context.Context, l *link, has *state) (*state, error) {
		return s.bundleState(ctx, l, has, func(m *bundleMessage) encoded { return m.jwt })
	})
}

// bundleState returns our bundle and those that the process's entries federate
// with. While its identity is in doubt a stream goes on with the entries that
// it had: keys are not handed out here.
func (s *Server) bundleState(ctx context.Context, l *link, has *state, pick func(*bundleMessage) encoded) (*state, error) {
	v, entries, err := s.identify(ctx, l, nil)
	if err != nil {
		return nil, err
	}
	next := &state{view: v, entries: entries, again: len(v.Unknown) > 0}
	if err := v.verdict(); err != nil {
		if has == nil || !passing(err) {
			return nil, err
		}
		next.view, next.again = has.view, true
	}
	bundles, stale := s.Authority.Bundles()
	next.stale = stale
	m, err := l.session.bundleMessage(bundles, next.view)
	if err != nil {
		return nil, err
	}
	next.body = pick(m)
	return next, nil
}

func (c *session) bundleMessage(bundles *svid.Bundles, v *view) (*bundleMessage, error) {
	if m := c.bundles.Load(); m != nil && m.bundles == bundles && m.view == v {
		return m, nil
	}
	if !ready(bundles) {
		return nil, svid.ErrNotReady
	}
	m, err := c.s.encodeBundles(bundles, v)
	if err != nil {
		return nil, err
	}
	c.bundles.Store(m)
	return m, nil
}

// encodeBundles writes our bundle and those that the view's entries federate with.
func (s *Server) encodeBundles(bundles *svid.Bundles, v *view) (*bundleMessage, error) {
	var tds []spiffeid.TrustDomain
	for _, e := range v.Entries {
		tds = append(tds, e.FederatesWith...)
	}
	ours := bundles.Restrict(tds)
	x509 := &workload.X509BundlesResponse{Bundles: make(map[string][]byte)}
	jwt := &workload.JWTBundlesResponse{Bundles: make(map[string][]byte)}
	wit := &workload.WITBundlesResponse{Bundles: make(map[string]string)}
	add := func(b *svid.Bundle) error {
		jwks, err := b.JWKS()
		if err != nil {
			return err
		}
		if s.WIT {
			wits, err := b.WITs()
			if err != nil {
				return err
			}
			wit.Bundles[b.TrustDomain.IDString()] = string(wits)
		}
		x509.Bundles[b.TrustDomain.IDString()] = b.DER()
		jwt.Bundles[b.TrustDomain.IDString()] = jwks
		return nil
	}
	if err := add(ours.Own); err != nil {
		return nil, err
	}
	for _, b := range ours.Federated {
		if err := add(b); err != nil {
			return nil, err
		}
	}
	m := &bundleMessage{bundles: bundles, view: v}
	var err error
	if m.x509, err = deterministic.Marshal(x509); err != nil {
		return nil, fmt.Errorf("encode X.509 bundles: %w", err)
	}
	if m.jwt, err = deterministic.Marshal(jwt); err != nil {
		return nil, fmt.Errorf("encode JWT bundles: %w", err)
	}
	if m.wit, err = deterministic.Marshal(wit); err != nil {
		return nil, fmt.Errorf("encode WIT bundles: %w", err)
	}
	return m, nil
}
