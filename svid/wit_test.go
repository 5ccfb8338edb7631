package svid_test

import (
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/google/go-cmp/cmp"
	"github.com/spiffe/go-spiffe/v2/exp/svid/witsvid"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"

	"github.com/deputy-id/deputy/svid"
	"github.com/deputy-id/deputy/svid/registry"
	"github.com/deputy-id/deputy/test/bubble"
)

// part decodes the header (0) or the claims (1) of a token.
func part(t testing.TB, token string, n int) map[string]any {
	t.Helper()
	data, err := base64.RawURLEncoding.DecodeString(strings.Split(token, ".")[n])
	if err != nil {
		t.Fatal(err)
	}
	var o map[string]any
	if err := json.Unmarshal(data, &o); err != nil {
		t.Fatal(err)
	}
	return o
}

func same(a, b crypto.PublicKey) bool {
	return a.(interface{ Equal(crypto.PublicKey) bool }).Equal(b)
}

func TestIssuedWITIsWhatSPIFFEAllows(t *testing.T) {
	id := spiffeid.RequireFromPath(td, "/agent/x")
	for kind, alg := range map[svid.KeyType]string{svid.ECP256: "ES256", svid.ECP384: "ES384", svid.RSA2048: "RS256"} {
		for bound, boundAlg := range map[svid.KeyType]string{svid.ECP256: "ES256", svid.ECP384: "ES384", svid.RSA2048: "RS256"} {
			t.Run(alg+" for "+boundAlg, func(t *testing.T) {
				a, key := newAuthority(t, kind), mustKey(t, bound)
				all, _ := a.Bundles()
				tok, err := a.issuer.WIT(id, key.Public(), time.Minute)
				if err != nil {
					t.Fatal(err)
				}
				got, err := witsvid.ParseAndValidate(tok.Compact, all.Own.SPIFFE().WITBundle())
				if err != nil {
					t.Fatal(err)
				}
				if got.ID != id || !got.Expiry.Equal(tok.Expires) || !same(got.PublicKey, key.Public()) {
					t.Errorf("got %+v", got)
				}
				ours, err := svid.ValidateWIT(tok.Compact, all)
				if err != nil || ours.ID != id || !same(ours.Key, key.Public()) || string(ours.Algorithm) != boundAlg {
					t.Errorf("got %+v, %v", ours, err)
				}
				if diff := cmp.Diff(map[string]any{"alg": alg, "kid": "wit", "typ": "wit+jwt"}, part(t, tok.Compact, 0)); diff != "" {
					t.Errorf("header differs (-want +got):\n%s", diff)
				}
				claims := part(t, tok.Compact, 1)
				exp, iat, nbf := claims["exp"].(float64), claims["iat"].(float64), claims["nbf"].(float64)
				if exp-iat != 60 || iat-nbf != 30 {
					t.Errorf("got exp %v, iat %v, nbf %v", exp, iat, nbf)
				}
				jwk := claims["cnf"].(map[string]any)["jwk"].(map[string]any)
				if jwk["alg"] != boundAlg || jwk["d"] != nil {
					t.Errorf("got jwk %v", jwk)
				}
				for _, name := range []string{"exp", "iat", "nbf", "cnf", "jti"} {
					delete(claims, name)
				}
				// No aud, no iss, no other claim.
				if diff := cmp.Diff(map[string]any{"sub": id.String()}, claims); diff != "" {
					t.Error(diff)
				}
			})
		}
	}
}

// Neither kind of token passes for the other, whatever the keys.
func TestWITAndJWTAreNotTakenForEachOther(t *testing.T) {
	a := newAuthority(t, svid.ECP256)
	id := spiffeid.RequireFromPath(td, "/agent/x")
	all, _ := a.Bundles()
	wit, err := a.issuer.WIT(id, mustKey(t, svid.ECP256).Public(), time.Minute)
	if err != nil {
		t.Fatal(err)
	}
	jwt, err := a.issuer.JWT(id, []string{"a"}, time.Minute)
	if err != nil {
		t.Fatal(err)
	}
	// A bundle in which each key is for both.
	both := &svid.Bundle{TrustDomain: td, JWTAuthorities: map[string]crypto.PublicKey{}, WITAuthorities: map[string]crypto.PublicKey{}}
	for _, keys := range []map[string]crypto.PublicKey{all.Own.JWTAuthorities, all.Own.WITAuthorities} {
		for kid, key := range keys {
			both.JWTAuthorities[kid], both.WITAuthorities[kid] = key, key
		}
	}
	for name, b := range map[string]*svid.Bundles{"as published": all, "each key for both": {Own: both}} {
		if _, _, err := svid.Validate(wit.Compact, "a", b); err == nil {
			t.Errorf("%s: a WIT-SVID passes for a JWT-SVID", name)
		}
		if _, err := svid.ValidateWIT(jwt.Compact, b); err == nil {
			t.Errorf("%s: a JWT-SVID passes for a WIT-SVID", name)
		}
		if _, err := jwtsvid.ParseAndValidate(wit.Compact, b.Own.SPIFFE().JWTBundle(), []string{"a"}); err == nil {
			t.Errorf("%s: go-spiffe takes a WIT-SVID for a JWT-SVID", name)
		}
	}
}

