package endpoint

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"

	"github.com/deputy-id/deputy/attestor"
	"github.com/deputy-id/deputy/attestor/peer"
	"github.com/deputy-id/deputy/svid"
	"github.com/deputy-id/deputy/svid/registry"
)

// A caller asks for SVIDs of somebody else.
type caller interface {
	// check returns nil while the caller may have them. It is asked before the
	// evidence is looked at, and once more before a key leaves.
	check(context.Context) error
	account() *account
	ended() ending
}

// A subject is whom an SVID is for that a caller asks for. Where it is a
// process, it was pinned when the caller named it: nothing is looked up by its
// PID again.
type subject interface {
	// attest says what is known of it now, gathered anew or as it was kept: the
	// same pointer while nothing has changed.
	attest(ctx context.Context, anew bool) (*attestor.Evidence, error)
	// poll is how soon a stream asks again: nobody tells.
	poll() time.Duration
	ended() ending
	close()
}

// errSubject says that whom the caller named is not there, or not any more.
var errSubject = &fault{errNotFound, "the workload is not there"}

// errEnded is errSubject for a stream that had served it: the way in which they
// end, and nothing to log.
var errEnded = &fault{errSubject, errSubject.text}

// A running is a subject that is a process.
type running struct {
	s       *Server
	p       *peer.Process
	account *account // of the caller, who makes us look
}

// pin pins the process that has this PID now.
func (s *Server) pin(pid int32, a *account) (*running, error) {
	switch {
	case pid <= 0:
		return nil, badReference("PID %d is not one", pid)
	case int(pid) == os.Getpid():
		return nil, &fault{errNoIdentity, "PID is the daemon's own"}
	}
	// A process costs nearly as many descriptors as a connection does.
	most := int64(max(s.Limits.Connections/4, 4))
	r := &running{s: s, account: a}
	switch all, own := s.pins.Add(1), a.pins.Add(1); {
	case all > most:
		r.unpin()
		return nil, fmt.Errorf("%w: too many processes are held for others", errBudget)
	case own > most*3/4:
		r.unpin()
		return nil, fmt.Errorf("%w: too many processes are held for the same caller", errBudget)
	}
	var err error
	if r.p, err = s.open(pid); err != nil {
		r.unpin()
		return nil, err
	}
	return r, nil
}

func (r *running) unpin() {
	r.account.pins.Add(-1)
	r.s.pins.Add(-1)
}

// open pins a process that is a workload.
func (s *Server) open(pid int32) (*peer.Process, error) {
	p, err := s.Processes.Open(pid)
	switch {
	case errors.Is(err, peer.ErrGone), errors.Is(err, fs.ErrNotExist),
		errors.Is(err, unix.EINVAL): // a thread's number
		return nil, errSubject
	case err != nil:
		return nil, err
	}
	if _, err := p.Readlink("exe"); err != nil {
		p.Close()
		switch {
		case errors.Is(err, peer.ErrGone):
			return nil, errSubject
		case errors.Is(err, fs.ErrNotExist):
			return nil, &fault{errNoIdentity, "process has no executable: a kernel thread"}
		}
		return nil, err
	}
	return p, nil
}

func (r *running) attest(ctx context.Context, anew bool) (*attestor.Evidence, error) {
	if err := enter(ctx, r.account.attesting); err != nil {
		return nil, err
	}
	defer func() { <-r.account.attesting }()
	ask := r.s.Attestors.Attest
	if anew {
		ask = r.s.Attestors.Refresh
	}
	ev, err := ask(ctx, r.p)
	switch {
	case errors.Is(err, attestor.ErrGone), errors.Is(err, peer.ErrGone), r.p.Alive() != nil:
		return nil, errSubject
	case err != nil && ctx.Err() == nil:
		return nil, fmt.Errorf("%w: %v", errUnknown, err)
	case err != nil:
		return nil, err
	}
	return ev, nil
}

// processPoll is how soon it is seen that a process, the subject's or a
// delegate's, executed another program, or moved.
const processPoll = 5 * time.Second

func (*running) poll() time.Duration { return processPoll }

func (r *running) ended() ending {
	return ending{r.p.Done(), func() error { return errEnded }}
}

func (r *running) close() {
	r.p.Close()
	r.unpin()
}

