// Package local is the authority that needs no server: it holds a CA and JWT
// keys of its own, on disk or in memory, and rotates them. A next key is
// prepared and published long before it signs, so that every verifier whose
// bundle is not older than a third of a key's life can verify what it signs.
//
// It defends against keys that are lost or half-written in a crash, against a
// key that signs before it is stored and published, against a clock that is
// wrong for a while, and against two daemons on one directory. It does not defend against who can read that directory: a
// daemon of an ordinary user shares its keys with all of that user's processes
// (see Warning).
//
// A caller must call Run, or keys are not rotated, and Close at the end.
package local

import (
	"context"
	"crypto"
	"crypto/x509"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/deputy-id/deputy/internal/durable"
	"github.com/deputy-id/deputy/internal/owned"
	"github.com/deputy-id/deputy/internal/watch"
	"github.com/deputy-id/deputy/svid"
	"github.com/deputy-id/deputy/svid/registry"
)

// What a caller may branch on.
var (
	ErrOwnTrustDomain = errors.New("bundle is of our own trust domain") // which only rotation changes
	ErrNotFederated   = errors.New("no bundle of that trust domain")
)

const (
	defaultCATTL   = 24 * time.Hour
	defaultX509TTL = time.Hour
	defaultJWTTTL  = 5 * time.Minute
	minTTL         = 5 * time.Second
	// share of the CA's life that an SVID's may be: from five sixths on the
	// next key signs, so no SVID is cut short.
	share = 6
)

// Options of an Authority. Only TrustDomain is needed.
type Options struct {
	TrustDomain spiffeid.TrustDomain
	DataDir     string        // directory of keys and federated bundles; empty: nothing is stored
	Memory      bool          // keys are not stored, even if there is a DataDir
	CATTL       time.Duration // life of CA, JWT and WIT keys; 0: 24 h
	X509TTL     time.Duration // of entries that say nothing; 0: 1 h
	JWTTTL      time.Duration // of entries that say nothing; 0: 5 min
	KeyType     svid.KeyType  // of CA, JWT and WIT keys; empty: ec-p256
	JWTIssuer   string        // the iss claim of JWT-SVIDs; empty: none
	RefreshHint time.Duration // how often others are told to fetch the bundle; 0: five times before a new key signs, at least every 5 min
	WIT         bool          // sign WIT-SVIDs, too
	Upstream    Upstream      // zero: the CA is self-signed
	Claims      claimer       // of JWT-SVIDs; nil: none beside the standard's
	Log         hclog.Logger
}

// A claimer says which private claims the token of an ID carries, by name. An
// error keeps it from being signed: who reads the claims must not take a token
// without them for one whose agent has no bounds.
type claimer interface {
	Claims(id spiffeid.ID, now time.Time) (map[string]any, error)
}

// An Authority signs with its own keys. It is safe for concurrent use.
type Authority struct {
	o         Options
	log       hclog.Logger
	lock      *os.File // nil without a DataDir
	published *watch.Value[*svid.Bundles]
	signing   atomic.Pointer[signing]
	rotated   chan struct{} // tells Run that the times are others

	mu       sync.Mutex           // guards what follows, and the files
	state    *state               // as stored; immutable
	ends     map[string]time.Time // of keys, by the monotonic clock
	failure  error                // of the last rotation
	failedAt time.Time
}

// signing is what signs now.
type signing struct {
	issuer    *svid.Issuer
	x509, jwt *slot
}

