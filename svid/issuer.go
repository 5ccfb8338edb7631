package svid

import (
	"bytes"
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/json"
	"errors"
	"fmt"
	"net/url"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/deputy-id/deputy/svid/registry"
)

const (
	// backdate is how far before its issue an SVID is valid, for verifiers
	// whose clocks are behind.
	backdate = 30 * time.Second
	// maxID is the longest SPIFFE ID that every implementation accepts
	// (SPIFFE-ID §2.3).
	maxID = 2048
	// maxCommonName is ub-common-name of RFC 5280.
	maxCommonName = 64
	// maxUserID is ub-user-identifier of RFC 1274. The standards since then have
	// no bound; some readers of names do.
	maxUserID = 256
)

// userID is the attribute UID of a name (RFC 4519 §2.39).
var userID = asn1.ObjectIdentifier{0, 9, 2342, 19200300, 100, 1, 1}

// An Issuer signs with keys that this machine holds. It is immutable: after a
// rotation there is another. Its Validity is the caller's to check.
type Issuer struct {
	o     IssuerOptions
	ca    *x509.Certificate
	above []*x509.Certificate // what follows the leaf in a chain
	jwt   tokenSigner
	wit   tokenSigner // zero: signs none
}

// IssuerOptions of an Issuer.
type IssuerOptions struct {
	TrustDomain spiffeid.TrustDomain
	CAKey       crypto.Signer
	CAChain     []*x509.Certificate // the CA's certificate first, then those above it, without the root
	JWTKey      crypto.Signer       // ECDSA on P-256 or P-384, or RSA
	JWTKeyID    string
	JWTUntil    time.Time // no token outlives it: the key's end
	JWTIssuer   string    // the iss claim; none if empty

	WITKey   crypto.Signer // as JWTKey; nil: no WIT-SVIDs
	WITKeyID string
	WITUntil time.Time
}

// NewIssuer returns an issuer with these keys.
func NewIssuer(o IssuerOptions) (*Issuer, error) {
	if len(o.CAChain) == 0 {
		return nil, errors.New("issuer has no CA certificate")
	}
	jwt, err := newTokenSigner("JWT", o.JWTKey, o.JWTKeyID, o.JWTUntil)
	if err != nil {
		return nil, fmt.Errorf("issuer's JWT key: %w", err)
	}
	var wit tokenSigner
	if o.WITKey != nil {
		if wit, err = newTokenSigner(witType, o.WITKey, o.WITKeyID, o.WITUntil); err != nil {
			return nil, fmt.Errorf("issuer's WIT key: %w", err)
		}
	}
	above := o.CAChain[:len(o.CAChain):len(o.CAChain)]
	if ca := above[0]; bytes.Equal(ca.RawIssuer, ca.RawSubject) && ca.CheckSignatureFrom(ca) == nil {
		above = nil // it is a root itself, which verifiers have from the bundle
	}
	return &Issuer{
		o:     o,
		ca:    o.CAChain[0],
		above: above,
		jwt:   jwt,
		wit:   wit,
	}, nil
}

// X509 returns the chain of a new X.509-SVID for the public key. Its life ends
// with the CA's at the latest; less than a second of it is ErrNotReady.
func (i *Issuer) X509(id spiffeid.ID, pub crypto.PublicKey, dnsNames []string, ttl time.Duration) ([]*x509.Certificate, error) {
	if err := i.check(id); err != nil {
		return nil, err
	}
	return i.certify(id, pub, dnsNames, ttl)
}

// NodeX509 is X509 for the daemon itself: for the one ID below /spire/ that is
// ours, which no workload can have.
func (i *Issuer) NodeX509(pub crypto.PublicKey, ttl time.Duration) ([]*x509.Certificate, error) {
	return i.certify(registry.NodeID(i.o.TrustDomain), pub, nil, ttl)
}

