package federation

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"maps"
	"math/big"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc/test/bufconn"

	"github.com/deputy-id/deputy/internal/watch"
	"github.com/deputy-id/deputy/svid"
)

var (
	ours   = spiffeid.RequireTrustDomainFromString("ours.example")
	theirs = spiffeid.RequireTrustDomainFromString("theirs.example")
	third  = spiffeid.RequireTrustDomainFromString("third.example")
)

// A ca signs certificates, of a trust domain or of the Web PKI.
type ca struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func mustKey(t testing.TB) *ecdsa.PrivateKey {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func sign(t testing.TB, template, parent *x509.Certificate, pub crypto.PublicKey, key crypto.Signer) *x509.Certificate {
	t.Helper()
	der, err := x509.CreateCertificate(rand.Reader, template, parent, pub, key)
	if err != nil {
		t.Fatal(err)
	}
	c, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// serials make each CA another, and each key identifier.
var serials int64

func newCA(t testing.TB) *ca {
	t.Helper()
	return newCAUntil(t, time.Now().Add(1000*time.Hour))
}

func newCAUntil(t testing.TB, end time.Time) *ca {
	t.Helper()
	k := mustKey(t)
	serials++
	template := &x509.Certificate{
		SerialNumber: big.NewInt(serials), Subject: pkix.Name{CommonName: "CA", SerialNumber: big.NewInt(serials).String()},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: end,
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	return &ca{sign(t, template, template, k.Public(), k), k}
}

// server signs a certificate for an SPIFFE ID or a DNS name.
func (c *ca) server(t testing.TB, name string) *tls.Certificate {
	t.Helper()
	k := mustKey(t)
	template := &x509.Certificate{
		SerialNumber: big.NewInt(7), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(900 * time.Hour),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
		BasicConstraintsValid: true,
	}
	if u, err := url.Parse(name); err == nil && u.Scheme == "spiffe" {
		template.URIs = []*url.URL{u}
	} else {
		template.DNSNames = []string{name}
	}
	leaf := sign(t, template, c.cert, k.Public(), c.key)
	return &tls.Certificate{Certificate: [][]byte{leaf.Raw}, PrivateKey: k, Leaf: leaf}
}

// file is the CA as a PEM file.
func (c *ca) file(t testing.TB) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "ca.pem")
	if err := os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.cert.Raw}), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// bundle is one of these CAs and a JWT key.
func bundle(t testing.TB, td spiffeid.TrustDomain, sequence uint64, hint time.Duration, cas ...*ca) *svid.Bundle {
	t.Helper()
	b := &svid.Bundle{TrustDomain: td, Sequence: sequence, RefreshHint: hint,
		JWTAuthorities: map[string]crypto.PublicKey{"key": mustKey(t).Public()}}
	for _, c := range cas {
		b.X509Authorities = append(b.X509Authorities, c.cert)
	}
	return b
}

// without is the bundle with another number and without JWT keys.
func without(b *svid.Bundle, sequence uint64) *svid.Bundle {
	return &svid.Bundle{TrustDomain: b.TrustDomain, Sequence: sequence, RefreshHint: b.RefreshHint, X509Authorities: b.X509Authorities}
}

// memory is a store without a disk.
type memory struct {
	value *watch.Value[*svid.Bundles]
	mu    sync.Mutex
	fails error
	first func() // what comes before the next update, which waits for it
	sets  int
}

func newMemory(own *svid.Bundle, others ...*svid.Bundle) *memory {
	all := &svid.Bundles{Own: own, Federated: map[spiffeid.TrustDomain]*svid.Bundle{}}
	for _, b := range others {
		all.Federated[b.TrustDomain] = b
	}
	return &memory{value: watch.New(all)}
}

func (m *memory) Bundles() (*svid.Bundles, <-chan struct{}) { return m.value.Load() }

func (m *memory) SetFederated(b *svid.Bundle) error {
	return m.UpdateFederated(b.TrustDomain, func(*svid.Bundle) (*svid.Bundle, error) { return b, nil })
}

func (m *memory) UpdateFederated(td spiffeid.TrustDomain, next func(*svid.Bundle) (*svid.Bundle, error)) error {
	if first := m.first; first != nil {
		m.first = nil
		first()
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	all, _ := m.value.Load()
	had := all.Federated[td]
	b, err := next(had)
	if err != nil || b == had {
		return err
	}
	if err := b.CheckForeign(all.Own); err != nil {
		return err
	}
	if m.fails != nil {
		return m.fails
	}
	m.sets++
	federated := maps.Clone(all.Federated)
	federated[td] = b
	m.value.Store(&svid.Bundles{Own: all.Own, Federated: federated})
	return nil
}

func (m *memory) of(td spiffeid.TrustDomain) *svid.Bundle {
	all, _ := m.value.Load()
	return all.Federated[td]
}

// A network in memory, so that time may be a bubble's.
type network struct {
	mu    sync.Mutex
	hosts map[string]*bufconn.Listener
	dials int
	ends  []net.Conn
}

func newNetwork() *network { return &network{hosts: make(map[string]*bufconn.Listener)} }

func (n *network) dial(ctx context.Context, _, address string) (net.Conn, error) {
	n.mu.Lock()
	l := n.hosts[address]
	n.dials++
	n.mu.Unlock()
	if l == nil {
		return nil, errors.New("connection refused")
	}
	c, err := l.DialContext(ctx)
	if err == nil {
		n.mu.Lock()
		n.ends = append(n.ends, c)
		n.mu.Unlock()
	}
	return c, err
}

// dialled is how often somebody called.
func (n *network) dialled() int {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.dials
}

func (n *network) listen(address string) *bufconn.Listener {
	l := bufconn.Listen(64 << 10)
	n.mu.Lock()
	defer n.mu.Unlock()
	n.hosts[address] = l
	return l
}

// serve answers at host:443 with this certificate until the test ends.
func (n *network) serve(t testing.TB, host string, cert *tls.Certificate, h http.HandlerFunc) {
	t.Helper()
	l := n.listen(host + ":443")
	calls, none := 0, sync.NewCond(&n.mu) // a WaitGroup may not be added to while it is waited on
	s := &http.Server{
		TLSConfig: &tls.Config{Certificates: []tls.Certificate{*cert}},
		ErrorLog:  hclog.NewNullLogger().StandardLogger(nil),
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			n.mu.Lock()
			calls++
			n.mu.Unlock()
			defer func() {
				n.mu.Lock()
				defer n.mu.Unlock()
				calls--
				none.Broadcast()
			}()
			h(w, r)
		}),
	}
	var done sync.WaitGroup
	done.Go(func() { s.ServeTLS(l, "", "") })
	t.Cleanup(func() {
		n.mu.Lock()
		for _, c := range n.ends {
			c.Close()
		}
		n.mu.Unlock()
		s.Close()
		done.Wait()
		n.mu.Lock()
		for calls > 0 {
			none.Wait()
		}
		n.mu.Unlock()
	})
}

// answer serves what the function says is the bundle.
func answer(t testing.TB, b func() *svid.Bundle) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		data, err := b().Marshal()
		if err != nil {
			t.Error(err)
		}
		w.Write(data)
	}
}

func fixed(t testing.TB, b *svid.Bundle) http.HandlerFunc {
	return answer(t, func() *svid.Bundle { return b })
}

// A record is a log that a test reads.
type record struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (r *record) Write(p []byte) (int, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.text.Write(p)
}

func (r *record) String() string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.text.String()
}

func (r *record) log() hclog.Logger {
	return hclog.New(&hclog.LoggerOptions{Output: r, Level: hclog.Debug})
}
