package local

import (
	"crypto"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"fmt"
	"slices"
	"time"

	"github.com/hashicorp/go-hclog"
)

const (
	// backdate is how far before its making a key is valid. It is generous,
	// so that a clock set back by less forces no new key, which verifiers
	// elsewhere would not know yet.
	backdate = time.Hour
	// lastResort is the part of a key's life, or of the next one's if that is
	// shorter, at whose end the next key signs even if it was not published for
	// long: the daemon was off meanwhile.
	lastResort = 60
)

// A slot is one key and its times. It is immutable.
type slot struct {
	ID      string        // of a JWT key
	key     crypto.Signer // nil in one that signs no more
	pub     crypto.PublicKey
	chain   []*x509.Certificate // of a CA: its certificate, then those up to the root, without it
	roots   []*x509.Certificate // of a CA: what it is verified with
	Created time.Time
	Expires time.Time
}

func (s *slot) start() time.Time { return s.Created.Add(-backdate) }

func (s *slot) usable(now time.Time) bool {
	return s.key != nil && !now.Before(s.start()) && now.Before(s.Expires)
}

func (s *slot) life() time.Duration { return s.Expires.Sub(s.Created) }

// prepareAt is when the next key is to be made, which lives for ttl: at half of
// the life of s, or later where that is so much shorter by now that the next key
// would end first.
func (s *slot) prepareAt(ttl time.Duration) time.Time {
	half, outlives := s.Created.Add(s.life()/2), s.Expires.Add(time.Second-ttl)
	if outlives.After(half) {
		return outlives
	}
	return half
}

// activateAt is when next is to sign instead of s: a third of the life of s
// after it was published, which is at five sixths of that life if it was made
// in time. One that was made late waits as long as s can still sign. So does one
// that lives for much less: it was made when little of the life of s was left.
func (s *slot) activateAt(next *slot) time.Time {
	at := next.Created.Add(s.life() / 3)
	if last := s.Expires.Add(-min(s.life(), next.life()) / lastResort); last.Before(at) {
		return last
	}
	return at
}

// selfSigned reports whether a CA is its own root.
func (s *slot) selfSigned() bool {
	return len(s.roots) == 1 && len(s.chain) == 1 && s.roots[0].Equal(s.chain[0])
}

// retired is the slot without its private key.
func (s *slot) retired() *slot {
	r := *s
	r.key = nil
	return &r
}

// slots are the keys of one kind.
type slots struct {
	Active   *slot // signs
	Prepared *slot // published, signs next
	Old      []*slot
}

func (s *slots) all() []*slot {
	var all []*slot
	for _, x := range append([]*slot{s.Active, s.Prepared}, s.Old...) {
		if x != nil {
			all = append(all, x)
		}
	}
	return all
}

// take removes from the old keys the first to end of those that fit, can still
// sign and end after the time, and returns it; nil if there is none.
func (s *slots) take(now, after time.Time, fits func(*slot) bool) *slot {
	at := -1
	for i, o := range s.Old {
		if fits(o) && o.usable(now) && o.Expires.After(after) && (at < 0 || o.Expires.Before(s.Old[at].Expires)) {
			at = i
		}
	}
	if at < 0 {
		return nil
	}
	o := s.Old[at]
	s.Old = slices.Delete(s.Old, at, at+1)
	return o
}