// told is a subject that the caller described: its word is the evidence.
type told struct{ ev *attestor.Evidence }

// maxTold bounds how many selectors a subject is described by.
const maxTold = 256

func newTold(selectors []attestor.Selector) (told, error) {
	if len(selectors) > maxTold {
		return told{}, invalid("%d selectors, at most %d describe a workload", len(selectors), maxTold)
	}
	for _, s := range selectors {
		if _, err := attestor.ParseSelector(s.String()); err != nil {
			return told{}, invalid("%v", err)
		}
	}
	sorted := slices.Compact(slices.SortedFunc(slices.Values(selectors), attestor.Selector.Compare))
	return told{&attestor.Evidence{Selectors: sorted, Gathered: time.Now()}}, nil
}

func (t told) attest(context.Context, bool) (*attestor.Evidence, error) { return t.ev, nil }

func (told) poll() time.Duration { return processPoll } // of the delegate

func (told) ended() ending { return ending{} }
func (told) close()        {}

// A loan is what one stream or call hands to a caller for a subject. It has
// keys of its own: what somebody else holds is never a key that the subject, or
// another stream, has.
type loan struct {
	s       *Server
	caller  caller
	subject subject
	encode  func([]svid.X509, *svid.Bundles) (encoded, error)
	empty   bool // nothing is an answer, too

	holder svid.Holder
	gone   chan struct{}
	last   *svid.X509Context
	view   *view
}

func (s *Server) lend(c caller, sub subject) *loan {
	gone := make(chan struct{})
	return &loan{s: s, caller: c, subject: sub, gone: gone, holder: svid.Holder{ID: s.loans.Add(1), Gone: gone}}
}

// close drops the keys.
func (o *loan) close() {
	close(o.gone)
	o.subject.close()
}

// stream sends states until caller or subject is gone.
func (o *loan) stream(ctx context.Context, st grpc.ServerStream, next func(context.Context, *state) (*state, error)) error {
	return o.s.followFor(ctx, st, o.caller.ended(), o.subject.ended(), func(has *state) (*state, error) { return next(ctx, has) })
}

// followFor is follow for a caller and a subject.
func (s *Server) followFor(ctx context.Context, st grpc.ServerStream, caller, subject ending, next func(*state) (*state, error)) error {
	var borrowers <-chan struct{}
	look := func(has *state) (*state, error) {
		_, borrowers = s.borrowers.Load()
		return next(has)
	}
	return s.follow(st, look, func(has *state, again <-chan time.Time) error {
		var poll <-chan time.Time
		if has.poll > 0 {
			timer := time.NewTimer(jitter(has.poll))
			defer timer.Stop()
			poll = timer.C
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-caller.done:
			return caller.err()
		case <-subject.done:
			return subject.err()
		case <-s.stopping:
			return errStopping
		case <-has.stale:
		case <-has.entries:
		case <-borrowers:
		case <-poll:
		case <-again:
		}
		return nil
	})
}

// identify finds out what the subject is entitled to now, for a caller that
// may know. The state has what makes that old.
func (o *loan) identify(ctx context.Context, anew bool) (*view, *state, error) {
	set, entries := o.s.Registry.Set()
	if err := o.caller.check(ctx); err != nil {
		return nil, nil, err
	}
	ev, err := o.subject.attest(ctx, anew)
	switch {
	case errors.Is(err, errSubject) && o.view != nil:
		return nil, nil, errEnded
	case err != nil:
		return nil, nil, err
	}
	if v := o.view; v == nil || v.ev != ev || v.set != set {
		v = &view{ev: ev, set: set, Match: set.Match(ev)}
		if _, ok := o.subject.(told); ok {
			// What a template or an instance says must have been attested: a word
			// alone would choose the ID.
			v.Entries = slices.DeleteFunc(v.Entries, func(e registry.Entry) bool {
				return e.Instance || strings.Contains(e.Path, "{{")
			})
		}
		v.Entries = uniqueHints(v.Entries)
		o.view = v
	}
	return o.view, &state{view: o.view, entries: entries, poll: o.subject.poll(), again: len(o.view.Unknown) > 0}, nil
}

