package discovery_test

import (
	"crypto"
	"encoding/json"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/google/go-cmp/cmp"
	"github.com/hashicorp/go-hclog"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/deputy-id/deputy/svid"
	"github.com/deputy-id/deputy/svid/discovery"
)

var td = spiffeid.RequireTrustDomainFromString("example.org")

// keys is a source.
type keys struct{ bundles *svid.Bundles }

func (k *keys) Bundles() (*svid.Bundles, <-chan struct{}) { return k.bundles, nil }

func newKey(t testing.TB, kind svid.KeyType) crypto.PublicKey {
	t.Helper()
	k, err := kind.Generate()
	if err != nil {
		t.Fatal(err)
	}
	return k.Public()
}

func newHandler(t testing.TB, issuer string, s *keys) *discovery.Handler {
	t.Helper()
	h, err := discovery.New(issuer, s, hclog.NewNullLogger())
	if err != nil {
		t.Fatal(err)
	}
	return h
}

func ask(h http.Handler, method, target string, header ...string) *http.Response {
	r := httptest.NewRequest(method, target, nil)
	for i := 0; i < len(header); i += 2 {
		r.Header.Set(header[i], header[i+1])
	}
	if host := r.Header.Get("Host"); host != "" {
		r.Host = host
	}
	w := httptest.NewRecorder()
	h.ServeHTTP(w, r)
	return w.Result()
}

