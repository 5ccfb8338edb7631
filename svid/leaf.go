package svid

import (
	"time"

	"github.com/deputy-id/deputy/svid/registry"
)

// A leaf is an SVID with what its renewal needs. It is judged by both clocks:
// the wall clock, which verifiers go by, and the monotonic one, so that an SVID
// does not live longer because somebody set the clock back.
type leaf struct {
	X509
	issued   time.Time // wall and monotonic
	life     time.Duration
	renew    time.Duration // after issued
	failures int           // renewals that failed, one after the other
	retry    time.Time     // no attempt before, if any failed
}

func (l *leaf) certifies(e *registry.Entry) bool { return sameCertificate(&l.Entry, e) }

// due reports whether the leaf is to be renewed now.
func (l *leaf) due(now time.Time) bool {
	if l.expired(now) {
		return true
	}
	if l.failures > 0 && now.Before(l.retry) {
		return false
	}
	return passed(l.issued, l.renew, now) || now.Before(l.Chain[0].NotBefore)
}

func (l *leaf) expired(now time.Time) bool { return passed(l.issued, l.life, now) }

// next is when the leaf will be due, as far as the monotonic clock knows.
func (l *leaf) next() time.Time {
	if l.failures == 0 {
		return l.issued.Add(l.renew)
	}
	if end := l.issued.Add(l.life); end.Before(l.retry) {
		return end
	}
	return l.retry
}

// nextRenewal is when the first of the leaves will be due.
func nextRenewal(leaves []leaf) (at time.Time, ok bool) {
	for i := range leaves {
		if t := leaves[i].next(); !ok || t.Before(at) {
			at, ok = t, true
		}
	}
	return at, ok
}

// passed reports whether d has passed since start by either clock.
func passed(start time.Time, d time.Duration, now time.Time) bool {
	return now.Sub(start) >= d || now.Round(0).Sub(start.Round(0)) >= d
}
