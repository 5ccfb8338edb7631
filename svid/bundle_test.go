package svid_test

import (
	"crypto"
	"crypto/x509"
	"encoding/json"
	"maps"
	"strings"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/google/go-cmp/cmp"
	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"

	"github.com/deputy-id/deputy/svid"
)

func TestBundleSurvivesItsFormat(t *testing.T) {
	ca, jwt := mustKey(t, svid.ECP256), mustKey(t, svid.ECP384)
	for name, b := range map[string]*svid.Bundle{
		"full": {
			TrustDomain:     td,
			X509Authorities: []*x509.Certificate{selfSigned(t, ca)},
			JWTAuthorities:  map[string]crypto.PublicKey{"k": jwt.Public()},
			WITAuthorities:  map[string]crypto.PublicKey{"w": ca.Public()},
			RefreshHint:     5 * time.Minute,
			Sequence:        42,
		},
		"WIT alone":     {TrustDomain: td, WITAuthorities: map[string]crypto.PublicKey{"w": ca.Public()}},
		"trusts nobody": {TrustDomain: td, Sequence: 43},
	} {
		t.Run(name, func(t *testing.T) {
			data, err := b.Marshal()
			if err != nil {
				t.Fatal(err)
			}
			if got, err := svid.ParseBundle(td, data); err != nil || !got.Equal(b) {
				t.Errorf("got %+v, %v, want %+v", got, err, b)
			}
			if got, err := spiffebundle.Parse(td, data); err != nil || !got.Equal(b.SPIFFE()) {
				t.Errorf("go-spiffe reads another bundle: %v", err)
			}
		})
	}
	if _, err := svid.ParseBundle(td, []byte(`{"spiffe_sequence":1}`)); err == nil {
		t.Error("no keys: got no error, want one")
	}
}

func TestParseBundle(t *testing.T) {
	ca, jwt := mustKey(t, svid.ECP256), mustKey(t, svid.ECP384)
	full := &svid.Bundle{
		TrustDomain:     td,
		X509Authorities: []*x509.Certificate{selfSigned(t, ca)},
		JWTAuthorities:  map[string]crypto.PublicKey{"k": jwt.Public()},
	}
	data, err := full.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	var doc struct {
		Keys []map[string]any `json:"keys"`
	}
	if err := json.Unmarshal(data, &doc); err != nil {
		t.Fatal(err)
	}
	x5c := doc.Keys[0]["x5c"].([]any)
	with := func(i int, changes ...any) string {
		key := maps.Clone(doc.Keys[i])
		for ; len(changes) > 0; changes = changes[2:] {
			if key[changes[0].(string)] = changes[1]; changes[1] == nil {
				delete(key, changes[0].(string))
			}
		}
		text, err := json.Marshal(key)
		if err != nil {
			t.Fatal(err)
		}
		return string(text)
	}
	keys := func(all ...string) string { return `{"keys":[` + strings.Join(all, ",") + `]}` }
	private, err := json.Marshal(jose.JSONWebKey{Key: jwt, KeyID: "k", Use: "jwt-svid"})
	if err != nil {
		t.Fatal(err)
	}
	other, err := json.Marshal(jose.JSONWebKey{Key: ca.Public(), KeyID: "k", Use: "jwt-svid"})
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name, doc string
		x509, jwt int
		wit       int
		hint      time.Duration
		fails     bool
	}{
		{name: "both kinds", doc: keys(with(0), with(1)), x509: 1, jwt: 1},
		{name: "the same twice", doc: keys(with(0), with(1), with(0), with(1)), x509: 1, jwt: 1},
		{name: "no key", doc: `{"keys":[]}`},
		{name: "members of others", doc: `{"keys":[],"x":{"y":[1]}}`},
		{name: "an unknown use", doc: keys(with(0, "use", "wasm-svid"), with(1)), jwt: 1},
		{name: "no use", doc: keys(with(0, "use", nil), with(1)), jwt: 1},
		{name: "an unknown type", doc: keys(with(0), with(1, "kty", "AKP")), x509: 1},
		{name: "an unknown curve", doc: keys(with(0), with(1, "crv", "secp256k1")), x509: 1},
		{name: "a symmetric key", doc: keys(with(0), `{"kty":"oct","k":"AAAA","use":"jwt-svid","kid":"x"}`), x509: 1},
		{name: "no certificate", doc: keys(with(0, "x5c", nil), with(1)), jwt: 1},
		{name: "an empty list of certificates", doc: keys(with(0, "x5c", []any{}), with(1)), jwt: 1},
		{name: "a second certificate", doc: keys(with(0, "x5c", []any{x5c[0], x5c[0]})), x509: 1},
		{name: "a hint", doc: `{"keys":[],"spiffe_refresh_hint":7}`, hint: 7 * time.Second},
		{name: "a hint below zero", doc: `{"keys":[],"spiffe_refresh_hint":-7}`},
		{name: "a hint without end", doc: `{"keys":[],"spiffe_refresh_hint":99999999999999999999}`, hint: 365 * 24 * time.Hour},
		{name: "keys missing", doc: `{"spiffe_sequence":1}`, fails: true},
		{name: "keys that are null", doc: `{"keys":null}`, fails: true},
		{name: "keys in capitals", doc: `{"KEYS":[]}`, fails: true},
		{name: "keys twice", doc: `{"keys":[],"keys":[]}`, fails: true},
		{name: "a use twice", doc: keys(`{"use":"jwt-svid","use":"jwt-svid"}`), fails: true},
		{name: "a sequence below zero", doc: `{"keys":[],"spiffe_sequence":-1}`, fails: true},
		{name: "a JWT key without ID", doc: keys(with(1, "kid", nil)), fails: true},
		{name: "two JWT keys with one ID", doc: keys(with(1), string(other)), fails: true},
		{name: "a WIT key beside them", doc: keys(with(0), with(1), with(1, "use", "wit-svid", "kid", "w")), x509: 1, jwt: 1, wit: 1},
		{name: "a WIT key twice", doc: keys(with(1, "use", "wit-svid"), with(1, "use", "wit-svid")), wit: 1},
		{name: "a symmetric WIT key", doc: keys(with(0), `{"kty":"oct","k":"AAAA","use":"wit-svid","kid":"x"}`), x509: 1},
		{name: "a WIT key without ID", doc: keys(with(1, "use", "wit-svid", "kid", nil)), fails: true},
		{name: "a key for JWT- and WIT-SVIDs", doc: keys(with(1), with(1, "use", "wit-svid")), fails: true},
		{name: "a WIT key with a JWT key's ID", doc: keys(with(1, "use", "wit-svid"), string(other)), fails: true},
		{name: "a private key", doc: keys(string(private)), fails: true},
		{name: "a certificate of another key", doc: keys(with(1, "use", "x509-svid", "x5c", x5c)), fails: true},
		{name: "a certificate that is none", doc: keys(with(0, "x5c", []any{"AAAA"})), fails: true},
		{name: "a point off the curve", doc: keys(with(1, "y", doc.Keys[1]["x"])), fails: true},
		{name: "not UTF-8", doc: "{\"keys\":[],\"x\":\"\xff\"}", fails: true},
		{name: "something after it", doc: `{"keys":[]}{}`, fails: true},
		{name: "nothing", doc: "", fails: true},
		{name: "a deep hole", doc: strings.Repeat("[", 1<<20), fails: true},
		{name: "a deep hole in keys", doc: `{"keys":[{"use":"jwt-svid","kty":"EC","x":` + strings.Repeat("[", 1<<20), fails: true},
	} {
		t.Run(c.name, func(t *testing.T) {
			b, err := svid.ParseBundle(td, []byte(c.doc))
			if c.fails != (err != nil) {
				t.Fatalf("got error %v, want one: %t", err, c.fails)
			}
			if err == nil && (len(b.X509Authorities) != c.x509 || len(b.JWTAuthorities) != c.jwt || len(b.WITAuthorities) != c.wit || b.RefreshHint != c.hint) {
				t.Errorf("got %d X.509, %d JWT and %d WIT authorities and hint %s, want %d, %d, %d and %s",
					len(b.X509Authorities), len(b.JWTAuthorities), len(b.WITAuthorities), b.RefreshHint, c.x509, c.jwt, c.wit, c.hint)
			}
			if err == nil {
				for _, k := range b.JWTAuthorities {
					if _, err := x509.MarshalPKIXPublicKey(k); err != nil {
						t.Errorf("a key cannot be written: %v", err)
					}
				}
			}
		})
	}
}

