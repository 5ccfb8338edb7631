// Package keypair serves a TLS certificate and its key from files that an
// operator, or a program such as certbot, replaces while we run.
//
// It defends against a pair that is broken, half-written or read between the
// replacing of its two files: the last good one goes on. What was read once is
// looked at again at a handshake, at most once a second, so that nothing is
// watched and no goroutine runs. Errors quote nothing of a key.
package keypair

import (
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/deputy-id/deputy/internal/bounded"
)

const (
	maxFile = 1 << 20 // bytes
	// every is how long a look at the files is good for.
	every = time.Second
)

// A Pair is a certificate chain and its key. It is safe for concurrent use.
type Pair struct {
	// Report, if it is there, is told of each new content of the files: nil if
	// it is in use from now on, else why it is not. It is set before the first
	// use of the Pair.
	Report func(error)

	cert, key string
	current   atomic.Pointer[tls.Certificate]

	mu     sync.Mutex // held by the one handshake that looks; guards what follows
	looked time.Time
	state  string // of the files at the last look: the digest of their content, or why there is none
}

// Open reads a pair of PEM files: the certificate with its chain, leaf first,
// and the key in PKCS #8, PKCS #1 or SEC 1.
func Open(cert, key string) (*Pair, error) {
	p := &Pair{cert: cert, key: key}
	pair, state, err := p.read()
	if err != nil {
		return nil, err
	}
	p.current.Store(pair)
	p.looked, p.state = time.Now(), state
	return p, nil
}

// GetCertificate is for tls.Config. It never fails: an old certificate is for
// the client to judge.
func (p *Pair) GetCertificate(*tls.ClientHelloInfo) (*tls.Certificate, error) {
	p.look()
	return p.current.Load(), nil
}

// Certificate returns the leaf in use.
func (p *Pair) Certificate() *x509.Certificate { return p.current.Load().Leaf }

// look reads the files again if it is time to. Who comes while another looks
// does not wait for a disk that may hang.
func (p *Pair) look() {
	if !p.mu.TryLock() {
		return
	}
	defer p.mu.Unlock()
	if time.Since(p.looked) < every {
		return
	}
	pair, state, err := p.read()
	p.looked = time.Now()
	if state == p.state {
		return
	}
	p.state = state
	if err == nil {
		p.current.Store(pair)
	}
	if p.Report != nil {
		p.Report(err)
	}
}

// read returns the pair, and what tells this state of the files from another.
func (p *Pair) read() (pair *tls.Certificate, state string, err error) {
	cert, err := bounded.File(p.cert, maxFile)
	if err != nil {
		return nil, err.Error(), fmt.Errorf("read certificate: %w", err)
	}
	key, err := bounded.File(p.key, maxFile)
	if err != nil {
		return nil, err.Error(), fmt.Errorf("read key: %w", err)
	}
	sum := sha256.Sum256(slices.Concat(cert, []byte{0}, key)) // PEM has no zero byte
	state = string(sum[:])
	parsed, err := tls.X509KeyPair(cert, key)
	if err != nil {
		return nil, state, fmt.Errorf("read certificate %s with key %s: %w", p.cert, p.key, err)
	}
	return &parsed, state, nil
}