// confirm returns nil if caller and subject are still what they were when the
// view was made: signing may have waited.
func (o *loan) confirm(ctx context.Context, v *view) error {
	if err := o.caller.check(ctx); err != nil {
		return err
	}
	ev, err := o.subject.attest(ctx, false)
	switch {
	case err != nil:
		return err
	case ev == v.ev:
		return nil
	}
	now := v.set.Match(ev)
	for _, e := range v.Entries {
		if !slices.ContainsFunc(now.Entries, func(n registry.Entry) bool { return n.ID == e.ID && n.SPIFFEID == e.SPIFFEID }) {
			return fmt.Errorf("%w: the workload changed while its SVID was signed", errUnknown)
		}
	}
	return nil
}

// x509State is as that of a session.
func (o *loan) x509State(ctx context.Context, has *state) (*state, error) {
	v, next, err := o.identify(ctx, o.last != nil && o.s.overdue(o.last))
	if err != nil {
		return nil, err
	}
	kept := v.unsettled(has, time.Now())
	verdict := v.verdict()
	switch {
	case verdict == nil:
	case len(kept) > 0:
		next.again = true
		bundles, stale := o.s.Authority.Bundles()
		next.stale, next.svids = stale, kept
		next.body, err = o.encode(kept, bundles)
		return next, err
	case verdict == errNoIdentity && o.empty:
		bundles, _ := o.s.Authority.Bundles()
		next.body, err = o.encode(nil, bundles)
		return next, err
	case has != nil && verdict == errTraced:
		return nil, later(verdict)
	default:
		return nil, verdict
	}
	next.again = next.again || len(kept) > 0
	if o.last == nil || has == nil || has.view != v || closed(o.last.Stale()) {
		if err := o.caller.account().mint(ctx, len(v.Entries), has != nil); err != nil {
			return nil, err
		}
	}
	snapshot, err := o.s.Lent.X509(ctx, o.holder, v.Entries)
	if err != nil {
		return nil, err
	}
	if snapshot != o.last || has == nil || has.view != v { // else it has what it is to have
		if err := o.confirm(ctx, v); err != nil {
			return nil, err
		}
	}
	o.last = snapshot
	bundles := snapshot.Bundles
	if len(kept) > 0 {
		bundles, _ = o.s.Authority.Bundles() // what is kept may federate with others
	}
	next.stale, next.svids = snapshot.Stale(), v.merge(snapshot.SVIDs, kept)
	next.body, err = o.encode(next.svids, bundles)
	return next, err
}

// A lentToken is a JWT-SVID with the entry that it was issued under.
type lentToken struct {
	registry.Entry
	svid.Token
}

// bundleState is as that of a session.
func (o *loan) bundleState(ctx context.Context, has *state, pick func(*bundleMessage) encoded) (*state, error) {
	v, next, err := o.identify(ctx, false)
	if err != nil {
		return nil, err
	}
	if err := v.verdict(); err != nil {
		if has == nil || !passing(err) {
			return nil, err
		}
		next.view, next.again = has.view, true
	}
	bundles, stale := o.s.Authority.Bundles()
	if !ready(bundles) {
		return nil, svid.ErrNotReady
	}
	next.stale = stale
	m, err := o.s.encodeBundles(bundles, next.view)
	if err != nil {
		return nil, err
	}
	next.body = pick(m)
	return next, nil
}

// tokens returns a JWT-SVID, signed for this call, per entry of the subject
// that may have one.
func (o *loan) tokens(ctx context.Context, id spiffeid.ID, audiences []string) ([]lentToken, error) {
	v, _, err := o.identify(ctx, false)
	if err != nil {
		return nil, err
	}
	if err := v.verdict(); err != nil {
		return nil, err
	}
	entries, err := v.forToken(id, audiences)
	if err != nil {
		return nil, err
	}
	if err := o.caller.account().mint(ctx, len(entries), false); err != nil {
		return nil, err
	}
	audiences = slices.Compact(slices.Sorted(slices.Values(audiences)))
	out := make([]lentToken, 0, len(entries))
	for _, e := range entries {
		token, err := o.s.Authority.JWT(ctx, e, audiences)
		if err != nil {
			return nil, fmt.Errorf("issue JWT-SVID for entry %s: %w", e.ID, err)
		}
		out = append(out, lentToken{e, token})
	}
	if err := o.confirm(ctx, v); err != nil {
		return nil, err
	}
	return out, nil
}
