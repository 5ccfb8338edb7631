package svid

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

const (
	// maxToken bounds what is parsed; a token that a header can carry is far
	// smaller.
	maxToken = 64 << 10
	// leeway is for an issuer whose clock is ahead. None is given to a token
	// that has expired.
	leeway = 10 * time.Second
)

// Validate checks a JWT-SVID for this audience by all rules of JWT-SVID §2 to
// §4, the signature by the bundle of the trust domain that the subject names
// and no other; ErrNoBundle says that there is none. It returns the subject and all claims; numbers are json.Number,
// so none is changed.
func Validate(token, audience string, bundles *Bundles) (spiffeid.ID, map[string]any, error) {
	id, claims, err := validate(token, audience, bundles, time.Now())
	if err != nil {
		return spiffeid.ID{}, nil, fmt.Errorf("validate JWT-SVID: %w", err)
	}
	return id, claims, nil
}

func validate(token, audience string, bundles *Bundles, now time.Time) (spiffeid.ID, map[string]any, error) {
	none := spiffeid.ID{}
	if audience == "" {
		return none, nil, errors.New("no audience to check for")
	}
	t, err := parseJWS(token)
	if err != nil {
		return none, nil, err
	}
	alg, keyID, err := checkHeader(t)
	if err != nil {
		return none, nil, err
	}
	id, bundle, err := t.subject(bundles)
	if err != nil {
		return none, nil, err
	}
	if err := t.verify(alg, keyID, bundle.JWTAuthorities, id); err != nil {
		return none, nil, err
	}
	if err := checkAudience(t.claims["aud"], audience); err != nil {
		return none, nil, err
	}
	if err := checkTimes(t.claims, now, "nbf", "iat"); err != nil {
		return none, nil, err
	}
	return id, t.claims, nil
}

// strict refuses what a second encoding of the same bytes would be.
var strict = base64.RawURLEncoding.Strict()

// checkHeader accepts alg, kid and typ and nothing else (JWT-SVID §2): a
// parameter that it would pass over could change what the signature means.
func checkHeader(t *jws) (jwtAlgorithm, string, error) {
	for name := range t.header {
		if name != "alg" && name != "kid" && name != "typ" {
			return jwtAlgorithm{}, "", fmt.Errorf("header parameter %q is not allowed", name)
		}
	}
	if typ, ok := t.header["typ"]; ok && typ != "JWT" && typ != "JOSE" {
		return jwtAlgorithm{}, "", errors.New("header typ is neither JWT nor JOSE")
	}
	return t.algorithm()
}

func parseObject(part string) (map[string]any, error) {
	data, err := strict.DecodeString(part)
	if err != nil {
		return nil, errors.New("not base64url")
	}
	d := json.NewDecoder(bytes.NewReader(data))
	d.UseNumber()
	var o map[string]any
	if err := d.Decode(&o); err != nil || o == nil {
		return nil, errors.New("not a JSON object")
	}
	if _, err := d.Token(); err != io.EOF {
		return nil, errors.New("something follows the JSON object")
	}
	return o, nil
}

// checkAudience takes one audience as a string, and several as an array.
func checkAudience(aud any, want string) error {
	switch aud := aud.(type) {
	case string:
		if aud == want {
			return nil
		}
	case []any:
		for _, a := range aud {
			if _, ok := a.(string); !ok {
				return errors.New("claim aud: not all are strings")
			}
		}
		if slices.Contains(aud, any(want)) {
			return nil
		}
	default:
		return errors.New("claim aud: none")
	}
	return errors.New("token is not for this audience")
}

// checkTimes wants an end that lies ahead, and beginnings, where they are there,
// that do not.
func checkTimes(claims map[string]any, now time.Time, beginnings ...string) error {
	at := float64(now.UnixNano()) / 1e9
	exp, ok, err := numericDate(claims, "exp")
	switch {
	case err != nil:
		return err
	case !ok:
		return errors.New("claim exp: none")
	case at >= exp:
		return errors.New("token has expired")
	}
	for _, name := range beginnings {
		t, ok, err := numericDate(claims, name)
		if err != nil {
			return err
		}
		if ok && t > at+leeway.Seconds() {
			return fmt.Errorf("claim %s: lies in the future", name)
		}
	}
	return nil
}

func numericDate(claims map[string]any, name string) (float64, bool, error) {
	v, ok := claims[name]
	if !ok {
		return 0, false, nil
	}
	n, ok := v.(json.Number)
	if !ok {
		return 0, false, fmt.Errorf("claim %s: not a number", name)
	}
	f, err := n.Float64()
	if err != nil || math.IsNaN(f) || math.IsInf(f, 0) {
		return 0, false, fmt.Errorf("claim %s: out of range", name)
	}
	return f, true, nil
}