func TestIssuerRefusesWITs(t *testing.T) {
	a := newAuthority(t, svid.ECP256)
	id, key := spiffeid.RequireFromPath(td, "/x"), mustKey(t, svid.ECP256).Public()
	small, err := rsa.GenerateKey(rand.Reader, 1024)
	if err != nil {
		t.Fatal(err)
	}
	for name, tt := range map[string]struct {
		id  spiffeid.ID
		pub crypto.PublicKey
	}{
		"another trust domain": {spiffeid.RequireFromPath(other, "/x"), key},
		"SPIRE's own":          {spiffeid.RequireFromPath(td, "/spire/server"), key},
		"small RSA key":        {id, &small.PublicKey},
		"P-521":                {id, p521(t).Public()},
		"strange key":          {id, "key"},
	} {
		if tok, err := a.issuer.WIT(tt.id, tt.pub, time.Hour); err == nil {
			t.Errorf("%s: got %s, want an error", name, tok.Compact)
		}
	}
	ca := mustKey(t, svid.ECP256)
	without, err := svid.NewIssuer(svid.IssuerOptions{TrustDomain: td, CAKey: ca, CAChain: []*x509.Certificate{selfSigned(t, ca)}, JWTKey: mustKey(t, svid.ECP256)})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := without.WIT(id, key, time.Hour); !errors.Is(err, svid.ErrNotReady) {
		t.Errorf("without a key: got %v, want ErrNotReady", err)
	}
}

func TestIssuedWITEndsWithItsKey(t *testing.T) {
	bubble.Test(t, func(t *testing.T) {
		a := newAuthority(t, svid.ECP256)
		id, key := spiffeid.RequireFromPath(td, "/x"), mustKey(t, svid.ECP256).Public()
		b, _ := a.Bundles()
		ends := b.Own.X509Authorities[0].NotAfter
		time.Sleep(time.Until(ends) - time.Minute)
		if tok, err := a.issuer.WIT(id, key, time.Hour); err != nil || !tok.Expires.Equal(ends) {
			t.Errorf("got token until %v, %v, want %v", tok.Expires, err, ends)
		}
		time.Sleep(time.Minute)
		if _, err := a.issuer.WIT(id, key, time.Hour); !errors.Is(err, svid.ErrNotReady) {
			t.Errorf("got %v, want ErrNotReady", err)
		}
	})
}

