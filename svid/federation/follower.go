package federation

import (
	"cmp"
	"context"
	"crypto"
	"errors"
	"fmt"
	"math/bits"
	"math/rand/v2"
	"net"
	"slices"
	"strings"
	"sync"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/hashicorp/go-hclog"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/deputy-id/deputy/svid"
)

// store keeps the bundles of other trust domains, over a restart, and publishes
// them; local.Authority is what does.
type store interface {
	Bundles() (*svid.Bundles, <-chan struct{})
	// UpdateFederated puts what next makes of the bundle there is in its place.
	// Nobody else changes it meanwhile, be it an operator who revokes. It refuses
	// our own bundle with svid.ErrOurs.
	UpdateFederated(td spiffeid.TrustDomain, next func(had *svid.Bundle) (*svid.Bundle, error)) error
}

// A Follower keeps the bundles of other trust domains fresh. It is safe for
// concurrent use.
type Follower struct {
	store   store
	dial    dial
	log     hclog.Logger
	changed chan struct{} // tells Run that there are tracks to start

	mu     sync.Mutex // guards tracks, their states, and that only one of tracks is stored
	tracks map[spiffeid.TrustDomain]*track
}

// A track is one relationship with its schedule.
type track struct {
	Relationship
	now     chan chan error // asks for a fetch at once
	end     chan struct{}   // closed when the relationship is no longer there
	started bool            // of Run

	state Status
	since time.Time // of the last success, or the first look
}

// Status is how a relationship stands.
type Status struct {
	Relationship
	Bundle   *svid.Bundle // in force; nil: there is none yet
	Fetched  time.Time    // when the endpoint answered last since the start; zero: never
	Next     time.Time    // when it is asked again
	Failures int          // in a row, up to now
	Err      error        // of the last, in words fit for a terminal; nil if it went well
	Stale    bool         // the bundle may lack a key that signs already
}

// NewFollower returns one that follows nobody yet.
func NewFollower(s store, log hclog.Logger) *Follower {
	return &Follower{store: s, dial: (&net.Dialer{}).DialContext, log: log, changed: make(chan struct{}, 1), tracks: make(map[spiffeid.TrustDomain]*track)}
}

// Follow replaces the relationships. Those that are as before go on as they
// were. The bundle of one that is gone stays until it is deleted, and nothing
// fetched for it is stored after Follow returns.
func (f *Follower) Follow(all []Relationship) {
	kept, _ := f.store.Bundles()
	f.mu.Lock()
	defer f.mu.Unlock()
	next := make(map[spiffeid.TrustDomain]*track, len(all))
	for _, r := range all {
		if had, ok := f.tracks[r.TrustDomain]; ok && had.same(r) {
			next[r.TrustDomain] = had
			continue
		}
		next[r.TrustDomain] = &track{
			Relationship: r,
			now:          make(chan chan error),
			end:          make(chan struct{}),
			state:        Status{Relationship: r},
		}
	}
	for td, had := range f.tracks {
		if next[td] != had {
			close(had.end)
		}
		if _, ok := next[td]; !ok && kept.Federated[td] != nil {
			f.log.Warn("trust domain is no longer followed; its bundle stays as it is until it is deleted (deputy bundle delete)", "trust_domain", td.Name())
		}
	}
	f.tracks = next
	select {
	case f.changed <- struct{}{}:
	default:
	}
}

// Run fetches bundles as they fall due, until the context ends.
func (f *Follower) Run(ctx context.Context) error {
	var running sync.WaitGroup
	defer running.Wait()
	for {
		f.mu.Lock()
		for _, t := range f.tracks {
			if !t.started {
				t.started = true
				running.Go(func() { f.follow(ctx, t) })
			}
		}
		f.mu.Unlock()
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-f.changed:
		}
	}
}

// Relationships returns how each stands, in the order of their names.
func (f *Follower) Relationships() []Status {
	all, _ := f.store.Bundles()
	f.mu.Lock()
	defer f.mu.Unlock()
	var list []Status
	for _, t := range f.tracks {
		s := t.state
		s.Bundle = all.Federated[t.TrustDomain]
		list = append(list, s)
	}
	slices.SortFunc(list, func(a, b Status) int { return cmp.Compare(a.TrustDomain.Name(), b.TrustDomain.Name()) })
	return list
}

// Follows reports whether there is a relationship with the trust domain.
func (f *Follower) Follows(td spiffeid.TrustDomain) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	_, ok := f.tracks[td]
	return ok
}

// Refresh fetches a bundle now and returns how that went; ErrNotFollowed says
// that there is no such relationship.
func (f *Follower) Refresh(ctx context.Context, td spiffeid.TrustDomain) error {
	f.mu.Lock()
	t, ok := f.tracks[td]
	f.mu.Unlock()
	if !ok {
		return fmt.Errorf("%s: %w", td, ErrNotFollowed)
	}
	done := make(chan error, 1)
	select {
	case t.now <- done:
	case <-t.end:
		return fmt.Errorf("%s: %w", td, ErrNotFollowed)
	case <-ctx.Done():
		return ctx.Err()
	}
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
		return ctx.Err()
	}
}

