package svid_test

import (
	"crypto"
	"crypto/x509"
	"encoding/json"
	"testing"
	"time"

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
			RefreshHint:     5 * time.Minute,
			Sequence:        42,
		},
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

func TestBundleEncodingsForTheWorkloadAPI(t *testing.T) {
	a := newAuthority(t, svid.ECP256)
	all, _ := a.Bundles()
	b := all.Own
	if diff := cmp.Diff(b.X509Authorities[0].Raw, b.DER()); diff != "" {
		t.Error(diff)
	}
	data, err := b.JWKS()
	if err != nil {
		t.Fatal(err)
	}
	var set struct {
		Keys []map[string]string `json:"keys"`
	}
	if err := json.Unmarshal(data, &set); err != nil {
		t.Fatal(err)
	}
	if len(set.Keys) != 1 || set.Keys[0]["use"] != "jwt-svid" || set.Keys[0]["kid"] != "key" || set.Keys[0]["d"] != "" {
		t.Errorf("got %s, want the public JWT key alone", data)
	}
	empty := &svid.Bundle{TrustDomain: td}
	if data, err := empty.JWKS(); err != nil || string(data) != `{"keys":[]}` {
		t.Errorf("got %s, %v, want an empty set", data, err)
	}
}

func FuzzParseBundle(f *testing.F) {
	f.Add([]byte(`{"keys":[{"use":"jwt-svid","kty":"EC","kid":"k","crv":"P-256","x":"","y":""}],"spiffe_sequence":1,"spiffe_refresh_hint":-1}`))
	f.Add([]byte(`{"keys":[null,{"use":"x509-svid"}]}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		b, err := svid.ParseBundle(td, data)
		if err != nil {
			return
		}
		if b.TrustDomain != td {
			t.Errorf("got %v", b.TrustDomain)
		}
		b.DER()
		if _, err := b.JWKS(); err != nil {
			t.Errorf("encode what was parsed: %v", err)
		}
	})
}
