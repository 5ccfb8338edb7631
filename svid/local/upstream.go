package local

import (
	"bytes"
	"crypto"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/deputy-id/deputy/internal/bounded"
)

// Upstream names the files of an intermediate CA that our CA hangs under. They
// are read at each rotation, so that they may be renewed meanwhile.
type Upstream struct {
	Cert   string // PEM: the intermediate first, then what stands between it and the root
	Key    string // PEM: PKCS #8, PKCS #1 or SEC 1
	Bundle string // PEM: the roots, which become the trust bundle
}

func (u Upstream) given() bool { return u != Upstream{} }

func (u Upstream) complete() error {
	if u.given() && (u.Cert == "" || u.Key == "" || u.Bundle == "") {
		return errors.New("open authority: an upstream needs a certificate, a key and a bundle")
	}
	return nil
}

// An UpstreamError says why no CA can be made under the files of an upstream.
type UpstreamError struct{ err error }

func (e *UpstreamError) Error() string { return e.err.Error() }
func (e *UpstreamError) Unwrap() error { return e.err }

// CheckUpstream makes a CA under the upstream that the options name, as an
// Authority would, and drops it. An error about the files is an UpstreamError.
func CheckUpstream(o Options) error {
	if err := o.complete(); err != nil || !o.Upstream.given() {
		return err
	}
	_, err := (&Authority{o: o}).makeCA(time.Now())
	return err
}

// Ends returns when the first certificate of the chain above our CA ends, which
// no CA of ours outlives.
func (u Upstream) Ends() (end time.Time, err error) {
	chain, err := readCertificates(u.Cert)
	if err != nil {
		return end, fmt.Errorf("read upstream certificate: %w", err)
	}
	return slices.MinFunc(chain, func(a, b *x509.Certificate) int { return a.NotAfter.Compare(b.NotAfter) }).NotAfter, nil
}

type upstream struct {
	chain []*x509.Certificate
	key   crypto.Signer
	roots []*x509.Certificate
}

// read reads the files and checks that what we sign under them will verify.
func (u Upstream) read(td spiffeid.TrustDomain, now time.Time) (*upstream, error) {
	chain, err := readCertificates(u.Cert)
	if err != nil {
		return nil, fmt.Errorf("read upstream certificate: %w", err)
	}
	roots, err := readCertificates(u.Bundle)
	if err != nil {
		return nil, fmt.Errorf("read upstream bundle: %w", err)
	}
	data, err := bounded.File(u.Key, maxFile)
	if err != nil {
		return nil, fmt.Errorf("read upstream key: %w", err)
	}
	key, err := parseKey(data)
	if err != nil {
		return nil, fmt.Errorf("read upstream key: %s: %w", u.Key, err)
	}
	up := &upstream{chain: chain, key: key, roots: roots}
	if err := up.check(td, now); err != nil {
		return nil, fmt.Errorf("upstream certificate %s: %w", u.Cert, err)
	}
	return up, nil
}

func (u *upstream) check(td spiffeid.TrustDomain, now time.Time) error {
	c := u.chain[0]
	switch {
	case !equalPublic(c.PublicKey, u.key.Public()):
		return errors.New("does not belong to the key")
	case !c.IsCA || !c.BasicConstraintsValid:
		return errors.New("is not a CA's")
	case c.KeyUsage&x509.KeyUsageCertSign == 0:
		return errors.New("may not sign certificates: key usage keyCertSign is missing")
	case c.MaxPathLen == 0 && c.MaxPathLenZero:
		return errors.New("allows no CA below it: its path length is 0, and 1 is needed")
	case !now.Before(c.NotAfter):
		return fmt.Errorf("expired at %s", c.NotAfter.Format(time.RFC3339))
	}
	// A signing certificate that has a SPIFFE ID has its trust domain's, with
	// no path (X509-SVID §3.2).
	for _, uri := range c.URIs {
		if uri.Scheme == "spiffe" && uri.String() != td.ID().String() {
			return fmt.Errorf("has the SPIFFE ID %s, not %s", uri, td.ID())
		}
	}
	for _, r := range u.roots {
		if !r.IsCA {
			return errors.New("its bundle holds a certificate that is not a CA's")
		}
	}
	if err := verifyCA(u.chain, u.roots, now); err != nil {
		return fmt.Errorf("does not verify against the bundle: %w", err)
	}
	return nil
}

func verifyCA(chain, roots []*x509.Certificate, now time.Time) error {
	o := x509.VerifyOptions{
		Roots:         x509.NewCertPool(),
		Intermediates: x509.NewCertPool(),
		CurrentTime:   now,
		KeyUsages:     []x509.ExtKeyUsage{x509.ExtKeyUsageAny},
	}
	for _, c := range roots {
		o.Roots.AddCert(c)
	}
	for _, c := range chain[1:] {
		o.Intermediates.AddCert(c)
	}
	_, err := chain[0].Verify(o)
	return err
}

// withoutRoots returns the chain up to the first certificate that is in the
// bundle: chains carry no root.
func withoutRoots(chain, roots []*x509.Certificate) []*x509.Certificate {
	for i, c := range chain {
		if slices.ContainsFunc(roots, c.Equal) {
			return chain[:i]
		}
	}
	return chain
}

func readCertificates(path string) ([]*x509.Certificate, error) {
	data, err := bounded.File(path, maxFile)
	if err != nil {
		return nil, err
	}
	certs, err := parsePEM(data)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return certs, nil
}

func parsePEM(data []byte) ([]*x509.Certificate, error) {
	var certs []*x509.Certificate
	for {
		var block *pem.Block
		if block, data = pem.Decode(data); block == nil {
			break
		}
		if block.Type != "CERTIFICATE" {
			return nil, fmt.Errorf("PEM block is %q, want CERTIFICATE", block.Type)
		}
		c, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, err
		}
		certs = append(certs, c)
	}
	if len(bytes.TrimSpace(data)) > 0 || len(certs) == 0 {
		return nil, errors.New("is not PEM with certificates alone")
	}
	return certs, nil
}

// parseKey reads a private key in any of the three usual forms; its errors
// quote nothing of it.
func parseKey(data []byte) (crypto.Signer, error) {
	var block *pem.Block
	for {
		if block, data = pem.Decode(data); block == nil {
			return nil, errors.New("holds no private key in PEM")
		}
		if block.Type != "EC PARAMETERS" {
			break
		}
	}
	var key any
	var err error
	switch block.Type {
	case "PRIVATE KEY":
		key, err = x509.ParsePKCS8PrivateKey(block.Bytes)
	case "EC PRIVATE KEY":
		key, err = x509.ParseECPrivateKey(block.Bytes)
	case "RSA PRIVATE KEY":
		key, err = x509.ParsePKCS1PrivateKey(block.Bytes)
	default:
		return nil, fmt.Errorf("PEM block is %q, want a private key that is not encrypted", block.Type)
	}
	signer, ok := key.(crypto.Signer)
	if err != nil || !ok {
		return nil, errors.New("private key cannot be read")
	}
	return signer, nil
}
