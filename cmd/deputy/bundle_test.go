package main

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"strings"
	"testing"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

func TestBundleIsTheSameAfterTheWire(t *testing.T) {
	td := spiffeid.RequireTrustDomainFromString("example.org")
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	want := spiffebundle.New(td)
	want.SetSequenceNumber(7)
	want.SetRefreshHint(300e9)
	if err := want.AddJWTAuthority("k", key.Public()); err != nil {
		t.Fatal(err)
	}
	if err := want.AddWITAuthority("w", key.Public()); err != nil {
		t.Fatal(err)
	}
	text, err := want.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	wire, err := parseBundle(td, text, "")
	if err != nil {
		t.Fatal(err)
	}
	got, err := standardBundle(wire)
	if err != nil {
		t.Fatal(err)
	}
	if !got.Equal(want) {
		t.Errorf("got %v, want %v", got, want)
	}
}

func TestBundleWithoutAuthorityIsRefused(t *testing.T) {
	td := spiffeid.RequireTrustDomainFromString("example.org")
	for _, text := range []string{"", "x", `{"keys":[]}`, "-----BEGIN PRIVATE KEY-----\nAA==\n-----END PRIVATE KEY-----\n"} {
		if b, err := parseBundle(td, []byte(text), ""); err == nil {
			t.Errorf("%q: got %v, want an error", text, b)
		}
	}
}

func FuzzParseBundle(f *testing.F) {
	td := spiffeid.RequireTrustDomainFromString("example.org")
	f.Add([]byte(`{"keys":[{"kty":"EC","use":"jwt-svid","kid":"a","crv":"P-256","x":"AA","y":"AA"}],"spiffe_sequence":1}`))
	f.Add([]byte("-----BEGIN CERTIFICATE-----\nAA==\n-----END CERTIFICATE-----\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		b, err := parseBundle(td, data, "")
		if err != nil {
			return
		}
		if len(b.X509Authorities)+len(b.JwtAuthorities)+len(b.WitAuthorities) == 0 {
			t.Error("got a bundle without an authority")
		}
		if _, err := standardBundle(b); err != nil {
			t.Errorf("not readable again: %v", err)
		}
	})
}

func TestPlainTextHasNoControlCharacters(t *testing.T) {
	if got := plain("a\x1b[31mb\u009bc\x7f"); strings.ContainsAny(got, "\x1b\x7f\u009b") || !strings.Contains(got, "b") {
		t.Errorf("got %q", got)
	}
}