func TestBundleEncodingsForTheWorkloadAPI(t *testing.T) {
	a := newAuthority(t, svid.ECP256)
	all, _ := a.Bundles()
	b := all.Own
	if diff := cmp.Diff(b.X509Authorities[0].Raw, b.DER()); diff != "" {
		t.Error(diff)
	}
	empty := &svid.Bundle{TrustDomain: td}
	for _, form := range []struct {
		use, kid string
		encode   func(*svid.Bundle) ([]byte, error)
	}{{"jwt-svid", "key", (*svid.Bundle).JWKS}, {"wit-svid", "wit", (*svid.Bundle).WITs}} {
		data, err := form.encode(b)
		if err != nil {
			t.Fatal(err)
		}
		var set struct {
			Keys []map[string]string `json:"keys"`
		}
		if err := json.Unmarshal(data, &set); err != nil {
			t.Fatal(err)
		}
		if len(set.Keys) != 1 || set.Keys[0]["use"] != form.use || set.Keys[0]["kid"] != form.kid || set.Keys[0]["d"] != "" {
			t.Errorf("got %s, want the public key for %s alone", data, form.use)
		}
		if data, err := form.encode(empty); err != nil || string(data) != `{"keys":[]}` {
			t.Errorf("got %s, %v, want an empty set", data, err)
		}
	}
}

func FuzzParseBundle(f *testing.F) {
	f.Add([]byte(`{"keys":[{"use":"jwt-svid","kty":"EC","kid":"k","crv":"P-256","x":"","y":""}],"spiffe_sequence":1,"spiffe_refresh_hint":-1}`))
	f.Add([]byte(`{"keys":[null,{"use":"x509-svid"}]}`))
	f.Add([]byte(`{"keys":[{"use":"wit-svid","kty":"oct","kid":"k","k":"AA"},{"use":"wit-svid","kty":"OKP","kid":"o","crv":"Ed25519","x":"AA"}]}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		b, err := svid.ParseBundle(td, data)
		if err != nil {
			return
		}
		if b.TrustDomain != td {
			t.Errorf("got %v", b.TrustDomain)
		}
		b.DER()
		for _, encode := range []func() ([]byte, error){b.JWKS, b.WITs} {
			if _, err := encode(); err != nil {
				t.Errorf("encode what was parsed: %v", err)
			}
		}
	})
}
