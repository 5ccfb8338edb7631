package local

import (
	"bytes"
	"context"
	"crypto"
	"crypto/x509"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/deputy-id/deputy/internal/durable"
	"github.com/deputy-id/deputy/svid"
)

const (
	// lookAgain is how often Run looks at the clock even if nothing is due:
	// timers see neither a jump of the wall clock nor a suspended machine.
	lookAgain = time.Minute
	// A rotation that failed is tried again after this, doubled each time.
	retryFirst = time.Second
	retryMost  = time.Minute
	// maxHint is the longest that verifiers are told to wait between two looks
	// at the bundle, unless the options say otherwise.
	maxHint = 5 * time.Minute
)

// Run rotates the keys as they fall due, until the context ends.
func (a *Authority) Run(ctx context.Context) error {
	timer := time.NewTimer(0)
	defer timer.Stop()
	retry := retryFirst
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-timer.C:
		case <-a.rotated:
		}
		now := time.Now()
		var wait time.Duration
		if err := a.rotate(now); err != nil {
			wait, retry = retry, min(2*retry, retryMost)
			a.log.Warn("key rotation failed, signing with the keys there are", "error", err, "retry_in", wait)
		} else {
			retry = retryFirst
			a.mu.Lock()
			wait = min(max(a.state.next(now, a.o.CATTL).Sub(now.Round(0)), time.Millisecond), lookAgain)
			a.mu.Unlock()
		}
		timer.Reset(wait)
	}
}

// rotate takes whatever steps are due. What it makes is stored first, then
// published, and only then signs; when storing fails all stays as it was.
func (a *Authority) rotate(now time.Time) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	err := a.rotateLocked(now.Round(0)) // certificates and files know the wall clock alone
	a.failure, a.failedAt = err, time.Now()
	return err
}

// watchEnds notes when keys that are new to it will have ended whatever becomes
// of the wall clock: by the monotonic one, after the life that they seem to
// have left, which is no more than all of it and, for one that seems to have
// ended, as much as what it signed may have left. The caller holds mu, or is Open.
func (a *Authority) watchEnds(s *state, now time.Time) {
	all := slices.Concat(s.X509.all(), s.JWT.all(), s.WIT.all())
	ends := make(map[string]time.Time, len(all))
	for _, k := range all {
		end, known := a.ends[k.ID]
		if !known {
			left := k.Expires.Sub(now)
			if left <= 0 {
				left = k.life() / share
			}
			end = time.Now().Add(min(left, k.life()))
		}
		ends[k.ID] = end
	}
	a.ends = ends
}

// ended reports whether a key, and all that it signed, has ended for sure: by
// both clocks. A clock that runs ahead for an hour must not cost anybody an
// authority; one that is not valid yet was made by such a clock.
func (a *Authority) ended(s *slot, now time.Time) bool {
	end, known := a.ends[s.ID]
	if !known || time.Now().Before(end) {
		return false
	}
	return !now.Before(s.Expires) || now.Before(s.start())
}

// fits reports whether a CA hangs under an upstream just where one is
// configured, which may have changed since it was made.
func (a *Authority) fits(ca *slot) bool { return ca.selfSigned() != a.o.Upstream.given() }

// rotateNow is rotate for a caller who cannot sign otherwise. It is not tried
// more than once a second, so that a full disk does not make each call write.
func (a *Authority) rotateNow() error {
	a.mu.Lock()
	recent := a.failure != nil && time.Since(a.failedAt) < retryFirst
	err := a.failure
	a.mu.Unlock()
	if recent {
		return err
	}
	return a.rotate(time.Now())
}