// Open reads the keys from the directory, or makes the first ones. A file that
// is damaged, or of another trust domain, is an error and left as it is; so is
// a directory that another daemon uses (durable.ErrLocked).
func Open(ctx context.Context, o Options) (_ *Authority, err error) {
	if err := o.complete(); err != nil {
		return nil, err
	}
	a := &Authority{o: o, log: o.Log, rotated: make(chan struct{}, 1)}
	a.published = watch.New(&svid.Bundles{})
	defer func() {
		if err != nil {
			a.Close()
		}
	}()
	s := &state{}
	federated := map[spiffeid.TrustDomain]*svid.Bundle{}
	if o.DataDir != "" {
		if err := a.prepareDir(); err != nil {
			return nil, err
		}
		if federated, err = readFederated(a.path(federatedFile), o.TrustDomain); err != nil {
			return nil, err
		}
		if !o.Memory {
			if s, err = readState(a.path(stateFile), o.TrustDomain); err != nil {
				return nil, err
			}
		}
	}
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	if s.Sequence == 0 {
		// There may have been keys before: in memory, or in a directory that was
		// lost. Who follows the bundle takes none with a lower number.
		s.Sequence = uint64(max(time.Now().Unix(), 1))
	}
	a.state = s
	a.published.Store(&svid.Bundles{Federated: federated})
	if s.X509.Active != nil {
		if err := a.use(s); err != nil {
			return nil, fmt.Errorf("open authority: %w", err)
		}
	}
	if err := a.rotate(time.Now()); err != nil {
		// Keys that were stored before and still serve are reason enough to
		// start: Run tries again.
		if cur := a.signing.Load(); cur == nil || !cur.usable(time.Now()) {
			return nil, fmt.Errorf("open authority: %w", err)
		}
		a.log.Warn("key rotation failed, signing with the keys there are", "error", err)
	}
	if x := a.state.X509; !a.fits(x.Active) && x.Prepared != nil {
		a.log.Warn("upstream was configured otherwise when the CA was made; the next one follows the configuration",
			"signs_from", x.Active.activateAt(x.Prepared).UTC().Format(time.RFC3339))
	}
	return a, nil
}

func (o *Options) complete() error {
	if o.TrustDomain.IsZero() {
		return errors.New("open authority: no trust domain")
	}
	if o.Log == nil {
		o.Log = hclog.NewNullLogger()
	}
	if o.CATTL == 0 {
		o.CATTL = defaultCATTL
	}
	if o.CATTL < share*minTTL {
		return fmt.Errorf("open authority: CA life of %s is shorter than %s", o.CATTL, share*minTTL)
	}
	// A key is published for a third of its life before it signs. The standard
	// wants that to be three to five periods (SPIFFE Federation §4.1).
	window := o.CATTL / 3
	switch {
	case o.RefreshHint == 0:
		o.RefreshHint = min(window/5, maxHint).Truncate(time.Second)
	case o.RefreshHint < time.Second || o.RefreshHint > window/3:
		return fmt.Errorf("open authority: refresh hint of %s is not between 1s and %s, a ninth of the CA's life", o.RefreshHint, window/3)
	}
	var err error
	if o.KeyType, err = svid.ParseKeyType(string(o.KeyType)); err != nil {
		return fmt.Errorf("open authority: %w", err)
	}
	for _, t := range []struct {
		ttl       *time.Duration
		name      string
		byDefault time.Duration
	}{{&o.X509TTL, "X.509", defaultX509TTL}, {&o.JWTTTL, "JWT", defaultJWTTTL}} {
		switch {
		case *t.ttl == 0:
			*t.ttl = min(t.byDefault, o.CATTL/share)
		case *t.ttl < minTTL || *t.ttl > o.CATTL/share:
			return fmt.Errorf("open authority: %s TTL of %s is not between %s and %s, a sixth of the CA's life",
				t.name, *t.ttl, minTTL, o.CATTL/share)
		}
	}
	return o.Upstream.complete()
}

// prepareDir makes the directory, locks it and removes what a crash in the
// middle of a write left.
func (a *Authority) prepareDir() error {
	if err := os.MkdirAll(a.o.DataDir, 0o700); err != nil {
		return fmt.Errorf("open data directory: %w", err)
	}
	// Who could put keys there would be the authority from the next start on.
	if err := owned.Dir(a.o.DataDir); err != nil {
		return fmt.Errorf("open data directory: %w", err)
	}
	lock, err := durable.Lock(a.o.DataDir)
	if err != nil {
		return fmt.Errorf("open data directory: %w", err)
	}
	a.lock = lock
	for _, name := range []string{stateFile, federatedFile} {
		left, _ := filepath.Glob(filepath.Join(a.o.DataDir, ".tmp-"+name+"-*"))
		for _, path := range left {
			if err := os.Remove(path); err != nil {
				a.log.Warn("unfinished file could not be removed", "path", path, "error", err)
			}
		}
	}
	return nil
}

