package svid_test

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/rand"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/deputy-id/deputy/svid"
)

// sign makes a token of any header and payload, in ES256.
func sign(t testing.TB, key crypto.Signer, header, payload string) string {
	t.Helper()
	enc := base64.RawURLEncoding.EncodeToString
	signed := enc([]byte(header)) + "." + enc([]byte(payload))
	h := crypto.SHA256.New()
	h.Write([]byte(signed))
	r, s, err := ecdsa.Sign(rand.Reader, key.(*ecdsa.PrivateKey), h.Sum(nil))
	if err != nil {
		t.Fatal(err)
	}
	sig := make([]byte, 64)
	r.FillBytes(sig[:32])
	s.FillBytes(sig[32:])
	return signed + "." + enc(sig)
}

func TestValidate(t *testing.T) {
	key, foreign := mustKey(t, svid.ECP256), mustKey(t, svid.ECP256)
	bundles := &svid.Bundles{
		Own: &svid.Bundle{TrustDomain: td, JWTAuthorities: map[string]crypto.PublicKey{"k": key.Public()}},
		Federated: map[spiffeid.TrustDomain]*svid.Bundle{
			other: {TrustDomain: other, JWTAuthorities: map[string]crypto.PublicKey{"f": foreign.Public()}},
		},
	}
	now := time.Now().Unix()
	const good = `{"alg":"ES256","kid":"k","typ":"JWT"}`
	claims := func(more string) string {
		return fmt.Sprintf(`{"sub":"spiffe://example.org/x","aud":["a","b"],"exp":%d%s}`, now+60, more)
	}
	with := func(sub, aud string, exp any) string {
		return fmt.Sprintf(`{"sub":%q,"aud":%s,"exp":%v}`, sub, aud, exp)
	}
	for name, tt := range map[string]struct {
		header, payload string
		key             crypto.Signer
		want            bool
	}{
		"good":                      {good, claims(""), key, true},
		"no typ":                    {`{"alg":"ES256","kid":"k"}`, claims(""), key, true},
		"typ JOSE":                  {`{"alg":"ES256","kid":"k","typ":"JOSE"}`, claims(""), key, true},
		"one audience as a string":  {good, with("spiffe://example.org/x", `"a"`, now+60), key, true},
		"exp with a fraction":       {good, with("spiffe://example.org/x", `"a"`, fmt.Sprintf("%d.5", now+60)), key, true},
		"iat a little ahead":        {good, claims(fmt.Sprintf(`,"iat":%d`, now+5)), key, true},
		"foreign":                   {`{"alg":"ES256","kid":"f"}`, with("spiffe://other.example/x", `"a"`, now+60), foreign, true},
		"foreign subject, our key":  {good, with("spiffe://other.example/x", `"a"`, now+60), key, false},
		"our subject, foreign key":  {`{"alg":"ES256","kid":"f"}`, claims(""), foreign, false},
		"unknown trust domain":      {good, with("spiffe://third.example/x", `"a"`, now+60), key, false},
		"typ of an access token":    {`{"alg":"ES256","kid":"k","typ":"at+jwt"}`, claims(""), key, false},
		"typ that is no string":     {`{"alg":"ES256","kid":"k","typ":1}`, claims(""), key, false},
		"algorithm none":            {`{"alg":"none","kid":"k"}`, claims(""), key, false},
		"algorithm EdDSA":           {`{"alg":"EdDSA","kid":"k"}`, claims(""), key, false},
		"algorithm of other key":    {`{"alg":"RS256","kid":"k"}`, claims(""), key, false},
		"algorithm of other curve":  {`{"alg":"ES384","kid":"k"}`, claims(""), key, false},
		"algorithm misspelled":      {`{"ALG":"ES256","kid":"k"}`, claims(""), key, false},
		"no kid":                    {`{"alg":"ES256"}`, claims(""), key, false},
		"unknown kid":               {`{"alg":"ES256","kid":"x"}`, claims(""), key, false},
		"critical header":           {`{"alg":"ES256","kid":"k","crit":["b64"],"b64":false}`, claims(""), key, false},
		"key in header":             {`{"alg":"ES256","kid":"k","jwk":{}}`, claims(""), key, false},
		"header null":               {`null`, claims(""), key, false},
		"two headers":               {good + good, claims(""), key, false},
		"wrong key":                 {good, claims(""), foreign, false},
		"another audience":          {good, with("spiffe://example.org/x", `["c"]`, now+60), key, false},
		"audience not all strings":  {good, with("spiffe://example.org/x", `["a",1]`, now+60), key, false},
		"no audience":               {good, fmt.Sprintf(`{"sub":"spiffe://example.org/x","exp":%d}`, now+60), key, false},
		"expired":                   {good, with("spiffe://example.org/x", `"a"`, now-1), key, false},
		"no exp":                    {good, `{"sub":"spiffe://example.org/x","aud":"a"}`, key, false},
		"exp null":                  {good, with("spiffe://example.org/x", `"a"`, "null"), key, false},
		"exp a string":              {good, with("spiffe://example.org/x", `"a"`, `"9999999999"`), key, false},
		"exp beyond all floats":     {good, with("spiffe://example.org/x", `"a"`, "1e999"), key, false},
		"not yet valid":             {good, claims(fmt.Sprintf(`,"nbf":%d`, now+60)), key, false},
		"issued in the future":      {good, claims(fmt.Sprintf(`,"iat":%d`, now+60)), key, false},
		"subject no SPIFFE ID":      {good, with("alice", `"a"`, now+60), key, false},
		"subject without path":      {good, with("spiffe://example.org", `"a"`, now+60), key, false},
		"payload null":              {good, `null`, key, false},
		"payload with a tail":       {good, claims("") + "1", key, false},
		"larger than any header is": {good, claims(`,"x":"` + strings.Repeat("x", 64<<10) + `"`), key, false},
	} {
		t.Run(name, func(t *testing.T) {
			id, got, err := svid.Validate(sign(t, tt.key, tt.header, tt.payload), "a", bundles)
			if (err == nil) != tt.want {
				t.Fatalf("got %v, %v, want valid %v", id, err, tt.want)
			}
			if err != nil && (got != nil || !id.IsZero()) {
				t.Errorf("got %v, %v beside an error", id, got)
			}
		})
	}
	tok := sign(t, key, good, claims(`,"n":9007199254740993`))
	_, got, err := svid.Validate(tok, "a", bundles)
	if err != nil || got["n"] != json.Number("9007199254740993") {
		t.Errorf("got n = %v, %v, want the number unchanged", got["n"], err)
	}
	parts := strings.Split(tok, ".")
	last := parts[2][len(parts[2])-1]
	for name, bad := range map[string]string{
		"empty": "", "two parts": parts[0] + "." + parts[1], "four parts": tok + ".", "no signature": parts[0] + "." + parts[1] + ".",
		"padded": tok + "==", "line break": parts[0] + ".\n" + parts[1] + "." + parts[2],
		// The last character of 86 carries four bits that must be zero.
		"signature in another encoding": tok[:len(tok)-1] + string(last+1),
	} {
		if _, _, err := svid.Validate(bad, "a", bundles); err == nil {
			t.Errorf("%s: got no error, want one", name)
		}
	}
	if _, _, err := svid.Validate(tok, "", bundles); err == nil {
		t.Error("empty audience: got no error, want one")
	}
}