func TestValidateWIT(t *testing.T) {
	key, foreign, holder := mustKey(t, svid.ECP256), mustKey(t, svid.ECP256), mustKey(t, svid.ECP256)
	bundles := &svid.Bundles{
		Own: &svid.Bundle{TrustDomain: td, WITAuthorities: map[string]crypto.PublicKey{"k": key.Public()}, JWTAuthorities: map[string]crypto.PublicKey{"j": key.Public()}},
		Federated: map[spiffeid.TrustDomain]*svid.Bundle{
			other: {TrustDomain: other, WITAuthorities: map[string]crypto.PublicKey{"f": foreign.Public()}},
		},
	}
	jwkOf := func(key any, alg string) string {
		data, err := jose.JSONWebKey{Key: key, Algorithm: alg}.MarshalJSON()
		if err != nil {
			t.Fatal(err)
		}
		return string(data)
	}
	small, err := rsa.GenerateKey(rand.Reader, 1024)
	if err != nil {
		t.Fatal(err)
	}
	now := time.Now().Unix()
	bound := fmt.Sprintf(`{"jwk":%s}`, jwkOf(holder.Public(), "ES256"))
	const good = `{"alg":"ES256","kid":"k","typ":"wit+jwt"}`
	with := func(sub, cnf string, exp any, more string) string {
		return fmt.Sprintf(`{"sub":%q,"cnf":%s,"exp":%v%s}`, sub, cnf, exp, more)
	}
	claims := func(more string) string { return with("spiffe://example.org/x", bound, now+60, more) }
	cnf := func(cnf string) string { return with("spiffe://example.org/x", cnf, now+60, "") }
	for name, tt := range map[string]struct {
		header, payload string
		key             crypto.Signer
		want            bool
	}{
		"good":                     {good, claims(""), key, true},
		"more header parameters":   {`{"alg":"ES256","kid":"k","typ":"wit+jwt","x5t":"x","jwk":{}}`, claims(""), key, true},
		"iat ahead":                {good, claims(fmt.Sprintf(`,"iat":%d`, now+600)), key, true},
		"nbf a little ahead":       {good, claims(fmt.Sprintf(`,"nbf":%d`, now+5)), key, true},
		"issuer and more claims":   {good, claims(`,"iss":"x","delegation":{}`), key, true},
		"RSA key":                  {good, cnf(fmt.Sprintf(`{"jwk":%s}`, jwkOf(mustKey(t, svid.RSA2048).Public(), "PS512"))), key, true},
		"P-521 key":                {good, cnf(fmt.Sprintf(`{"jwk":%s}`, jwkOf(p521(t).Public(), "ES512"))), key, true},
		"foreign":                  {`{"alg":"ES256","kid":"f","typ":"wit+jwt"}`, with("spiffe://other.example/x", bound, now+60, ""), foreign, true},
		"foreign subject, our key": {good, with("spiffe://other.example/x", bound, now+60, ""), key, false},
		"unknown trust domain":     {good, with("spiffe://third.example/x", bound, now+60, ""), key, false},
		"a key for JWT-SVIDs":      {`{"alg":"ES256","kid":"j","typ":"wit+jwt"}`, claims(""), key, false},
		"no typ":                   {`{"alg":"ES256","kid":"k"}`, claims(""), key, false},
		"typ of a JWT-SVID":        {`{"alg":"ES256","kid":"k","typ":"JWT"}`, claims(""), key, false},
		"typ in capitals":          {`{"alg":"ES256","kid":"k","typ":"WIT+JWT"}`, claims(""), key, false},
		"algorithm none":           {`{"alg":"none","kid":"k","typ":"wit+jwt"}`, claims(""), key, false},
		"algorithm of other key":   {`{"alg":"RS256","kid":"k","typ":"wit+jwt"}`, claims(""), key, false},
		"no kid":                   {`{"alg":"ES256","typ":"wit+jwt"}`, claims(""), key, false},
		"unknown kid":              {`{"alg":"ES256","kid":"K","typ":"wit+jwt"}`, claims(""), key, false},
		"critical header":          {`{"alg":"ES256","kid":"k","typ":"wit+jwt","crit":["b64"],"b64":false}`, claims(""), key, false},
		"wrong key":                {good, claims(""), foreign, false},
		"audience":                 {good, claims(`,"aud":"a"`), key, false},
		"audience null":            {good, claims(`,"aud":null`), key, false},
		"expired":                  {good, with("spiffe://example.org/x", bound, now-1, ""), key, false},
		"no exp":                   {good, fmt.Sprintf(`{"sub":"spiffe://example.org/x","cnf":%s}`, bound), key, false},
		"exp a string":             {good, with("spiffe://example.org/x", bound, `"9999999999"`, ""), key, false},
		"not yet valid":            {good, claims(fmt.Sprintf(`,"nbf":%d`, now+60)), key, false},
		"subject no SPIFFE ID":     {good, with("alice", bound, now+60, ""), key, false},
		"subject without path":     {good, with("spiffe://example.org", bound, now+60, ""), key, false},
		"no cnf":                   {good, fmt.Sprintf(`{"sub":"spiffe://example.org/x","exp":%d}`, now+60), key, false},
		"cnf without key":          {good, cnf(`{"jkt":"x"}`), key, false},
		"cnf no object":            {good, cnf(`[]`), key, false},
		"key no object":            {good, cnf(`{"jwk":"x"}`), key, false},
		"key without alg":          {good, cnf(fmt.Sprintf(`{"jwk":%s}`, jwkOf(holder.Public(), ""))), key, false},
		"key with another alg":     {good, cnf(fmt.Sprintf(`{"jwk":%s}`, jwkOf(holder.Public(), "ES384"))), key, false},
		"key with RSA's alg":       {good, cnf(fmt.Sprintf(`{"jwk":%s}`, jwkOf(holder.Public(), "RS256"))), key, false},
		"key with HS256":           {good, cnf(fmt.Sprintf(`{"jwk":%s}`, jwkOf([]byte("secret"), "HS256"))), key, false},
		"symmetric key":            {good, cnf(fmt.Sprintf(`{"jwk":%s}`, jwkOf([]byte("secret"), "ES256"))), key, false},
		"private key":              {good, cnf(fmt.Sprintf(`{"jwk":%s}`, jwkOf(holder, "ES256"))), key, false},
		"small RSA key":            {good, cnf(fmt.Sprintf(`{"jwk":%s}`, jwkOf(&small.PublicKey, "RS256"))), key, false},
		"point off the curve":      {good, cnf(`{"jwk":{"kty":"EC","crv":"P-256","alg":"ES256","x":"AA","y":"AA"}}`), key, false},
		"payload null":             {good, `null`, key, false},
	} {
		t.Run(name, func(t *testing.T) {
			b, err := svid.ValidateWIT(sign(t, tt.key, tt.header, tt.payload), bundles)
			if (err == nil) != tt.want {
				t.Fatalf("got %v, %v, want valid %v", b.ID, err, tt.want)
			}
			if err != nil && (b.Key != nil || !b.ID.IsZero() || b.Claims != nil) {
				t.Errorf("got %+v beside an error", b)
			}
		})
	}
	tok := sign(t, key, good, claims(""))
	parts := strings.Split(tok, ".")
	for name, bad := range map[string]string{
		"empty": "", "two parts": parts[0] + "." + parts[1], "four parts": tok + ".", "no signature": parts[0] + "." + parts[1] + ".",
		"long": sign(t, key, good, claims(`,"x":"`+strings.Repeat("x", 64<<10)+`"`)),
	} {
		if _, err := svid.ValidateWIT(bad, bundles); err == nil {
			t.Errorf("%s: got no error, want one", name)
		}
	}
}

