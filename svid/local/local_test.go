package local

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"errors"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"github.com/deputy-id/deputy/svid"
)

var (
	td    = spiffeid.RequireTrustDomainFromString("example.org")
	other = spiffeid.RequireTrustDomainFromString("b.example")
)

func open(t testing.TB, o Options) *Authority {
	t.Helper()
	if o.TrustDomain.IsZero() {
		o.TrustDomain = td
	}
	a, err := Open(context.Background(), o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { a.Close() })
	return a
}

func TestOpenedAuthoritySignsWhatItsBundleVerifies(t *testing.T) {
	for _, kind := range []svid.KeyType{svid.ECP256, svid.ECP384, svid.RSA2048} {
		t.Run(string(kind), func(t *testing.T) {
			a := open(t, Options{KeyType: kind, DataDir: t.TempDir()})
			verify(t, a, bundleOf(a))
		})
	}
}

func bundleOf(a *Authority) *svid.Bundle {
	b, _ := a.Bundles()
	return b.Own
}

// verify has both kinds of SVID verified by go-spiffe.
func verify(t *testing.T, a *Authority, b *svid.Bundle) {
	t.Helper()
	id := spiffeid.RequireFromPath(td, "/agent/x")
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	chain, err := a.MintX509(id, key.Public(), []string{"x.example.org"}, 0)
	if err != nil {
		t.Fatal(err)
	}
	if got, _, err := x509svid.Verify(chain, b.SPIFFE().X509Bundle()); err != nil || got != id {
		t.Errorf("X.509-SVID: got %v, %v, want %v", got, err, id)
	}
	tok, err := a.MintJWT(id, []string{"aud"}, 0)
	if err != nil {
		t.Fatal(err)
	}
	if got, err := jwtsvid.ParseAndValidate(tok.Compact, b.SPIFFE().JWTBundle(), []string{"aud"}); err != nil || got.ID != id {
		t.Errorf("JWT-SVID: got %v, %v, want %v", got, err, id)
	}
	if got, _, err := svid.Validate(tok.Compact, "aud", &svid.Bundles{Own: b}); err != nil || got != id {
		t.Errorf("JWT-SVID by Validate: got %v, %v, want %v", got, err, id)
	}
}

type claimsOf func(spiffeid.ID) (map[string]any, error)

func (f claimsOf) Claims(id spiffeid.ID, _ time.Time) (map[string]any, error) { return f(id) }

func TestTokensCarryTheClaimsOfTheirID(t *testing.T) {
	bad := errors.New("no rule")
	a := open(t, Options{Claims: claimsOf(func(id spiffeid.ID) (map[string]any, error) {
		switch id.Path() {
		case "/denied":
			return nil, bad
		case "/plain":
			return nil, nil
		}
		return map[string]any{"path": id.Path()}, nil
	})})
	for path, want := range map[string]any{"/x": "/x", "/plain": nil} {
		tok, err := a.MintJWT(spiffeid.RequireFromPath(td, path), []string{"aud"}, 0)
		if err != nil {
			t.Fatal(err)
		}
		got, err := jwtsvid.ParseAndValidate(tok.Compact, bundleOf(a).SPIFFE().JWTBundle(), []string{"aud"})
		if err != nil || got.Claims["path"] != want {
			t.Errorf("%s: got %v, %v, want %v", path, got, err, want)
		}
	}
	if tok, err := a.MintJWT(spiffeid.RequireFromPath(td, "/denied"), []string{"aud"}, 0); !errors.Is(err, svid.ErrDenied) || !errors.Is(err, bad) || tok.Compact != "" {
		t.Errorf("got %v, %v, want a denial with its reason", tok, err)
	}
}
