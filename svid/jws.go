package svid

import (
	"cmp"
	"crypto"
	"crypto/ecdsa"
	"crypto/rand"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// maxSignature is room for that of an RSA key of 4096 bits.
const maxSignature = 512

// A Token is a signed JWT- or WIT-SVID with its times.
type Token struct {
	Compact string // JWS compact form
	Issued  time.Time
	Expires time.Time
}

type jwtHeader struct {
	Algorithm string `json:"alg"`
	KeyID     string `json:"kid"`
	Type      string `json:"typ"`
}

type jwtClaims struct {
	Audience []string `json:"aud"`
	Expires  int64    `json:"exp"`
	Issued   int64    `json:"iat"`
	Issuer   string   `json:"iss,omitempty"`
	ID       string   `json:"jti"`
	Subject  string   `json:"sub"`
}

// A tokenSigner signs tokens of one type with one key.
type tokenSigner struct {
	key    crypto.Signer
	until  time.Time // no token outlives it
	alg    jwtAlgorithm
	header string // of every token, encoded
}

func newTokenSigner(typ string, key crypto.Signer, keyID string, until time.Time) (tokenSigner, error) {
	alg, err := algorithmFor(key.Public())
	if err != nil {
		return tokenSigner{}, err
	}
	header, err := json.Marshal(jwtHeader{Algorithm: alg.name, KeyID: keyID, Type: typ})
	if err != nil {
		return tokenSigner{}, err
	}
	return tokenSigner{key, until, alg, base64.RawURLEncoding.EncodeToString(header) + "."}, nil
}

// token signs the claims that are made for its times.
func (s *tokenSigner) token(id spiffeid.ID, ttl time.Duration, claims func(Token) ([]byte, error)) (Token, error) {
	now := time.Now()
	t := Token{Issued: seconds(now), Expires: seconds(now.Add(ttl))}
	if until := seconds(s.until); t.Expires.After(until) {
		t.Expires = until
	}
	if !t.Expires.After(now) {
		return Token{}, fmt.Errorf("sign token for %s: the key ends at %s: %w", id, s.until.Format(time.RFC3339), ErrNotReady)
	}
	payload, err := claims(t)
	if err != nil {
		return Token{}, fmt.Errorf("sign token for %s: %w", id, err)
	}
	enc := base64.RawURLEncoding
	buf := make([]byte, 0, len(s.header)+enc.EncodedLen(len(payload))+1+enc.EncodedLen(cmp.Or(2*s.alg.half, maxSignature)))
	buf = append(buf, s.header...)
	buf = enc.AppendEncode(buf, payload)
	sig, err := s.alg.sign(s.key, buf)
	if err != nil {
		return Token{}, fmt.Errorf("sign token for %s: %w", id, err)
	}
	buf = append(buf, '.')
	t.Compact = string(enc.AppendEncode(buf, sig))
	return t, nil
}

func (a jwtAlgorithm) sign(key crypto.Signer, signed []byte) ([]byte, error) {
	sum := a.digest(signed)
	k, ok := key.(*ecdsa.PrivateKey)
	if !ok {
		return key.Sign(rand.Reader, sum, a.opts())
	}
	r, s, err := ecdsa.Sign(rand.Reader, k, sum)
	if err != nil {
		return nil, err
	}
	sig := make([]byte, 2*a.half)
	r.FillBytes(sig[:a.half])
	s.FillBytes(sig[a.half:])
	return sig, nil
}

// A jws is a token in its parts, of which nothing is believed yet.
type jws struct {
	header, claims map[string]any
	signed, sig    []byte
}

func parseJWS(token string) (*jws, error) {
	if len(token) > maxToken {
		return nil, fmt.Errorf("token is longer than %d bytes", maxToken)
	}
	headerPart, rest, ok := strings.Cut(token, ".")
	payloadPart, sigPart, ok2 := strings.Cut(rest, ".")
	if !ok || !ok2 || strings.Contains(sigPart, ".") {
		return nil, errors.New("token is not in JWS compact form")
	}
	header, err := parseObject(headerPart)
	if err != nil {
		return nil, fmt.Errorf("header: %w", err)
	}
	claims, err := parseObject(payloadPart)
	if err != nil {
		return nil, fmt.Errorf("payload: %w", err)
	}
	sig, err := strict.DecodeString(sigPart)
	if err != nil {
		return nil, errors.New("signature is not base64url")
	}
	return &jws{header, claims, []byte(token[:len(headerPart)+1+len(payloadPart)]), sig}, nil
}

// algorithm returns what the header says that the token is signed with.
func (t *jws) algorithm() (alg jwtAlgorithm, keyID string, err error) {
	name, _ := t.header["alg"].(string)
	alg, ok := algorithms[name]
	if !ok {
		return alg, "", errors.New("header alg is none that an SVID may have")
	}
	if keyID, _ = t.header["kid"].(string); keyID == "" {
		return alg, "", errors.New("header has no kid")
	}
	return alg, keyID, nil
}

// subject returns whom the token is about, and the bundle of the trust domain
// that it names, by which alone it can be verified.
func (t *jws) subject(bundles *Bundles) (spiffeid.ID, *Bundle, error) {
	sub, _ := t.claims["sub"].(string)
	id, err := spiffeid.FromString(sub)
	if err != nil {
		return spiffeid.ID{}, nil, fmt.Errorf("claim sub: %w", err)
	}
	if id.Path() == "" {
		return spiffeid.ID{}, nil, errors.New("claim sub: the ID has no path, so it is no workload's")
	}
	bundle, ok := bundles.Of(id.TrustDomain())
	if !ok {
		return spiffeid.ID{}, nil, fmt.Errorf("%s: %w", id.TrustDomain(), ErrNoBundle)
	}
	return id, bundle, nil
}

// verify checks the signature by the key of this ID among the keys.
func (t *jws) verify(alg jwtAlgorithm, keyID string, keys map[string]crypto.PublicKey, id spiffeid.ID) error {
	key, ok := keys[keyID]
	if !ok {
		return fmt.Errorf("trust domain %s has no key with this key ID", id.TrustDomain())
	}
	return alg.verify(key, t.signed, t.sig)
}