func FuzzValidateWIT(f *testing.F) {
	key := mustKey(f, svid.ECP256)
	b := &svid.Bundles{Own: &svid.Bundle{TrustDomain: td, WITAuthorities: map[string]crypto.PublicKey{"k": key.Public()}}}
	a := newAuthority(f, svid.ECP256)
	tok, err := a.issuer.WIT(spiffeid.RequireFromPath(td, "/x"), key.Public(), 1e15)
	if err != nil {
		f.Fatal(err)
	}
	f.Add("wit+jwt", part2(tok.Compact))
	f.Add("wit+jwt", `{"sub":"spiffe://example.org/x","exp":99999999999,"cnf":{"jwk":{"kty":"RSA","alg":"PS256","n":"AA","e":"AQAB"}}}`)
	f.Add("wit+jwt", `{"sub":"spiffe://example.org/x","exp":1e400,"cnf":{"jwk":{"kty":"EC","crv":"P-256","alg":"ES256","x":"AA","y":"AA","x5c":["AA"]}}}`)
	f.Add("JWT", `{"cnf":null}`)
	f.Fuzz(func(t *testing.T, typ, payload string) {
		header, err := json.Marshal(map[string]string{"alg": "ES256", "kid": "k", "typ": typ})
		if err != nil {
			t.Skip()
		}
		got, err := svid.ValidateWIT(sign(t, key, string(header), payload), b)
		if err != nil {
			return
		}
		if got.ID.TrustDomain() != td || got.Key == nil || typ != "wit+jwt" {
			t.Errorf("got %+v by %q", got, payload)
		}
		if _, ok := got.Claims["aud"]; ok {
			t.Error("accepted with an audience")
		}
	})
}

// part2 is the claims of a token as they are written.
func part2(token string) string {
	data, _ := base64.RawURLEncoding.DecodeString(strings.Split(token, ".")[1])
	return string(data)
}

func witStale(c *svid.WITContext) bool {
	select {
	case <-c.Stale():
		return true
	default:
		return false
	}
}

