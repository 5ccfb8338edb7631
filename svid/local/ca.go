package local

import (
	"crypto"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"fmt"
	"net/url"
	"time"
)

// makeCA makes a CA key with its certificate, self-signed or under the
// intermediate whose files are read anew.
func (a *Authority) makeCA(now time.Time) (*slot, error) {
	key, err := a.o.KeyType.Generate()
	if err != nil {
		return nil, err
	}
	id, err := keyID(key.Public())
	if err != nil {
		return nil, err
	}
	der, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		return nil, err
	}
	sum := sha256.Sum256(der)
	now = now.UTC().Truncate(time.Second)
	template := &x509.Certificate{
		// The key's ID tells the CAs of one trust domain apart. The trust
		// domain may be longer than a name may be, so it is only hinted at.
		Subject: pkix.Name{
			Organization: []string{"Deputy"},
			CommonName:   cut(a.o.TrustDomain.Name(), 64),
			SerialNumber: id,
		},
		URIs:                  []*url.URL{a.o.TrustDomain.ID().URL()},
		NotBefore:             now.Add(-backdate),
		NotAfter:              now.Add(a.o.CATTL),
		IsCA:                  true,
		BasicConstraintsValid: true,
		KeyUsage:              x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
		SubjectKeyId:          sum[:20],
	}
	s := &slot{ID: id, key: key, pub: key.Public(), Created: now}
	parent, signer := template, key
	var above []*x509.Certificate
	if a.o.Upstream.given() {
		up, err := a.o.Upstream.read(a.o.TrustDomain, now)
		if err != nil {
			return nil, &UpstreamError{err}
		}
		parent, signer, s.roots = up.chain[0], up.key, up.roots
		for _, c := range up.chain {
			if c.NotAfter.Before(template.NotAfter) {
				template.NotAfter = c.NotAfter
			}
			if c.NotBefore.After(template.NotBefore) {
				template.NotBefore = c.NotBefore
			}
		}
		above = withoutRoots(up.chain, up.roots)
	}
	cert, err := signCA(template, parent, key.Public(), signer)
	if err != nil {
		return nil, fmt.Errorf("sign CA certificate: %w", err)
	}
	s.Expires = cert.NotAfter
	if a.o.Upstream.given() {
		s.chain = append([]*x509.Certificate{cert}, above...)
		// Constraints of names and path length show here, not at a workload.
		if err := verifyCA(s.chain, s.roots, now); err != nil {
			return nil, &UpstreamError{fmt.Errorf("CA certificate under %s does not verify: %w", a.o.Upstream.Cert, err)}
		}
	} else {
		// The root itself is in the bundle, so no chain carries it.
		s.chain, s.roots = []*x509.Certificate{cert}, []*x509.Certificate{cert}
	}
	return s, nil
}

func signCA(template, parent *x509.Certificate, pub crypto.PublicKey, signer crypto.Signer) (*x509.Certificate, error) {
	der, err := x509.CreateCertificate(rand.Reader, template, parent, pub, signer)
	if err != nil {
		return nil, err
	}
	return x509.ParseCertificate(der)
}

// makeTokenKey makes a key that signs JWT- or WIT-SVIDs, never both.
func (a *Authority) makeTokenKey(now time.Time) (*slot, error) {
	key, err := a.o.KeyType.Generate()
	if err != nil {
		return nil, err
	}
	id, err := keyID(key.Public())
	if err != nil {
		return nil, err
	}
	now = now.UTC().Truncate(time.Second)
	return &slot{ID: id, key: key, pub: key.Public(), Created: now, Expires: now.Add(a.o.CATTL)}, nil
}

func cut(s string, n int) string { return s[:min(n, len(s))] }
