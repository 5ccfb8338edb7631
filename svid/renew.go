package svid

import (
	"context"
	"fmt"
	"math/rand/v2"
	"slices"
	"time"

	"github.com/hashicorp/go-hclog"

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

func (l *leaf) serves(e *registry.Entry) bool { return sameCertificate(&l.Entry, e) }
func (l *leaf) under(e registry.Entry)        { l.Entry = e }
func (l *leaf) ends() time.Time               { return l.Chain[0].NotAfter }

// renewable is what is issued under an entry and renewed: a leaf or a bond.
type renewable[L any] interface {
	*L
	due(time.Time) bool
	expired(time.Time) bool
	postpone() time.Duration
	serves(*registry.Entry) bool // may be kept under this entry
	under(registry.Entry)        // is kept under it
	ends() time.Time
}

// renewAll returns one per entry: what is good already, else a new one. Where
// that cannot be had, one that is due stays as long as it lives; an error comes
// with those that there are. kind is their name in words.
func renewAll[L any, P renewable[L]](ctx context.Context, log hclog.Logger, kind string, entries []registry.Entry, old []L,
	issue func(context.Context, registry.Entry) (L, error)) ([]L, error) {
	all := make([]L, 0, len(entries))
	var missing error
	for _, e := range entries {
		i := slices.IndexFunc(old, func(one L) bool { return P(&one).serves(&e) })
		if i >= 0 && !P(&old[i]).due(time.Now()) {
			one := old[i]
			P(&one).under(e)
			all = append(all, one)
			continue
		}
		one, err := issue(ctx, e)
		switch {
		case err == nil:
		case i >= 0 && !P(&old[i]).expired(time.Now()):
			one = old[i]
			P(&one).under(e)
			if ctx.Err() == nil {
				wait := P(&one).postpone()
				log.Warn("renewal failed, keeping the SVID", "kind", kind, "entry", e.ID, "spiffe_id", e.SPIFFEID.String(),
					"expires", P(&one).ends(), "retry_in", wait.Round(time.Millisecond), "error", err)
			}
		default:
			if missing == nil {
				missing = fmt.Errorf("issue %s for entry %s: %w", kind, e.ID, err)
			}
			continue
		}
		all = append(all, one)
	}
	return all, missing
}

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