func (i *Issuer) certify(id spiffeid.ID, pub crypto.PublicKey, dnsNames []string, ttl time.Duration) ([]*x509.Certificate, error) {
	usage := x509.KeyUsageDigitalSignature
	if _, ok := pub.(*rsa.PublicKey); ok {
		usage |= x509.KeyUsageKeyEncipherment
	}
	if err := checkSize(pub); err != nil {
		return nil, fmt.Errorf("sign certificate for %s: %w", id, err)
	}
	now := time.Now()
	notBefore, notAfter := seconds(now.Add(-backdate)), seconds(now.Add(ttl))
	if notBefore.Before(i.ca.NotBefore) {
		notBefore = i.ca.NotBefore
	}
	if notAfter.After(i.ca.NotAfter) {
		notAfter = i.ca.NotAfter
	}
	if !notAfter.After(now) || notBefore.After(now) {
		return nil, fmt.Errorf("sign certificate for %s: the CA is valid from %s to %s: %w",
			id, i.ca.NotBefore.Format(time.RFC3339), i.ca.NotAfter.Format(time.RFC3339), ErrNotReady)
	}
	keyID, err := subjectKeyID(pub)
	if err != nil {
		return nil, fmt.Errorf("sign certificate for %s: %w", id, err)
	}
	// An empty subject would be allowed; some TLS libraries and servers cannot
	// do with one. No serial number here: x509 draws one of 159 random bits.
	subject := pkix.Name{Organization: []string{"Deputy"}}
	// Programs that know no URI names (nginx, PostgreSQL) tell clients by their
	// subjects, and two entities must not share one (RFC 5280 §4.1.2.6). Nothing in
	// a SPIFFE ID is escaped in a name's text, so that text is exactly one ID's.
	if uid := id.String(); len(uid) <= maxUserID {
		subject.ExtraNames = []pkix.AttributeTypeAndValue{{Type: userID, Value: uid}}
	}
	if len(dnsNames) > 0 && len(dnsNames[0]) <= maxCommonName {
		subject.CommonName = dnsNames[0]
	}
	der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{
		Subject:               subject,
		URIs:                  []*url.URL{id.URL()},
		DNSNames:              dnsNames,
		NotBefore:             notBefore,
		NotAfter:              notAfter,
		KeyUsage:              usage,
		ExtKeyUsage:           []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		BasicConstraintsValid: true,
		SubjectKeyId:          keyID,
	}, i.ca, pub, i.o.CAKey)
	if err != nil {
		return nil, fmt.Errorf("sign certificate for %s: %w", id, err)
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, fmt.Errorf("sign certificate for %s: %w", id, err)
	}
	return append([]*x509.Certificate{leaf}, i.above...), nil
}

// JWT returns a new JWT-SVID. Its life ends with the key's at the latest; less
// than a second of it is ErrNotReady.
func (i *Issuer) JWT(id spiffeid.ID, audience []string, ttl time.Duration) (Token, error) {
	return i.JWTWith(id, audience, ttl, nil)
}

// JWTWith is JWT with private claims beside the token's own, whose names they
// may not have.
func (i *Issuer) JWTWith(id spiffeid.ID, audience []string, ttl time.Duration, private map[string]any) (Token, error) {
	if err := i.check(id); err != nil {
		return Token{}, err
	}
	if len(audience) == 0 {
		return Token{}, fmt.Errorf("sign token for %s: no audience", id)
	}
	return i.jwt.token(id, ttl, func(t Token) ([]byte, error) {
		claims, err := json.Marshal(jwtClaims{
			Audience: audience,
			Expires:  t.Expires.Unix(),
			Issued:   t.Issued.Unix(),
			Issuer:   i.o.JWTIssuer,
			ID:       rand.Text(), // 130 bits
			Subject:  id.String(),
		})
		if err != nil || len(private) == 0 {
			return claims, err
		}
		return withPrivate(claims, private)
	})
}

// withPrivate adds claims to an object that is encoded already.
func withPrivate(object []byte, private map[string]any) ([]byte, error) {
	for _, name := range []string{"aud", "exp", "iat", "iss", "jti", "nbf", "sub"} {
		if _, taken := private[name]; taken {
			return nil, fmt.Errorf("claim %s is the token's own", name)
		}
	}
	more, err := json.Marshal(private)
	if err != nil {
		return nil, err
	}
	return append(append(object[:len(object)-1], ','), more[1:]...), nil
}

// check refuses what must not be signed by us whoever asks: an ID of another
// trust domain, the trust domain's own, one that SPIRE keeps for itself.
func (i *Issuer) check(id spiffeid.ID) error {
	switch path := id.Path(); {
	case !id.MemberOf(i.o.TrustDomain):
		return fmt.Errorf("sign for %q: not a member of trust domain %s", id, i.o.TrustDomain)
	case path == "":
		return fmt.Errorf("sign for %s: the ID has no path, so it is no workload's", id)
	case path == "/spire" || strings.HasPrefix(path, "/spire/"):
		return fmt.Errorf("sign for %s: IDs under /spire/ are reserved", id)
	case len(id.String()) > maxID:
		return fmt.Errorf("sign for an ID of %d bytes: longer than %d", len(id.String()), maxID)
	}
	return nil
}

// subjectKeyID is method 1 of RFC 7093 §2.
func subjectKeyID(pub crypto.PublicKey) ([]byte, error) {
	der, err := x509.MarshalPKIXPublicKey(pub)
	if err != nil {
		return nil, err
	}
	sum := sha256.Sum256(der)
	return sum[:20], nil
}
