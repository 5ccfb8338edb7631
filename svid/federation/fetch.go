package federation

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"github.com/deputy-id/deputy/internal/bounded"
	"github.com/deputy-id/deputy/internal/owned"
	"github.com/deputy-id/deputy/svid"
)

// Bounds of a fetch.
const (
	maxBody      = 1 << 20  // bytes of a bundle: hundreds of CA certificates
	maxHeader    = 16 << 10 // bytes of a response's headers
	maxRedirects = 3
	fetchTime    = 15 * time.Second // from the dial to the last byte
)

// A fetched is what a fetch brought.
type fetched struct {
	bundle *svid.Bundle
	// moved says that a redirect on the way calls itself permanent. Nobody
	// takes it for that (§7.5.1).
	moved bool
}

// dial makes a connection to an endpoint.
type dial func(ctx context.Context, network, address string) (net.Conn, error)

// fetch asks the endpoint for its bundle. Each call makes a connection of its
// own, so that the server is verified with the bundles of now. There is no
// proxy: the environment of the daemon is not where its trust is configured.
func (d dial) fetch(ctx context.Context, r Relationship, all *svid.Bundles) (*fetched, error) {
	ctx, cancel := context.WithTimeout(ctx, fetchTime)
	defer cancel()
	config, err := r.tls(all)
	if err != nil {
		return nil, err
	}
	f := &fetched{}
	transport := &http.Transport{
		DialContext:            d,
		TLSClientConfig:        config,
		DisableKeepAlives:      true,
		DisableCompression:     true, // what it unpacks to would have to be bounded, too
		MaxResponseHeaderBytes: maxHeader,
	}
	client := &http.Client{Transport: transport, CheckRedirect: func(req *http.Request, via []*http.Request) error {
		if len(via) > maxRedirects {
			return fmt.Errorf("more than %d redirects", maxRedirects)
		}
		if err := checkURL(req.URL); err != nil {
			return fmt.Errorf("redirect: %w", err)
		}
		req.Header.Del("Referer") // the configured URL, with what may be secret in its query
		switch req.Response.StatusCode {
		case http.StatusMovedPermanently, http.StatusPermanentRedirect:
			f.moved = true
		}
		return nil
	}}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, r.URL, nil)
	if err == nil {
		err = checkURL(req.URL)
	}
	if err != nil {
		return nil, err
	}
	req.Header.Set("Accept", "application/json")
	req.Header.Set("User-Agent", "deputy")
	resp, err := client.Do(req)
	if err != nil {
		return nil, cause(err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("endpoint answers with status %d", resp.StatusCode)
	}
	f.bundle, err = readBundle(r.TrustDomain, resp.Body)
	if ctx.Err() != nil { // a body that we cut off may look like one that ended
		err = cause(ctx.Err())
	}
	if err != nil {
		return nil, err
	}
	return f, nil
}

func readBundle(td spiffeid.TrustDomain, from io.Reader) (*svid.Bundle, error) {
	body, err := bounded.Read(from, maxBody)
	if err != nil {
		return nil, fmt.Errorf("read bundle: %w", cause(err))
	}
	return svid.ParseBundle(td, body)
}

// tls says whom the client believes to be the endpoint, after redirects, too.
func (r Relationship) tls(all *svid.Bundles) (*tls.Config, error) {
	c := &tls.Config{MinVersion: tls.VersionTLS12}
	if r.EndpointID.IsZero() {
		if r.Roots == "" {
			return c, nil
		}
		roots, err := readRoots(r.Roots)
		c.RootCAs = roots
		return c, err
	}
	b := r.trust(all)
	if b == nil {
		return nil, fmt.Errorf("%w: bring that of %[2]s across (deputy bundle set %[2]s)", ErrNoTrust, r.EndpointID.TrustDomain())
	}
	if len(b.X509Authorities) == 0 {
		return nil, fmt.Errorf("%w: that of %[2]s has no X.509 authority; bring its next one across (deputy bundle set %[2]s)", ErrNoTrust, r.EndpointID.TrustDomain())
	}
	bundle := x509bundle.FromX509Authorities(b.TrustDomain, b.X509Authorities)
	// The name in the URL does not matter; VerifyConnection does what is left
	// out, at every handshake.
	c.InsecureSkipVerify = true
	c.VerifyConnection = func(s tls.ConnectionState) error {
		id, _, err := x509svid.Verify(s.PeerCertificates, bundle)
		switch {
		case b != all.Own && outdated(err):
			return fmt.Errorf("%w, or our bundle of %[2]s is too old for it (deputy bundle set %[2]s): %[3]w", ErrWrongServer, b.TrustDomain, err)
		case err != nil:
			return fmt.Errorf("%w: %w", ErrWrongServer, err)
		}
		if id != r.EndpointID {
			return fmt.Errorf("%w: is %s, not %s", ErrWrongServer, id, r.EndpointID)
		}
		return nil
	}
	return c, nil
}

// outdated reports whether a server did not verify for a CA: one that the bundle
// does not have, or one that has ended. So it is where somebody else answers, and
// so it is for a follower that missed the announcement of a key, who cannot fetch
// the bundle that he lacks.
func outdated(err error) bool {
	var unknown x509.UnknownAuthorityError
	var invalid x509.CertificateInvalidError
	return errors.As(err, &unknown) || errors.As(err, &invalid) && invalid.Reason == x509.Expired && invalid.Cert != nil && invalid.Cert.IsCA
}

// CheckRoots returns why the file of CAs could not be used, nil if it could or
// there is none.
func (r Relationship) CheckRoots() error {
	if r.Roots == "" {
		return nil
	}
	_, err := readRoots(r.Roots)
	return err
}

// readRoots reads the CAs that may vouch for an endpoint of https_web. Whoever
// may write the file can be that endpoint.
func readRoots(path string) (*x509.CertPool, error) {
	data, err := owned.ReadFile(path, maxBody)
	if err != nil {
		return nil, fmt.Errorf("read CAs: %w", err)
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(data) {
		return nil, fmt.Errorf("read CAs: %s holds no certificates in PEM", path)
	}
	return pool, nil
}

// cause takes off the URL, which may be one that a redirect led to, and names
// a server that is the wrong one.
func cause(err error) error {
	var at *url.Error
	if errors.As(err, &at) {
		err = at.Err
	}
	var verification *tls.CertificateVerificationError
	if errors.As(err, &verification) {
		return fmt.Errorf("%w: %w", ErrWrongServer, err)
	}
	if errors.Is(err, context.DeadlineExceeded) {
		return fmt.Errorf("no answer within %s", fetchTime)
	}
	return err
}