func (a *Authority) rotateLocked(now time.Time) error {
	next := *a.state
	a.watchEnds(&next, now)
	var failed error
	type kind struct {
		name  string
		slots *slots
		fits  func(*slot) bool
		make  func(time.Time) (*slot, error)
	}
	ended := func(o *slot) bool { return a.ended(o, now) }
	every := func(*slot) bool { return true }
	kinds := []kind{{"X.509", &next.X509, a.fits, a.makeCA}, {"JWT", &next.JWT, every, a.makeTokenKey}}
	if a.o.WIT {
		kinds = append(kinds, kind{"WIT", &next.WIT, every, a.makeTokenKey})
	} else {
		next.WIT.retire(ended)
	}
	for _, k := range kinds {
		forced, err := k.slots.step(now, a.o.CATTL, ended, k.fits, k.make)
		if err != nil && failed == nil {
			failed = fmt.Errorf("rotate %s key: %w", k.name, err)
		}
		if forced {
			a.log.Warn("no key of before can sign, using a new one at once", "kind", k.name)
		}
	}
	if next.X509.Active == nil || next.JWT.Active == nil {
		return failed
	}
	if !sameAuthorities(a.bundle(a.state), a.bundle(&next)) {
		next.Sequence++
	}
	if next.equal(a.state) {
		return failed
	}
	if a.stored() {
		data, err := next.encode(a.o.TrustDomain)
		if err != nil {
			return err
		}
		if err := durable.WriteFile(a.path(stateFile), data, 0o600); err != nil {
			return err
		}
	}
	was := a.state
	if err := a.use(&next); err != nil {
		return err
	}
	for _, k := range []struct {
		name    string
		was, is *slots
	}{{"X.509", &was.X509, &next.X509}, {"JWT", &was.JWT, &next.JWT}, {"WIT", &was.WIT, &next.WIT}} {
		k.is.tell(a.log.With("kind", k.name, "sequence", next.Sequence), k.was)
	}
	select {
	case a.rotated <- struct{}{}:
	default:
	}
	return failed
}

// use publishes and signs with a state that is stored. The caller holds mu, or
// is Open.
func (a *Authority) use(s *state) error {
	o := svid.IssuerOptions{
		TrustDomain: a.o.TrustDomain,
		CAKey:       s.X509.Active.key,
		CAChain:     s.X509.Active.chain,
		JWTKey:      s.JWT.Active.key,
		JWTKeyID:    s.JWT.Active.ID,
		JWTUntil:    s.JWT.Active.Expires,
		JWTIssuer:   a.o.JWTIssuer,
	}
	if wit := s.WIT.Active; wit != nil {
		o.WITKey, o.WITKeyID, o.WITUntil = wit.key, wit.ID, wit.Expires
	}
	issuer, err := svid.NewIssuer(o)
	if err != nil {
		return err
	}
	published, _ := a.published.Load()
	if own := published.Own; own == nil || own.Sequence != s.Sequence {
		a.published.Store(&svid.Bundles{Own: a.bundle(s), Federated: published.Federated})
	}
	a.state = s
	a.signing.Store(&signing{issuer: issuer, x509: s.X509.Active, jwt: s.JWT.Active})
	return nil
}

// bundle is what the state publishes: the roots of every key that signs, will
// sign, or has signed something that is alive.
func (a *Authority) bundle(s *state) *svid.Bundle {
	b := &svid.Bundle{
		TrustDomain:    a.o.TrustDomain,
		Sequence:       s.Sequence,
		JWTAuthorities: make(map[string]crypto.PublicKey),
		WITAuthorities: make(map[string]crypto.PublicKey),
		RefreshHint:    a.o.RefreshHint,
	}
	for _, c := range s.X509.all() {
		for _, root := range c.roots {
			if !slices.ContainsFunc(b.X509Authorities, root.Equal) {
				b.X509Authorities = append(b.X509Authorities, root)
			}
		}
	}
	for _, k := range s.JWT.all() {
		b.JWTAuthorities[k.ID] = k.pub
	}
	for _, k := range s.WIT.all() {
		b.WITAuthorities[k.ID] = k.pub
	}
	slices.SortFunc(b.X509Authorities, func(x, y *x509.Certificate) int { return bytes.Compare(x.Raw, y.Raw) })
	return b
}

// sameAuthorities compares JWT and WIT keys by their IDs, which are digests of them.
func sameAuthorities(a, b *svid.Bundle) bool {
	same := func(crypto.PublicKey, crypto.PublicKey) bool { return true }
	return slices.EqualFunc(a.X509Authorities, b.X509Authorities, (*x509.Certificate).Equal) &&
		maps.EqualFunc(a.JWTAuthorities, b.JWTAuthorities, same) && maps.EqualFunc(a.WITAuthorities, b.WITAuthorities, same)
}
