package svid

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/rsa"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/deputy-id/deputy/svid/registry"
)

// witType is the type of every WIT-SVID's header (WIT-SVID §2.2). A JWT-SVID
// may not have it, and so neither can be taken for the other.
const witType = "wit+jwt"

// WIT is a WIT-SVID with its key: a token that is worth something only beside
// a proof that its bearer has the key.
type WIT struct {
	Entry   registry.Entry // the one that it was issued under
	Token   string
	Expires time.Time
	Signer  crypto.Signer
}

// KeyJWK returns the private key as a JWK, with the algorithm that the token
// says it signs with.
func (w WIT) KeyJWK() ([]byte, error) {
	alg, err := algorithmFor(w.Signer.Public())
	if err != nil {
		return nil, err
	}
	return jose.JSONWebKey{Key: w.Signer, Algorithm: alg.name}.MarshalJSON()
}

type witClaims struct {
	Confirmation struct {
		Key jose.JSONWebKey `json:"jwk"`
	} `json:"cnf"`
	Expires int64  `json:"exp"`
	Issued  int64  `json:"iat"`
	ID      string `json:"jti"`
	Begins  int64  `json:"nbf"`
	Subject string `json:"sub"`
}

// WIT returns a new WIT-SVID that binds the ID to a public key. Like JWT's its
// life ends with the signing key's, and an issuer without one is not ready. It
// has no issuer, which an OpenID Connect relying party would look for, and no
// audience.
func (i *Issuer) WIT(id spiffeid.ID, pub crypto.PublicKey, ttl time.Duration) (Token, error) {
	if err := i.check(id); err != nil {
		return Token{}, err
	}
	if i.wit.key == nil {
		return Token{}, fmt.Errorf("sign token for %s: no WIT key: %w", id, ErrNotReady)
	}
	alg, err := algorithmFor(pub)
	if err == nil {
		err = checkSize(pub)
	}
	if err != nil {
		return Token{}, fmt.Errorf("sign token for %s: %w", id, err)
	}
	return i.wit.token(id, ttl, func(t Token) ([]byte, error) {
		c := witClaims{
			Expires: t.Expires.Unix(),
			Issued:  t.Issued.Unix(),
			ID:      rand.Text(),
			Begins:  t.Issued.Add(-backdate).Unix(),
			Subject: id.String(),
		}
		c.Confirmation.Key = jose.JSONWebKey{Key: pub, Algorithm: alg.name}
		return json.Marshal(c)
	})
}

// checkSize refuses RSA keys that are too small to trust or too large to bear.
func checkSize(pub crypto.PublicKey) error {
	if k, ok := pub.(*rsa.PublicKey); ok && (k.N.BitLen() < 2048 || k.N.BitLen() > 8192) {
		return fmt.Errorf("RSA key of %d bits, want 2048 to 8192", k.N.BitLen())
	}
	return nil
}

// A Binding is what a valid WIT-SVID says: that the holder of the key has the
// ID. Whoever showed the token has it only if a proof by that key, in that
// algorithm, came with it.
type Binding struct {
	ID        spiffeid.ID
	Key       crypto.PublicKey
	Algorithm jose.SignatureAlgorithm
	Claims    map[string]any // all; numbers are json.Number
}

// ValidateWIT checks a WIT-SVID by the rules of WIT-SVID §2 to §4, save one
// that is left to the caller: it must not accept the token without a proof of
// possession of the key (§5), such as a WIMSE Workload Proof Token or an HTTP
// message signature. The token alone proves nothing: it is shown to each peer.
//
// The signature is checked as Validate does, by the WIT keys of the trust domain
// that the subject names.
func ValidateWIT(token string, bundles *Bundles) (Binding, error) {
	b, err := validateWIT(token, bundles, time.Now())
	if err != nil {
		return Binding{}, fmt.Errorf("validate WIT-SVID: %w", err)
	}
	return b, nil
}

func validateWIT(token string, bundles *Bundles, now time.Time) (Binding, error) {
	t, err := parseJWS(token)
	if err != nil {
		return Binding{}, err
	}
	// Unknown parameters are passed over, unless they must not be (§2.3).
	if _, ok := t.header["crit"]; ok {
		return Binding{}, errors.New("header has critical parameters")
	}
	if t.header["typ"] != witType {
		return Binding{}, fmt.Errorf("header typ is not %s", witType)
	}
	alg, keyID, err := t.algorithm()
	if err != nil {
		return Binding{}, err
	}
	id, bundle, err := t.subject(bundles)
	if err != nil {
		return Binding{}, err
	}
	if err := t.verify(alg, keyID, bundle.WITAuthorities, id); err != nil {
		return Binding{}, err
	}
	if _, ok := t.claims["aud"]; ok {
		return Binding{}, errors.New("claim aud: a WIT-SVID has none")
	}
	// iat says nothing of when it begins (§3.5).
	if err := checkTimes(t.claims, now, "nbf"); err != nil {
		return Binding{}, err
	}
	key, name, err := confirmed(t.claims)
	if err != nil {
		return Binding{}, fmt.Errorf("claim cnf: %w", err)
	}
	return Binding{ID: id, Key: key, Algorithm: name, Claims: t.claims}, nil
}

// confirmed returns the public key that the claims bind, and what it signs with.
func confirmed(claims map[string]any) (crypto.PublicKey, jose.SignatureAlgorithm, error) {
	cnf, _ := claims["cnf"].(map[string]any)
	object, ok := cnf["jwk"].(map[string]any)
	if !ok {
		return nil, "", errors.New("no jwk")
	}
	name, _ := object["alg"].(string)
	alg, ok := algorithms[name]
	if !ok {
		return nil, "", errors.New("jwk has no alg that an SVID may have")
	}
	data, err := json.Marshal(object)
	if err != nil {
		return nil, "", err
	}
	var jwk jose.JSONWebKey
	if err := jwk.UnmarshalJSON(data); err != nil {
		return nil, "", errors.New("jwk cannot be read")
	}
	if !jwk.Valid() || !jwk.IsPublic() {
		return nil, "", errors.New("jwk is no public key")
	}
	switch k := jwk.Key.(type) {
	case *ecdsa.PublicKey:
		ok = alg.curve == k.Curve
	case *rsa.PublicKey:
		ok = alg.curve == nil
		err = checkSize(k)
	default:
		ok = false
	}
	switch {
	case !ok:
		return nil, "", errors.New("jwk is of another kind than its alg")
	case err != nil:
		return nil, "", err
	}
	return jwk.Key, jose.SignatureAlgorithm(name), nil
}