// follow is the life of one relationship.
func (f *Follower) follow(ctx context.Context, t *track) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	go func() {
		select {
		case <-t.end:
			cancel()
		case <-ctx.Done():
		}
	}()
	f.bootstrap(t)
	var asked chan error // by whom; nil: by the clock
	for {
		all, _ := f.store.Bundles()
		changed, err := f.poll(ctx, t, all)
		if asked != nil {
			asked <- err
			asked = nil
		}
		if ctx.Err() != nil {
			return
		}
		timer := time.NewTimer(f.note(t, changed, err))
		for waiting := true; waiting; {
			// What could not be verified may be as soon as there is another
			// bundle to verify it with, of this domain or of the endpoint's.
			var stale <-chan struct{}
			if err != nil && !t.EndpointID.IsZero() {
				var now *svid.Bundles
				if now, stale = f.store.Bundles(); t.trust(now) != t.trust(all) {
					break
				}
			}
			select {
			case <-ctx.Done():
				timer.Stop()
				return
			case <-timer.C:
				waiting = false
			case asked = <-t.now:
				waiting = false
			case <-stale:
			}
		}
		timer.Stop()
	}
}

// bootstrap puts the configured bundle in force where there is none. Where one
// is, even one that trusts nobody any more, an old file must not undo that.
func (f *Follower) bootstrap(t *track) {
	if t.Bootstrap == nil {
		return
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.tracks[t.TrustDomain] != t {
		return
	}
	first := false
	err := f.store.UpdateFederated(t.TrustDomain, func(had *svid.Bundle) (*svid.Bundle, error) {
		if had != nil {
			return had, nil
		}
		first = true
		return t.Bootstrap, nil
	})
	switch {
	case err != nil:
		f.log.Error("bootstrap bundle is not stored", "trust_domain", t.TrustDomain.Name(), "error", err)
		return
	case !first:
		return
	}
	f.log.Info("bootstrap bundle in force", "trust_domain", t.TrustDomain.Name(), "sequence", t.Bootstrap.Sequence)
}

// poll fetches and stores once, and reports whether the bundle is another one.
func (f *Follower) poll(ctx context.Context, t *track, all *svid.Bundles) (changed bool, err error) {
	got, err := f.dial.fetch(ctx, t.Relationship, all)
	if err == nil {
		if got.moved {
			f.log.Warn("bundle endpoint says that it has moved for good; the configured URL stays in use", "trust_domain", t.TrustDomain.Name(), "url", t.where())
		}
		changed, err = f.take(ctx, t, got.bundle)
	}
	if err != nil {
		return false, &failure{err, clip(err.Error())}
	}
	return changed, nil
}

// A failure is an error with what a stranger may have put into its words, in a
// certificate for one, made harmless.
type failure struct {
	err  error
	text string
}

func (f *failure) Error() string { return f.text }
func (f *failure) Unwrap() error { return f.err }

// take stores a bundle that is no older than the one there is (§4.2). One
// without a number is as new as it was fetched; so is one that is other than the
// last under the same number, which its publisher should not do.
func (f *Follower) take(ctx context.Context, t *track, b *svid.Bundle) (changed bool, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if ctx.Err() != nil || f.tracks[t.TrustDomain] != t {
		return false, ErrNotFollowed
	}
	log := f.log.With("trust_domain", t.TrustDomain.Name(), "url", t.where(), "sequence", b.Sequence)
	var before *svid.Bundle
	var refused error
	err = f.store.UpdateFederated(t.TrustDomain, func(had *svid.Bundle) (*svid.Bundle, error) {
		before = had
		switch {
		case had == nil:
		case b.Sequence != 0 && b.Sequence < had.Sequence:
			refused = fmt.Errorf("%w: its sequence is %d, after %d", ErrOlder, b.Sequence, had.Sequence)
			return had, nil
		case had.Equal(b):
			return had, nil
		}
		changed = true
		return b, nil
	})
	switch {
	case refused != nil:
		return false, refused
	case errors.Is(err, svid.ErrOurs):
		return false, err
	case err != nil:
		return false, fmt.Errorf("store bundle: %w", err)
	case !changed:
		return false, nil
	}
	if before != nil && b.Sequence != 0 && b.Sequence == before.Sequence && !sameAuthorities(before, b) {
		log.Warn("bundle changed under the same sequence number")
	}
	if len(b.X509Authorities)+len(b.JWTAuthorities)+len(b.WITAuthorities) == 0 {
		log.Warn("bundle is empty: its trust domain has revoked all of its keys")
		return true, nil
	}
	log.Info("bundle followed", "x509_authorities", len(b.X509Authorities), "jwt_authorities", len(b.JWTAuthorities), "gone", gone(before, b))
	return true, nil
}

// note writes down how a fetch went and returns how long to wait. What heals by
// itself is logged, ever more rarely, as a warning; a server that is the wrong
// one, and a bundle that may lack keys by now, as an error.
func (f *Follower) note(t *track, changed bool, err error) time.Duration {
	all, _ := f.store.Bundles()
	b := all.Federated[t.TrustDomain]
	f.mu.Lock()
	defer f.mu.Unlock()
	s := &t.state
	turn := interval(b)
	wait := turn - rand.N(turn/10+1) // not all followers at once, and none later than it is told
	if changed {
		wait = max(wait, pause)
	}
	log := f.log.With("trust_domain", t.TrustDomain.Name(), "url", t.where())
	now := time.Now()
	if t.since.IsZero() {
		t.since = now
	}
	if err == nil {
		if s.Failures > 0 {
			log.Info("bundle endpoint answers again", "after_failures", s.Failures)
		}
		log.Debug("bundle fetched")
		s.Failures, s.Err, s.Stale, s.Fetched, t.since = 0, nil, false, now, now
	} else {
		had, wasStale := s.Err, s.Stale
		s.Failures, s.Err = s.Failures+1, err
		s.Stale = s.Failures >= staleAfter && now.Sub(t.since) >= (staleAfter-1)*turn*9/10
		if s.Fetched.IsZero() {
			wait = min(wait, retryFirst<<min(s.Failures-1, 12))
		}
		// At the first, at the one that makes it urgent, at each doubling, and
		// when the reason is another.
		if s.Stale != wasStale || bits.OnesCount(uint(s.Failures)) == 1 || had == nil || kind(had) != kind(err) {
			f.complain(log, s, b)
		}
	}
	s.Next = now.Add(wait)
	return wait
}

func (f *Follower) complain(log hclog.Logger, s *Status, b *svid.Bundle) {
	log = log.With("error", s.Err, "failures", s.Failures)
	if b != nil {
		log = log.With("sequence", b.Sequence)
		if end := lastEnd(b); !end.IsZero() {
			log = log.With("x509_authorities_end", end.UTC().Format(time.RFC3339))
		}
	}
	switch k := kind(s.Err); {
	case k == ErrNoTrust:
		log.Error("bundle endpoint cannot be verified")
	case k == ErrWrongServer && b == nil:
		log.Error("bundle endpoint is not believed, and there is no bundle yet")
	case k == ErrWrongServer:
		log.Error("bundle endpoint is not believed, the last good bundle stays")
	case k != nil && b == nil:
		log.Error("bundle is not believed, and there is none yet")
	case k != nil:
		log.Error("bundle is not believed, the last good one stays")
	case b == nil:
		log.Warn("bundle is not there yet")
	case s.Stale:
		log.Error("bundle is stale, the last good one stays: keys may sign by now that it does not have")
	default:
		log.Warn("bundle was not fetched, the last good one stays")
	}
}

// kind is which of the errors that a person must look at this is, nil if it is
// none.
func kind(err error) error {
	for _, k := range []error{ErrWrongServer, ErrOlder, svid.ErrOurs, ErrNoTrust} {
		if errors.Is(err, k) {
			return k
		}
	}
	return nil
}

// clip bounds what a stranger can make us write, to printable characters.
func clip(s string) string {
	const most = 300
	more := ""
	if len(s) > most {
		s, more = s[:most], "…"
	}
	return strings.Map(func(r rune) rune {
		if r == utf8.RuneError || !unicode.IsPrint(r) {
			return '?'
		}
		return r
	}, s) + more
}

func sameAuthorities(a, b *svid.Bundle) bool {
	return gone(a, b)+gone(b, a) == 0
}

// gone counts the authorities that one bundle has and the next has not.
func gone(had, b *svid.Bundle) (n int) {
	if had == nil {
		return 0
	}
	for _, c := range had.X509Authorities {
		if !slices.ContainsFunc(b.X509Authorities, c.Equal) {
			n++
		}
	}
	for _, keys := range [][2]map[string]crypto.PublicKey{{had.JWTAuthorities, b.JWTAuthorities}, {had.WITAuthorities, b.WITAuthorities}} {
		for id, k := range keys[0] {
			if o, ok := keys[1][id]; !ok || !equal(k, o) {
				n++
			}
		}
	}
	return n
}

func equal(a, b crypto.PublicKey) bool {
	k, ok := a.(interface{ Equal(crypto.PublicKey) bool })
	return ok && k.Equal(b)
}

// lastEnd is when the last X.509 authority ends; zero if there is none.
func lastEnd(b *svid.Bundle) (end time.Time) {
	for _, c := range b.X509Authorities {
		if c.NotAfter.After(end) {
			end = c.NotAfter
		}
	}
	return end
}