func bind(t *testing.T, k *svid.Keeper, h svid.Holder, entries ...registry.Entry) *svid.WITContext {
	t.Helper()
	c, err := k.WIT(t.Context(), h, entries)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func TestKeeperBindsAKeyOfItsOwnToEach(t *testing.T) {
	inBubble(t, func(t *testing.T, a *authority, k *svid.Keeper, h svid.Holder, _ func()) {
		h2, end2 := holder(2)
		defer end2()
		all, _ := a.Bundles()
		keys := map[string]bool{}
		for _, h := range []svid.Holder{h, h2} {
			for _, x := range fetch(t, k, h, entry("a"), entry("b")).SVIDs {
				der, _ := x509.MarshalPKIXPublicKey(x.Signer.Public())
				keys[string(der)] = true
			}
			for i, w := range bind(t, k, h, entry("a"), entry("b")).SVIDs {
				b, err := svid.ValidateWIT(w.Token, all)
				if err != nil || b.ID != w.Entry.SPIFFEID || w.Entry.ID != []string{"a", "b"}[i] || !same(b.Key, w.Signer.Public()) {
					t.Errorf("got %+v, %v", b, err)
				}
				der, _ := x509.MarshalPKIXPublicKey(b.Key)
				keys[string(der)] = true
				text, err := w.KeyJWK()
				var jwk jose.JSONWebKey
				if err != nil || jwk.UnmarshalJSON(text) != nil || jwk.IsPublic() || jwk.Algorithm != "ES256" || !same(jwk.Public().Key, b.Key) {
					t.Errorf("got key %v, %v", jwk, err)
				}
			}
		}
		if len(keys) != 8 {
			t.Errorf("got %d keys for two holders with two entries in two forms, want 8", len(keys))
		}
	})
}

func TestKeeperRenewsWITsAtHalfLifeAndNotBefore(t *testing.T) {
	inBubble(t, func(t *testing.T, a *authority, k *svid.Keeper, h svid.Holder, _ func()) {
		c := bind(t, k, h, entry("a"), entry("b"))
		if again := bind(t, k, h, entry("a"), entry("b")); again != c || a.bound.Load() != 2 {
			t.Errorf("got another snapshot or %d signatures while nothing changed", a.bound.Load())
		}
		// A bundle that changes is no reason, nor is what X.509-SVIDs do.
		b, _ := a.Bundles()
		a.bundles.Store(&svid.Bundles{Own: b.Own, Federated: map[spiffeid.TrustDomain]*svid.Bundle{other: {TrustDomain: other}}})
		fetch(t, k, h, entry("a"))
		bubble.Wait()
		if witStale(c) {
			t.Error("stale although nothing of it changed")
		}
		start := time.Now()
		<-c.Stale()
		if d := time.Since(start); d < 27*time.Minute || d > 33*time.Minute {
			t.Errorf("stale after %v, want 30 min ± 10 %%", d)
		}
		next := bind(t, k, h, entry("a"), entry("b"))
		changed := 0
		for i := range next.SVIDs {
			if next.SVIDs[i].Signer != c.SVIDs[i].Signer {
				changed++
			}
		}
		if changed == 0 || witStale(next) {
			t.Errorf("%d keys changed, stale %v: want a new key in a fresh snapshot", changed, witStale(next))
		}
	})
}

func TestKeeperBindsAnewWhatTheEntryChanges(t *testing.T) {
	base := entry("a")
	for name, tt := range map[string]struct {
		change           func(*registry.Entry)
		snapshot, anyKey bool // changed
	}{
		"nothing":       {func(*registry.Entry) {}, false, false},
		"DNS names":     {func(e *registry.Entry) { e.DNSNames = []string{"x"} }, false, false},
		"SPIFFE ID":     {func(e *registry.Entry) { e.SPIFFEID = spiffeid.RequireFromPath(td, "/b") }, true, true},
		"TTL":           {func(e *registry.Entry) { e.X509TTL = time.Minute }, true, true},
		"another entry": {func(e *registry.Entry) { e.ID = "b" }, true, true},
		"hint":          {func(e *registry.Entry) { e.Hint = "h" }, true, false},
	} {
		t.Run(name, func(t *testing.T) {
			inBubble(t, func(t *testing.T, a *authority, k *svid.Keeper, h svid.Holder, _ func()) {
				c := bind(t, k, h, base)
				e := base
				tt.change(&e)
				next := bind(t, k, h, e)
				if got := next != c; got != tt.snapshot {
					t.Errorf("got new snapshot %v, want %v", got, tt.snapshot)
				}
				if got := next.SVIDs[0].Signer != c.SVIDs[0].Signer; got != tt.anyKey {
					t.Errorf("got new key %v, want %v", got, tt.anyKey)
				}
				if tt.snapshot && (!witStale(c) || next.SVIDs[0].Entry.Hint != e.Hint) {
					t.Error("the snapshot before is not stale, or the next has not its hint")
				}
			})
		})
	}
}

func TestKeeperKeepsTheGoodWITWhenRenewalFails(t *testing.T) {
	inBubble(t, func(t *testing.T, a *authority, k *svid.Keeper, h svid.Holder, _ func()) {
		c := bind(t, k, h, entry("a"))
		expires := c.SVIDs[0].Expires
		a.fail(errDown)
		tries := 0
		for ; ; tries++ {
			<-c.Stale()
			next, err := k.WIT(t.Context(), h, []registry.Entry{entry("a")})
			if err != nil {
				if !errors.Is(err, errDown) || time.Now().Before(expires) {
					t.Fatalf("got %v at %v, want the server's error from %v on", err, time.Now(), expires)
				}
				break
			}
			if next == c || next.SVIDs[0].Signer != c.SVIDs[0].Signer {
				t.Fatal("got the stale snapshot or another key")
			}
			c = next
		}
		if tries < 25 || tries > 45 {
			t.Errorf("got %d tries in half an hour, want about 35", tries)
		}
		a.fail(nil)
		if got := bind(t, k, h, entry("a")); got.SVIDs[0].Signer == c.SVIDs[0].Signer {
			t.Error("got the expired SVID, want a new one")
		}
		// What was issued beside a failure is kept.
		bad := entry("bad")
		bad.SPIFFEID = spiffeid.RequireFromPath(other, "/x")
		before := a.bound.Load()
		for range 3 {
			if _, err := k.WIT(t.Context(), h, []registry.Entry{entry("b"), bad}); err == nil {
				t.Fatal("got no error, want one")
			}
		}
		if n := a.bound.Load() - before; n != 1 {
			t.Errorf("got %d signatures, want 1", n)
		}
	})
}

func TestKeeperDropsWITsWithTheirHolder(t *testing.T) {
	inBubble(t, func(t *testing.T, a *authority, k *svid.Keeper, h svid.Holder, end func()) {
		a.gate = make(chan struct{}, 1)
		a.gate <- struct{}{}
		c := bind(t, k, h, entry("a"))
		var wg sync.WaitGroup
		wg.Go(func() { // one that is signed meanwhile
			if _, err := k.WIT(t.Context(), h, []registry.Entry{entry("b")}); !errors.Is(err, svid.ErrGone) {
				t.Errorf("got %v, want ErrGone", err)
			}
		})
		bubble.Wait()
		end()
		<-c.Stale()
		bubble.Wait()
		a.gate <- struct{}{}
		wg.Wait()
		if svid.Holders(k) != 0 {
			t.Errorf("got %d holders, want none", svid.Holders(k))
		}
		if _, err := k.WIT(t.Context(), h, []registry.Entry{entry("a")}); !errors.Is(err, svid.ErrGone) {
			t.Errorf("got %v, want ErrGone", err)
		}
	})
}

func TestKeeperBindsOnceForManyCallers(t *testing.T) {
	inBubble(t, func(t *testing.T, a *authority, k *svid.Keeper, h svid.Holder, _ func()) {
		a.gate = make(chan struct{})
		var wg sync.WaitGroup
		for range 50 {
			wg.Go(func() { bind(t, k, h, entry("a")) })
		}
		a.gate <- struct{}{}
		close(a.gate)
		wg.Wait()
		if n := a.bound.Load(); n != 1 {
			t.Errorf("got %d signatures, want 1", n)
		}
	})
}

// An authority that signs none says so, and serves the rest.
func TestKeeperWithoutWITs(t *testing.T) {
	inBubble(t, func(t *testing.T, a *authority, _ *svid.Keeper, h svid.Holder, _ func()) {
		k := svid.NewKeeper(struct{ svid.Authority }{a}, svid.KeeperOptions{})
		if _, err := k.WIT(t.Context(), h, []registry.Entry{entry("a")}); !errors.Is(err, svid.ErrNotReady) {
			t.Errorf("got %v, want ErrNotReady", err)
		}
		fetch(t, k, h, entry("a"))
	})
}
