package svid

import (
	"bytes"
	"crypto"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"
	"unicode/utf8"

	"github.com/go-jose/go-jose/v4"
	josejson "github.com/go-jose/go-jose/v4/json" // is case-sensitive and refuses a name that is there twice
	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// encodings are what the messages need of a bundle, computed once for the
// thousands of streams that share it.
type encodings struct {
	once     sync.Once
	der      []byte
	jwt, wit keySet
}

// A keySet is a JWK Set, or why there is none.
type keySet struct {
	jwks []byte
	err  error
}

// DER returns the X.509 authorities as concatenated DER. The caller must not
// change the bytes.
func (b *Bundle) DER() []byte {
	b.encoded.once.Do(b.encode)
	return b.encoded.der
}

// JWKS returns the JWT authorities alone as a JWK Set, in the order of their
// key IDs, each for the use jwt-svid. The caller must not change the bytes.
func (b *Bundle) JWKS() ([]byte, error) {
	b.encoded.once.Do(b.encode)
	return b.encoded.jwt.jwks, b.encoded.jwt.err
}

// WITs is JWKS of the WIT authorities, each for the use wit-svid.
func (b *Bundle) WITs() ([]byte, error) {
	b.encoded.once.Do(b.encode)
	return b.encoded.wit.jwks, b.encoded.wit.err
}

func (b *Bundle) encode() {
	for _, c := range b.X509Authorities {
		b.encoded.der = append(b.encoded.der, c.Raw...)
	}
	b.encoded.jwt = b.keySet("jwt-svid", b.JWTAuthorities)
	b.encoded.wit = b.keySet("wit-svid", b.WITAuthorities)
}

func (b *Bundle) keySet(use string, keys map[string]crypto.PublicKey) (s keySet) {
	set := jose.JSONWebKeySet{Keys: []jose.JSONWebKey{}}
	for _, id := range slices.Sorted(maps.Keys(keys)) {
		set.Keys = append(set.Keys, jose.JSONWebKey{Key: keys[id], KeyID: id, Use: use})
	}
	if s.jwks, s.err = json.Marshal(set); s.err != nil {
		s.err = fmt.Errorf("encode %s keys of %s: %w", use, b.TrustDomain, s.err)
	}
	return s
}

// SPIFFE returns the bundle as go-spiffe's, a copy that the caller owns.
func (b *Bundle) SPIFFE() *spiffebundle.Bundle {
	s := spiffebundle.New(b.TrustDomain)
	s.SetX509Authorities(b.X509Authorities)
	s.SetJWTAuthorities(b.JWTAuthorities)
	s.SetWITAuthorities(b.WITAuthorities)
	if b.RefreshHint > 0 {
		s.SetRefreshHint(b.RefreshHint)
	}
	if b.Sequence > 0 {
		s.SetSequenceNumber(b.Sequence)
	}
	return s
}

// FromSPIFFE returns go-spiffe's bundle as one of ours.
func FromSPIFFE(s *spiffebundle.Bundle) *Bundle {
	b := &Bundle{
		TrustDomain:     s.TrustDomain(),
		X509Authorities: s.X509Authorities(),
		JWTAuthorities:  s.JWTAuthorities(),
		WITAuthorities:  s.WITAuthorities(),
	}
	b.RefreshHint, _ = s.RefreshHint()
	b.Sequence, _ = s.SequenceNumber()
	return b
}

// Marshal returns the bundle in SPIFFE's format: a JWK Set with
// spiffe_sequence and spiffe_refresh_hint.
func (b *Bundle) Marshal() ([]byte, error) {
	if len(b.X509Authorities)+len(b.JWTAuthorities)+len(b.WITAuthorities) > 0 {
		return b.SPIFFE().Marshal()
	}
	// go-spiffe writes null for no keys, which nobody may read: a bundle that
	// trusts nobody has an empty array (SPIFFE Trust Domain and Bundle §4.1.3).
	return json.Marshal(struct {
		Keys     []int  `json:"keys"`
		Sequence uint64 `json:"spiffe_sequence,omitempty"`
		Hint     int64  `json:"spiffe_refresh_hint,omitempty"`
	}{Keys: []int{}, Sequence: b.Sequence, Hint: int64(b.RefreshHint / time.Second)})
}

// maxHint is the longest refresh hint that is kept: a year, so that no sum of
// times overflows.
const maxHint = 365 * 24 * time.Hour

// ParseBundle reads SPIFFE's format (SPIFFE Trust Domain and Bundle §4). Keys of
// a type, or for a use, that it does not know are left out, and so are those
// without a certificate for X.509; a document without keys is an error, while an
// empty list of them is a bundle that trusts nobody. Names are held against the
// standard's letter by letter, and none may be there twice.
func ParseBundle(td spiffeid.TrustDomain, data []byte) (*Bundle, error) {
	b, err := parseBundle(td, data)
	if err != nil {
		return nil, fmt.Errorf("parse bundle of %s: %w", td, err)
	}
	return b, nil
}

func parseBundle(td spiffeid.TrustDomain, data []byte) (*Bundle, error) {
	var doc struct {
		Keys     []json.RawMessage `json:"keys"`
		Sequence uint64            `json:"spiffe_sequence"`
		Hint     float64           `json:"spiffe_refresh_hint"`
	}
	if !utf8.Valid(data) {
		return nil, errors.New("is not UTF-8")
	}
	if err := josejson.Unmarshal(data, &doc); err != nil {
		return nil, err
	}
	if doc.Keys == nil {
		return nil, errors.New("has no keys")
	}
	b := &Bundle{
		TrustDomain:    td,
		Sequence:       doc.Sequence,
		JWTAuthorities: make(map[string]crypto.PublicKey),
		WITAuthorities: make(map[string]crypto.PublicKey),
	}
	if doc.Hint > 0 {
		b.RefreshHint = time.Duration(min(doc.Hint, maxHint.Seconds())) * time.Second
	}
	for i, raw := range doc.Keys {
		if err := b.addKey(raw); err != nil {
			return nil, fmt.Errorf("key %d: %w", i+1, err)
		}
	}
	return b, nil
}

// addKey adds what one element of keys stands for, if it is known.
func (b *Bundle) addKey(raw []byte) error {
	var about struct {
		Type  string   `json:"kty"`
		Use   string   `json:"use"`
		Curve string   `json:"crv"`
		Chain []string `json:"x5c"`
	}
	if err := josejson.Unmarshal(raw, &about); err != nil {
		return err
	}
	switch {
	case !slices.Contains([]string{"x509-svid", "jwt-svid", "wit-svid"}, about.Use):
		return nil
	case about.Use == "x509-svid" && len(about.Chain) == 0:
		return nil // X509-SVID §6.2
	case about.Type == "EC" && !slices.Contains([]string{"P-256", "P-384", "P-521"}, about.Curve),
		about.Type == "OKP" && about.Curve != "Ed25519",
		!slices.Contains([]string{"EC", "RSA", "OKP"}, about.Type):
		// A symmetric key, for one, is no authority: who verifies could sign.
		return nil
	}
	var key jose.JSONWebKey
	switch err := key.UnmarshalJSON(raw); {
	case err != nil:
		return err
	case !key.IsPublic():
		return errors.New("is no public key")
	case about.Use == "x509-svid":
		// X509-SVID §6.2: all but the first are ignored.
		if !slices.ContainsFunc(b.X509Authorities, key.Certificates[0].Equal) {
			b.X509Authorities = append(b.X509Authorities, key.Certificates[0])
		}
	case key.KeyID == "":
		return errors.New("has no key ID")
	default:
		keys, others := b.JWTAuthorities, b.WITAuthorities
		if about.Use == "wit-svid" {
			keys, others = others, keys
		}
		had, again := keys[key.KeyID]
		// WIT-SVID §6.1: not even one key for two uses.
		if _, taken := others[key.KeyID]; taken || again && !equalKeys(had, key.Key) {
			return fmt.Errorf("has the key ID %.100q of another", key.KeyID)
		}
		keys[key.KeyID] = key.Key
	}
	return nil
}

// Equal reports whether both hold the same authorities, sequence and refresh
// hint for the same trust domain.
func (b *Bundle) Equal(o *Bundle) bool {
	if b == o || b == nil || o == nil {
		return b == o
	}
	return b.TrustDomain == o.TrustDomain && b.Sequence == o.Sequence && b.RefreshHint == o.RefreshHint &&
		slices.EqualFunc(b.X509Authorities, o.X509Authorities, (*x509.Certificate).Equal) &&
		maps.EqualFunc(b.JWTAuthorities, o.JWTAuthorities, equalKeys) &&
		maps.EqualFunc(b.WITAuthorities, o.WITAuthorities, equalKeys)
}

// CheckForeign refuses, with ErrOurs, a bundle that was given as another trust
// domain's and is ours. Two things prove that. A JWT or WIT key of ours is one:
// such keys never leave us, and nobody else publishes them. An X.509 authority
// with our trust domain as its SPIFFE ID is the other: its holder says himself
// that it signs for us (X509-SVID §3.2), also when it is one of before whose key
// we no longer have. Every CA that we make says so, hence its key need not be
// compared. That we trust an authority, too, proves nothing where it names
// nobody: it may be a root that several trust domains hang under (see
// SharesAuthority). Of own, only the trust domain has to be there.
func (b *Bundle) CheckForeign(own *Bundle) error {
	for _, c := range b.X509Authorities {
		for _, uri := range c.URIs {
			if id, err := spiffeid.FromURI(uri); err == nil && id.MemberOf(own.TrustDomain) {
				return fmt.Errorf("%w: its X.509 authority names %s", ErrOurs, id)
			}
		}
	}
	for _, ours := range []map[string]crypto.PublicKey{own.JWTAuthorities, own.WITAuthorities} {
		for id, key := range ours {
			for _, theirs := range []map[string]crypto.PublicKey{b.JWTAuthorities, b.WITAuthorities} {
				for _, k := range theirs {
					if equalKeys(k, key) {
						return fmt.Errorf("%w: it has our key %s", ErrOurs, id)
					}
				}
			}
		}
	}
	return nil
}

// SharesAuthority reports whether both have an X.509 authority in common.
func (b *Bundle) SharesAuthority(o *Bundle) bool {
	return slices.ContainsFunc(b.X509Authorities, func(c *x509.Certificate) bool {
		return slices.ContainsFunc(o.X509Authorities, c.Equal)
	})
}

// Restrict returns our own bundle and those of these trust domains only, as far
// as they are known.
func (b *Bundles) Restrict(tds []spiffeid.TrustDomain) *Bundles {
	r := &Bundles{Own: b.Own}
	for _, td := range tds {
		if f, ok := b.Federated[td]; ok {
			if r.Federated == nil {
				r.Federated = make(map[spiffeid.TrustDomain]*Bundle, len(tds))
			}
			r.Federated[td] = f
		}
	}
	return r
}

// same reports whether both hold the very same bundles.
func (b *Bundles) same(o *Bundles) bool {
	return b.Own == o.Own && maps.Equal(b.Federated, o.Federated)
}

func equalKeys(a, b crypto.PublicKey) bool {
	k, ok := a.(interface{ Equal(crypto.PublicKey) bool })
	return ok && k.Equal(b)
}

// seconds cuts a time to what certificates and tokens can say.
func seconds(t time.Time) time.Time { return t.UTC().Truncate(time.Second) }

// concat joins the DER of certificates.
func concat(certs []*x509.Certificate) []byte {
	var b bytes.Buffer
	for _, c := range certs {
		b.Write(c.Raw)
	}
	return b.Bytes()
}
