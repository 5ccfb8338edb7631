package svid_test

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/json"
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"github.com/deputy-id/deputy/svid"
	"github.com/deputy-id/deputy/test/bubble"
)

func mustKey(t testing.TB, kind svid.KeyType) crypto.Signer {
	t.Helper()
	k, err := kind.Generate()
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func selfSigned(t testing.TB, key crypto.Signer) *x509.Certificate {
	t.Helper()
	now := time.Now().Truncate(time.Second)
	template := &x509.Certificate{
		Subject:               pkix.Name{CommonName: "CA"},
		NotBefore:             now.Add(-time.Hour),
		NotAfter:              now.Add(24 * time.Hour),
		IsCA:                  true,
		BasicConstraintsValid: true,
		KeyUsage:              x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	c, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func TestIssuedCertificateIsWhatSPIFFEAllows(t *testing.T) {
	a := newAuthority(t, svid.ECP256)
	id := spiffeid.RequireFromPath(td, "/agent/x")
	for name, tt := range map[string]struct {
		key   svid.KeyType
		dns   []string
		usage x509.KeyUsage
		cn    string
		id    string // else that of x
	}{
		"long ID":           {key: svid.ECP256, usage: x509.KeyUsageDigitalSignature, id: "/agent_" + strings.Repeat("x", 256-len("spiffe://example.org/agent_"))},
		"longer ID":         {key: svid.ECP256, usage: x509.KeyUsageDigitalSignature, id: "/agent_" + strings.Repeat("x", 257-len("spiffe://example.org/agent_"))},
		"plain":             {key: svid.ECP256, usage: x509.KeyUsageDigitalSignature},
		"P-384":             {key: svid.ECP384, usage: x509.KeyUsageDigitalSignature},
		"RSA may encipher":  {key: svid.RSA2048, usage: x509.KeyUsageDigitalSignature | x509.KeyUsageKeyEncipherment},
		"with DNS names":    {key: svid.ECP256, dns: []string{"a.example", "b.example"}, cn: "a.example", usage: x509.KeyUsageDigitalSignature},
		"DNS name too long": {key: svid.ECP256, dns: []string{strings.Repeat("a", 60) + ".example"}, usage: x509.KeyUsageDigitalSignature},
	} {
		t.Run(name, func(t *testing.T) {
			id := id
			if tt.id != "" {
				id = spiffeid.RequireFromPath(td, tt.id)
			}
			chain, err := a.issuer.X509(id, mustKey(t, tt.key).Public(), tt.dns, time.Hour)
			if err != nil {
				t.Fatal(err)
			}
			b, _ := a.Bundles()
			if got, _, err := x509svid.Verify(chain, b.Own.SPIFFE().X509Bundle()); err != nil || got != id {
				t.Fatalf("got %v, %v, want %v", got, err, id)
			}
			c := chain[0]
			if c.KeyUsage != tt.usage {
				t.Errorf("got key usage %b, want %b", c.KeyUsage, tt.usage)
			}
			if !slices.Equal(c.ExtKeyUsage, []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}) {
				t.Errorf("got extended key usage %v", c.ExtKeyUsage)
			}
			if c.IsCA || !c.BasicConstraintsValid || len(c.URIs) != 1 || c.SerialNumber.BitLen() > 159 || c.SerialNumber.BitLen() < 64 {
				t.Errorf("got CA %v, constraints %v, %d URIs, serial %v", c.IsCA, c.BasicConstraintsValid, len(c.URIs), c.SerialNumber)
			}
			if len(c.SubjectKeyId) == 0 || !slices.Equal(c.AuthorityKeyId, b.Own.X509Authorities[0].SubjectKeyId) {
				t.Errorf("got key IDs %x, %x", c.SubjectKeyId, c.AuthorityKeyId)
			}
			if !slices.Equal(c.DNSNames, tt.dns) || c.Subject.CommonName != tt.cn {
				t.Errorf("got DNS names %v, common name %q", c.DNSNames, c.Subject.CommonName)
			}
			var uid []any // of a name that is too long, none, rather than a part that others share
			if len(id.String()) <= 256 {
				uid = append(uid, id.String())
			}
			if got := userIDs(c.Subject); !slices.Equal(got, uid) {
				t.Errorf("got %v in the subject, want %v", got, uid)
			}
			for _, e := range c.Extensions {
				if e.Id.String() == "2.5.29.15" && !e.Critical {
					t.Error("key usage is not critical")
				}
			}
			if d := time.Since(c.NotBefore); d < 10*time.Second || d > 40*time.Second {
				t.Errorf("got NotBefore %v ago", d)
			}
		})
	}
}

func TestIssuedCertificateEndsWithItsCA(t *testing.T) {
	bubble.Test(t, func(t *testing.T) {
		a := newAuthority(t, svid.ECP256)
		id, key := spiffeid.RequireFromPath(td, "/x"), mustKey(t, svid.ECP256)
		b, _ := a.Bundles()
		ends := b.Own.X509Authorities[0].NotAfter
		time.Sleep(time.Until(ends) - time.Minute)
		chain, err := a.issuer.X509(id, key.Public(), nil, time.Hour)
		if err != nil {
			t.Fatal(err)
		}
		if !chain[0].NotAfter.Equal(ends) {
			t.Errorf("got %v, want %v", chain[0].NotAfter, ends)
		}
		tok, err := a.issuer.JWT(id, []string{"a"}, time.Hour)
		if err != nil || !tok.Expires.Equal(ends) {
			t.Errorf("got token until %v, %v, want %v", tok.Expires, err, ends)
		}
		time.Sleep(time.Minute)
		if _, err := a.issuer.X509(id, key.Public(), nil, time.Hour); !errors.Is(err, svid.ErrNotReady) {
			t.Errorf("got %v, want ErrNotReady", err)
		}
		if _, err := a.issuer.JWT(id, []string{"a"}, time.Hour); !errors.Is(err, svid.ErrNotReady) {
			t.Errorf("got %v, want ErrNotReady", err)
		}
	})
}

func TestRootIsInNoChain(t *testing.T) {
	a := newAuthority(t, svid.ECP256)
	chain, err := a.issuer.X509(spiffeid.RequireFromString("spiffe://example.org/agent"), mustKey(t, svid.ECP256).Public(), nil, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	if len(chain) != 1 {
		t.Errorf("got a chain of %d under a root, want the leaf alone", len(chain))
	}
}

func TestIssuerRefuses(t *testing.T) {
	a := newAuthority(t, svid.ECP256)
	key := mustKey(t, svid.ECP256).Public()
	small, err := rsa.GenerateKey(rand.Reader, 1024)
	if err != nil {
		t.Fatal(err)
	}
	for name, tt := range map[string]struct {
		id  string
		pub crypto.PublicKey
	}{
		"another trust domain": {"spiffe://other.example/x", key},
		"the trust domain":     {"spiffe://example.org", key},
		"SPIRE's own":          {"spiffe://example.org/spire/server", key},
		"too long":             {"spiffe://example.org/" + strings.Repeat("a", 2048), key},
		"small RSA key":        {"spiffe://example.org/x", &small.PublicKey},
		"strange key":          {"spiffe://example.org/x", "key"},
	} {
		t.Run(name, func(t *testing.T) {
			id := spiffeid.RequireFromString(tt.id)
			if _, err := a.issuer.X509(id, tt.pub, nil, time.Hour); err == nil {
				t.Error("got a certificate, want an error")
			}
			if _, err := a.issuer.JWT(id, []string{"a"}, time.Hour); err == nil && tt.pub == key {
				t.Error("got a token, want an error")
			}
		})
	}
	if _, err := a.issuer.JWT(spiffeid.RequireFromPath(td, "/x"), nil, time.Hour); err == nil {
		t.Error("got a token without audience, want an error")
	}
}

func TestIssuedTokenIsWhatSPIFFEAllows(t *testing.T) {
	for kind, alg := range map[svid.KeyType]string{svid.ECP256: "ES256", svid.ECP384: "ES384", svid.RSA2048: "RS256"} {
		t.Run(alg, func(t *testing.T) {
			a := newAuthority(t, kind)
			id := spiffeid.RequireFromPath(td, "/agent/x")
			b, _ := a.Bundles()
			seen := map[any]bool{}
			for range 20 { // signatures whose halves are short need padding
				tok, err := a.issuer.JWT(id, []string{"a", "b"}, time.Minute)
				if err != nil {
					t.Fatal(err)
				}
				got, err := jwtsvid.ParseAndValidate(tok.Compact, b.Own.SPIFFE().JWTBundle(), []string{"b"})
				if err != nil {
					t.Fatal(err)
				}
				if got.ID != id || !slices.Equal(got.Audience, []string{"a", "b"}) || !got.Expiry.Equal(tok.Expires) {
					t.Errorf("got %+v", got)
				}
				if seen[got.Claims["jti"]] || got.Claims["jti"] == "" {
					t.Errorf("jti %v is not unique", got.Claims["jti"])
				}
				seen[got.Claims["jti"]] = true
				data, err := base64.RawURLEncoding.DecodeString(strings.Split(tok.Compact, ".")[0])
				if err != nil {
					t.Fatal(err)
				}
				var header map[string]any
				if err := json.Unmarshal(data, &header); err != nil {
					t.Fatal(err)
				}
				if diff := cmp.Diff(map[string]any{"alg": alg, "kid": "key", "typ": "JWT"}, header); diff != "" {
					t.Errorf("header differs (-want +got):\n%s", diff)
				}
				if _, ok := got.Claims["iss"]; ok {
					t.Error("got an iss claim, want none")
				}
			}
		})
	}
}

func p521(t testing.TB) crypto.Signer {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P521(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func TestPrivateClaimsStandBesideTheTokensOwn(t *testing.T) {
	a := newAuthority(t, svid.ECP256)
	id := spiffeid.RequireFromPath(td, "/agent/x")
	b, _ := a.Bundles()
	tok, err := a.issuer.JWTWith(id, []string{"a"}, time.Minute, map[string]any{"delegation": map[string]any{"v": 1}, "x.example": "<y>"})
	if err != nil {
		t.Fatal(err)
	}
	got, err := jwtsvid.ParseAndValidate(tok.Compact, b.Own.SPIFFE().JWTBundle(), []string{"a"})
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"aud", "exp", "iat", "jti", "sub"} {
		if got.Claims[name] == nil {
			t.Errorf("got no %s", name)
		}
		delete(got.Claims, name)
	}
	if diff := cmp.Diff(map[string]any{"delegation": map[string]any{"v": 1.0}, "x.example": "<y>"}, got.Claims); diff != "" {
		t.Error(diff)
	}
	for name, private := range map[string]map[string]any{
		"the token's own":      {"sub": "spiffe://example.org/agent/other"},
		"one that it may have": {"nbf": 0},
		"what is no JSON":      {"x": func() {}},
	} {
		if tok, err := a.issuer.JWTWith(id, []string{"a"}, time.Minute, private); err == nil {
			t.Errorf("%s: got %s, want an error", name, tok.Compact)
		}
	}
}

// userIDs are the attributes UID of a name.
func userIDs(name pkix.Name) []any {
	var ids []any
	for _, a := range name.Names {
		if a.Type.String() == "0.9.2342.19200300.100.1.1" {
			ids = append(ids, a.Value)
		}
	}
	return ids
}
