package svid

import (
	"math/rand/v2"
	"time"

	"github.com/deputy-id/deputy/svid/registry"
)

// A term is the life of what was issued, with what its renewal needs. It is
// judged by both clocks: the wall clock, which verifiers go by, and the
// monotonic one, so that nothing lives longer because somebody set the clock
// back.
type term struct {
	begins   time.Time
	issued   time.Time // wall and monotonic
	life     time.Duration
	renew    time.Duration // after issued
	failures int           // renewals that failed, one after the other
	retry    time.Time     // no attempt before, if any failed
}

// newTerm is renewed at half of its life, ±10 %, so that what was issued at
// once is not renewed at once.
func newTerm(begins, issued, ends time.Time) term {
	life := ends.Sub(issued)
	return term{begins: begins, issued: issued, life: life, renew: time.Duration(float64(life) * (0.45 + 0.1*rand.Float64()))}
}

// due reports whether it is to be renewed now.
func (t *term) due(now time.Time) bool {
	if t.expired(now) {
		return true
	}
	if t.failures > 0 && now.Before(t.retry) {
		return false
	}
	return passed(t.issued, t.renew, now) || now.Before(t.begins)
}

func (t *term) expired(now time.Time) bool { return passed(t.issued, t.life, now) }

// next is when it will be due, as far as the monotonic clock knows.
func (t *term) next() time.Time {
	if t.failures == 0 {
		return t.issued.Add(t.renew)
	}
	if end := t.issued.Add(t.life); end.Before(t.retry) {
		return end
	}
	return t.retry
}

// postpone notes a renewal that failed, and returns how long nobody tries again.
func (t *term) postpone() time.Duration {
	t.failures++
	wait := backoff(t.failures)
	t.retry = time.Now().Add(wait)
	return wait
}

// A leaf is an X.509-SVID with its term.
type leaf struct {
	X509
	term
}

func (l *leaf) certifies(e *registry.Entry) bool { return sameCertificate(&l.Entry, e) }

// nextRenewal is when the first of them will be due.
func nextRenewal[L any, P interface {
	*L
	next() time.Time
}](all []L) (at time.Time, ok bool) {
	for i := range all {
		if t := P(&all[i]).next(); !ok || t.Before(at) {
			at, ok = t, true
		}
	}
	return at, ok
}

// passed reports whether d has passed since start by either clock.
func passed(start time.Time, d time.Duration, now time.Time) bool {
	return now.Sub(start) >= d || now.Round(0).Sub(start.Round(0)) >= d
}