// step does what is due at the time, and reports whether it had to let a key
// sign that nobody knows yet, because those of before cannot. What fails to be
// made is left for the next step; the rest is done.
//
// Time may be wrong for a while: a key that it puts out of use keeps its private
// half, and serves again when the clock is right. Only what has ended for sure
// is dropped. A key that does not fit the configuration is followed by one that
// does as soon as that is known well enough.
func (s *slots) step(now time.Time, ttl time.Duration, ended, fits func(*slot) bool, make func(time.Time) (*slot, error)) (forced bool, err error) {
	s.Old = slices.DeleteFunc(slices.Clone(s.Old), ended)
	keep := func(o *slot) {
		if !ended(o) {
			s.Old = append(s.Old, o)
		}
	}
	if s.Prepared != nil && (!s.Prepared.usable(now) || !fits(s.Prepared)) {
		keep(s.Prepared)
		s.Prepared = nil
	}
	if s.Active != nil && !s.Active.usable(now) {
		next := s.Prepared
		if next == nil {
			next = s.take(now, now, fits)
		}
		if next == nil {
			if next, err = make(now); err != nil {
				return false, err
			}
			forced = true
		}
		keep(s.Active)
		s.Active, s.Prepared = next, nil
	}
	if s.Active == nil {
		if s.Active, err = make(now); err != nil {
			return forced, err
		}
	}
	if s.Prepared == nil && (!now.Before(s.Active.prepareAt(ttl)) || !fits(s.Active)) {
		next := s.take(now, s.Active.Expires, fits)
		if next == nil {
			if next, err = make(now); err != nil {
				return forced, err
			}
		}
		if !next.Expires.After(s.Active.Expires) {
			return forced, fmt.Errorf("a new key would end at %s, no later than the one it follows", next.Expires.Format(time.RFC3339))
		}
		s.Prepared = next
	}
	if s.Prepared != nil && !now.Before(s.Active.activateAt(s.Prepared)) {
		keep(s.Active.retired())
		s.Active, s.Prepared = s.Prepared, nil
	}
	return forced, nil
}

// retire leaves of the keys of a kind that is off what verifies SVIDs which may
// be alive.
func (s *slots) retire(ended func(*slot) bool) {
	var left []*slot
	for _, o := range s.all() {
		if o != s.Prepared && !ended(o) { // that one signed nothing
			left = append(left, o.retired())
		}
	}
	*s = slots{Old: left}
}

// tell logs what became of the keys of before.
func (s *slots) tell(log hclog.Logger, was *slots) {
	about := func(k *slot) []any { return []any{"key", k.ID, "ends", k.Expires.UTC().Format(time.RFC3339)} }
	is := func(a, b *slot) bool { return b != nil && a.ID == b.ID }
	switch a := s.Active; {
	case a == nil || is(a, was.Active):
	case was.Active == nil:
		log.Info("first key made", about(a)...)
	default:
		log.Info("next key signs", about(a)...)
	}
	if p := s.Prepared; p != nil && !is(p, was.Prepared) {
		log.Info("next key prepared", append(about(p), "signs_from", s.Active.activateAt(p).UTC().Format(time.RFC3339))...)
	}
	for _, k := range was.all() {
		if !slices.ContainsFunc(s.all(), func(o *slot) bool { return is(o, k) }) {
			log.Info("key dropped", about(k)...)
		}
	}
}

// next is when the next step is due, as far as the time of day says. What has
// passed its end and is kept is for the looks between to drop.
func (s *slots) next(now time.Time, ttl time.Duration) time.Time {
	at := s.Active.prepareAt(ttl)
	if s.Prepared != nil {
		at = s.Active.activateAt(s.Prepared)
	}
	for _, o := range s.Old {
		if o.Expires.After(now) && o.Expires.Before(at) {
			at = o.Expires
		}
	}
	return at
}

func (s *slots) equal(o *slots) bool {
	same := func(a, b *slot) bool {
		if a == nil || b == nil {
			return a == b
		}
		return a.ID == b.ID && (a.key == nil) == (b.key == nil)
	}
	return same(s.Active, o.Active) && same(s.Prepared, o.Prepared) && slices.EqualFunc(s.Old, o.Old, same)
}

// keyID names a public key by its digest.
func keyID(pub crypto.PublicKey) (string, error) {
	der, err := x509.MarshalPKIXPublicKey(pub)
	if err != nil {
		return "", err
	}
	sum := sha256.Sum256(der)
	return base64.RawURLEncoding.EncodeToString(sum[:20]), nil
}