func body(t testing.TB, r *http.Response) string {
	t.Helper()
	text, err := io.ReadAll(r.Body)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

func one(key crypto.PublicKey) *svid.Bundles {
	return &svid.Bundles{Own: &svid.Bundle{TrustDomain: td, RefreshHint: 5 * time.Minute, JWTAuthorities: map[string]crypto.PublicKey{"k": key}}}
}

func TestDocumentsLieUnderTheIssuer(t *testing.T) {
	s := &keys{one(newKey(t, svid.ECP256))}
	for issuer, want := range map[string]struct{ prefix, keys string }{
		"https://issuer.example.org":          {"", "https://issuer.example.org/keys"},
		"https://issuer.example.org/":         {"", "https://issuer.example.org/keys"},
		"https://issuer.example.org:8444/a/b": {"/a/b", "https://issuer.example.org:8444/a/b/keys"},
		"https://issuer.example.org/a/":       {"/a", "https://issuer.example.org/a/keys"},
	} {
		t.Run(issuer, func(t *testing.T) {
			h := newHandler(t, issuer, s)
			// Nothing of the request is in the answer.
			r := ask(h, "GET", want.prefix+"/.well-known/openid-configuration", "Host", "evil.example", "X-Forwarded-Host", "evil.example")
			if r.StatusCode != 200 || r.Header.Get("Content-Type") != "application/json" {
				t.Fatalf("got %d, %v", r.StatusCode, r.Header)
			}
			var got map[string]any
			if err := json.Unmarshal([]byte(body(t, r)), &got); err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(map[string]any{
				"issuer": issuer, "jwks_uri": want.keys, "authorization_endpoint": "",
				"response_types_supported": []any{"id_token"}, "subject_types_supported": []any{"public"},
				"id_token_signing_alg_values_supported": []any{"RS256", "ES256", "ES384"},
				"claims_supported":                      []any{"aud", "exp", "iat", "iss", "jti", "sub"},
			}, got); diff != "" {
				t.Error(diff)
			}
			if r := ask(h, "GET", want.prefix+"/keys"); r.StatusCode != 200 {
				t.Errorf("keys: got %d", r.StatusCode)
			}
		})
	}
}

func TestNoIssuerThatIsNoURL(t *testing.T) {
	for _, issuer := range []string{"", "issuer.example.org", "http://issuer.example.org", "https://", "https://a.example/?q", "https://a.example/#f", "https://[a"} {
		if _, err := discovery.New(issuer, &keys{}, hclog.NewNullLogger()); err == nil {
			t.Errorf("%q: got no error", issuer)
		}
	}
}

func TestKeysAreOursAndForSigning(t *testing.T) {
	p256, p384, rsa := newKey(t, svid.ECP256), newKey(t, svid.ECP384), newKey(t, svid.RSA2048)
	other := spiffeid.RequireTrustDomainFromString("other.example")
	s := &keys{&svid.Bundles{
		Own: &svid.Bundle{TrustDomain: td, JWTAuthorities: map[string]crypto.PublicKey{"c": rsa, "a": p256, "b": p384}},
		Federated: map[spiffeid.TrustDomain]*svid.Bundle{
			other: {TrustDomain: other, JWTAuthorities: map[string]crypto.PublicKey{"foreign": newKey(t, svid.ECP256)}},
		},
	}}
	text := body(t, ask(newHandler(t, "https://i.example", s), "GET", "/keys"))
	var got jose.JSONWebKeySet
	if err := json.Unmarshal([]byte(text), &got); err != nil {
		t.Fatal(err)
	}
	want := []jose.JSONWebKey{
		{Key: p256, KeyID: "a", Algorithm: "ES256", Use: "sig"},
		{Key: p384, KeyID: "b", Algorithm: "ES384", Use: "sig"},
		{Key: rsa, KeyID: "c", Algorithm: "RS256", Use: "sig"},
	}
	if len(got.Keys) != len(want) {
		t.Fatalf("got %d keys, want %d:\n%s", len(got.Keys), len(want), text)
	}
	for i, k := range got.Keys {
		if k.KeyID != want[i].KeyID || k.Algorithm != want[i].Algorithm || k.Use != want[i].Use || !k.Valid() ||
			!want[i].Key.(interface{ Equal(crypto.PublicKey) bool }).Equal(k.Key) {
			t.Errorf("got %+v, want %+v", k, want[i])
		}
	}
	if strings.Contains(text, "spiffe_") || strings.Contains(text, "x5c") {
		t.Errorf("got more than a JWK Set: %s", text)
	}
}

func TestARotationShowsAtOnce(t *testing.T) {
	s := &keys{one(newKey(t, svid.ECP256))}
	h := newHandler(t, "https://i.example", s)
	first := ask(h, "GET", "/keys")
	tag := first.Header.Get("ETag")
	if got := first.Header.Get("Cache-Control"); got != "public, max-age=300" {
		t.Errorf("got Cache-Control %q", got)
	}
	if r := ask(h, "GET", "/keys", "If-None-Match", tag); r.StatusCode != http.StatusNotModified || body(t, r) != "" {
		t.Errorf("same keys: got %d, want 304", r.StatusCode)
	}
	next := one(newKey(t, svid.ECP256))
	next.Own.JWTAuthorities["k2"] = newKey(t, svid.ECP256)
	next.Own.RefreshHint = 3 * time.Second
	s.bundles = next
	r := ask(h, "GET", "/keys", "If-None-Match", tag)
	if text := body(t, r); r.StatusCode != 200 || !strings.Contains(text, `"k2"`) || r.Header.Get("Cache-Control") != "public, max-age=3" {
		t.Errorf("after a rotation: got %d, %v, %s", r.StatusCode, r.Header, text)
	}
}

func TestMethodsAndPaths(t *testing.T) {
	h := newHandler(t, "https://i.example/a", &keys{one(newKey(t, svid.ECP256))})
	for _, path := range []string{"/a/keys", "/a/.well-known/openid-configuration"} {
		get, head := ask(h, "GET", path), ask(h, "HEAD", path)
		if head.StatusCode != 200 || body(t, head) != "" || head.Header.Get("Content-Length") != get.Header.Get("Content-Length") || head.Header.Get("ETag") != get.Header.Get("ETag") {
			t.Errorf("HEAD %s: got %d, %v", path, head.StatusCode, head.Header)
		}
		for _, method := range []string{"POST", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE", "get"} {
			if r := ask(h, method, path); r.StatusCode != http.StatusMethodNotAllowed || r.Header.Get("Allow") != "GET, HEAD" {
				t.Errorf("%s %s: got %d, %v", method, path, r.StatusCode, r.Header)
			}
		}
	}
	for _, path := range []string{"/", "/keys", "/a", "/a/", "/a/keys/", "/a//keys", "/A/keys", "/b/../a/keys", "/.well-known/openid-configuration", "/a/.well-known/"} {
		if r := ask(h, "GET", path); r.StatusCode != http.StatusNotFound {
			t.Errorf("%s: got %d, want 404", path, r.StatusCode)
		}
	}
}

func TestWithoutKeysNothingIsKept(t *testing.T) {
	for name, b := range map[string]*svid.Bundles{
		"nothing yet": nil,
		"no bundle":   {},
		"no key":      {Own: &svid.Bundle{TrustDomain: td}},
		"strange key": one("key"),
	} {
		h := newHandler(t, "https://i.example", &keys{b})
		for _, path := range []string{"/keys", "/.well-known/openid-configuration"} {
			r := ask(h, "GET", path)
			if r.StatusCode != http.StatusServiceUnavailable || r.Header.Get("Cache-Control") != "no-store" || r.Header.Get("ETag") != "" {
				t.Errorf("%s, %s: got %d, %v", name, path, r.StatusCode, r.Header)
			}
		}
	}
}