func TestValidateTakesEveryAlgorithmOfTheStandard(t *testing.T) {
	keys := map[jose.SignatureAlgorithm]crypto.Signer{
		jose.ES256: mustKey(t, svid.ECP256), jose.ES384: mustKey(t, svid.ECP384), jose.ES512: p521(t),
	}
	for _, alg := range svid.SignatureAlgorithms {
		key, ok := keys[alg]
		if !ok {
			if keys["RSA"] == nil {
				keys["RSA"] = mustKey(t, svid.RSA2048)
			}
			key = keys["RSA"]
		}
		s, err := jose.NewSigner(jose.SigningKey{Algorithm: alg, Key: jose.JSONWebKey{Key: key, KeyID: "k"}}, nil)
		if err != nil {
			t.Fatal(err)
		}
		jws, err := s.Sign(fmt.Appendf(nil, `{"sub":"spiffe://example.org/x","aud":"a","exp":%d}`, time.Now().Unix()+60))
		if err != nil {
			t.Fatal(err)
		}
		tok, err := jws.CompactSerialize()
		if err != nil {
			t.Fatal(err)
		}
		b := &svid.Bundles{Own: &svid.Bundle{TrustDomain: td, JWTAuthorities: map[string]crypto.PublicKey{"k": key.Public()}}}
		if _, _, err := svid.Validate(tok, "a", b); err != nil {
			t.Errorf("%s: %v", alg, err)
		}
	}
}

func FuzzValidate(f *testing.F) {
	key := mustKey(f, svid.ECP256)
	b := &svid.Bundles{Own: &svid.Bundle{TrustDomain: td, JWTAuthorities: map[string]crypto.PublicKey{"k": key.Public()}}}
	f.Add(sign(f, key, `{"alg":"ES256","kid":"k"}`, `{"sub":"spiffe://example.org/x","aud":"a","exp":99999999999}`))
	f.Add(sign(f, key, `{"alg":"RS256","kid":"k"}`, `{"sub":"spiffe://example.org/x","aud":["a",1],"exp":1e400}`))
	f.Add("..")
	f.Fuzz(func(t *testing.T, token string) {
		id, _, err := svid.Validate(token, "a", b)
		if err == nil && id.TrustDomain() != td {
			t.Errorf("got %v", id)
		}
	})
}
