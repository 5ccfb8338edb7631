package svid_test

import (
	"context"
	"crypto"
	"crypto/x509"
	"errors"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/deputy-id/deputy/internal/watch"
	"github.com/deputy-id/deputy/svid"
	"github.com/deputy-id/deputy/svid/registry"
)

var (
	td    = spiffeid.RequireTrustDomainFromString("example.org")
	other = spiffeid.RequireTrustDomainFromString("other.example")
)

// authority is a fake that signs with one CA, counts, and fails when told.
type authority struct {
	issuer  *svid.Issuer
	bundles *watch.Value[*svid.Bundles]
	signed  atomic.Int64
	minted  atomic.Int64
	bound   atomic.Int64
	ttl     time.Duration
	gate    chan struct{} // X509 waits on it, if set

	mu  sync.Mutex // guards err
	err error
}

func (a *authority) fail(err error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.err = err
}

func (a *authority) failure() error {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.err
}

func (a *authority) X509(ctx context.Context, e registry.Entry, key crypto.Signer) ([]*x509.Certificate, error) {
	if a.gate != nil {
		select {
		case <-a.gate:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
	if err := a.failure(); err != nil {
		return nil, err
	}
	ttl := e.X509TTL
	if ttl == 0 {
		ttl = a.ttl
	}
	chain, err := a.issuer.X509(e.SPIFFEID, key.Public(), e.DNSNames, ttl)
	if err == nil {
		a.signed.Add(1)
	}
	return chain, err
}

func (a *authority) JWT(_ context.Context, e registry.Entry, audience []string) (svid.Token, error) {
	if err := a.failure(); err != nil {
		return svid.Token{}, err
	}
	a.minted.Add(1)
	return a.issuer.JWT(e.SPIFFEID, audience, 5*time.Minute)
}

func (a *authority) WIT(ctx context.Context, e registry.Entry, pub crypto.PublicKey) (svid.Token, error) {
	if a.gate != nil {
		select {
		case <-a.gate:
		case <-ctx.Done():
			return svid.Token{}, ctx.Err()
		}
	}
	if err := a.failure(); err != nil {
		return svid.Token{}, err
	}
	ttl := e.X509TTL
	if ttl == 0 {
		ttl = a.ttl
	}
	t, err := a.issuer.WIT(e.SPIFFEID, pub, ttl)
	if err == nil {
		a.bound.Add(1)
	}
	return t, err
}

func (a *authority) Bundles() (*svid.Bundles, <-chan struct{}) { return a.bundles.Load() }

func newAuthority(t testing.TB, kind svid.KeyType) *authority {
	t.Helper()
	ca, jwt, wit := mustKey(t, kind), mustKey(t, kind), mustKey(t, kind)
	cert := selfSigned(t, ca)
	i, err := svid.NewIssuer(svid.IssuerOptions{
		TrustDomain: td,
		CAKey:       ca,
		CAChain:     []*x509.Certificate{cert},
		JWTKey:      jwt,
		JWTKeyID:    "key",
		JWTUntil:    cert.NotAfter,
		WITKey:      wit,
		WITKeyID:    "wit",
		WITUntil:    cert.NotAfter,
	})
	if err != nil {
		t.Fatal(err)
	}
	return &authority{issuer: i, ttl: time.Hour, bundles: watch.New(&svid.Bundles{Own: &svid.Bundle{
		TrustDomain:     td,
		X509Authorities: []*x509.Certificate{cert},
		JWTAuthorities:  map[string]crypto.PublicKey{"key": jwt.Public()},
		WITAuthorities:  map[string]crypto.PublicKey{"wit": wit.Public()},
		Sequence:        1,
	}})}
}

func entry(name string) registry.Entry {
	return registry.Entry{ID: name, SPIFFEID: spiffeid.RequireFromPath(td, "/agent/"+name), Revision: 1}
}

var errDown = errors.New("server is down")