func (a *Authority) path(name string) string { return filepath.Join(a.o.DataDir, name) }

// stored reports whether keys are kept on disk.
func (a *Authority) stored() bool { return a.o.DataDir != "" && !a.o.Memory }

// Warning returns what an operator should know about how the keys are kept;
// nothing if all is well.
func (a *Authority) Warning() string {
	if os.Geteuid() == 0 {
		return ""
	}
	return "the authority runs as an ordinary user, whose other processes can read its keys: for development only"
}

// Close gives up the directory. Nothing may be called afterwards.
func (a *Authority) Close() error {
	if a.lock == nil {
		return nil
	}
	return a.lock.Close()
}

// X509 implements svid.Authority.
func (a *Authority) X509(_ context.Context, e registry.Entry, key crypto.Signer) ([]*x509.Certificate, error) {
	return a.MintX509(e.SPIFFEID, key.Public(), e.DNSNames, e.X509TTL)
}

// JWT implements svid.Authority.
func (a *Authority) JWT(_ context.Context, e registry.Entry, audience []string) (svid.Token, error) {
	return a.MintJWT(e.SPIFFEID, audience, e.JWTTTL)
}

// WIT returns a WIT-SVID for the entry's ID and a public key. Such an SVID is
// bound to a key as an X.509-SVID is, so it lives as long as one.
func (a *Authority) WIT(_ context.Context, e registry.Entry, pub crypto.PublicKey) (svid.Token, error) {
	i, err := a.issuer()
	if err != nil {
		return svid.Token{}, err
	}
	return i.WIT(e.SPIFFEID, pub, a.limit(e.X509TTL, a.o.X509TTL))
}

// Bundles implements svid.Authority.
func (a *Authority) Bundles() (*svid.Bundles, <-chan struct{}) { return a.published.Load() }

// MintX509 returns a chain for a bare public key: the leaf first, then the
// intermediates. A TTL of 0 is the default; others are cut to what the
// authority allows.
func (a *Authority) MintX509(id spiffeid.ID, pub crypto.PublicKey, dnsNames []string, ttl time.Duration) ([]*x509.Certificate, error) {
	i, err := a.issuer()
	if err != nil {
		return nil, err
	}
	return i.X509(id, pub, dnsNames, a.limit(ttl, a.o.X509TTL))
}

// MintJWT returns a JWT-SVID; the TTL is as MintX509's.
func (a *Authority) MintJWT(id spiffeid.ID, audience []string, ttl time.Duration) (svid.Token, error) {
	i, err := a.issuer()
	if err != nil {
		return svid.Token{}, err
	}
	var private map[string]any
	if a.o.Claims != nil {
		if private, err = a.o.Claims.Claims(id, time.Now()); err != nil {
			return svid.Token{}, fmt.Errorf("%w: %w", svid.ErrDenied, err)
		}
	}
	return i.JWTWith(id, audience, a.limit(ttl, a.o.JWTTTL), private)
}

func (a *Authority) limit(ttl, byDefault time.Duration) time.Duration {
	if ttl <= 0 {
		ttl = byDefault
	}
	return min(max(ttl, minTTL), a.LongestTTL())
}

// LongestTTL is what longer TTLs are cut to.
func (a *Authority) LongestTTL() time.Duration { return a.o.CATTL / share }

// issuer returns what signs now. Where that has ended, because the clock
// jumped or the machine slept, it rotates first.
func (a *Authority) issuer() (*svid.Issuer, error) {
	if s := a.signing.Load(); s != nil && s.usable(time.Now()) {
		return s.issuer, nil
	}
	err := a.rotateNow()
	s := a.signing.Load()
	if s != nil && s.usable(time.Now()) {
		return s.issuer, nil
	}
	if err != nil {
		return nil, fmt.Errorf("%w: %w", svid.ErrNotReady, err)
	}
	return nil, svid.ErrNotReady
}

func (s *signing) usable(now time.Time) bool { return s.x509.usable(now) && s.jwt.usable(now) }
