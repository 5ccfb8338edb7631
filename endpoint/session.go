package endpoint

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"

	"google.golang.org/grpc/codes"

	"github.com/deputy-id/deputy/attestor"
	"github.com/deputy-id/deputy/attestor/peer"
	"github.com/deputy-id/deputy/svid"
	"github.com/deputy-id/deputy/svid/registry"
)

// A session is what the connections of one process share: what its evidence
// matched, and the messages that were made of that. It ends with the process.
type session struct {
	s      *Server
	proc   *peer.Process
	holder svid.Holder

	view    atomic.Pointer[view]
	issued  atomic.Pointer[issued]
	x509    atomic.Pointer[x509Message]
	secrets atomic.Pointer[secrets]
	wit     atomic.Pointer[witMessage]
	bundles atomic.Pointer[bundleMessage]

	mu      sync.Mutex // guards what follows; held while a message is made, never while one waits
	links   map[*link]struct{}
	refresh *refresh

	place func() string // whose budget the process draws on before it is attested; "" if nobody knows
}

// A view is what a process is entitled to by one evidence and one set of
// entries. It is immutable.
type view struct {
	ev  *attestor.Evidence
	set *registry.Set
	registry.Match
}

// issued is the last snapshot of SVIDs, and by what it was asked for.
type issued struct {
	ctx  *svid.X509Context
	view *view
}

// remember keeps a snapshot as the last one.
func (c *session) remember(snapshot *svid.X509Context, v *view) {
	if m := c.issued.Load(); m != nil && m.ctx == snapshot && m.view == v {
		return
	}
	if !closed(c.proc.Done()) { // else nobody would drop the keys
		c.issued.Store(&issued{snapshot, v})
	}
}

// verdict says why there is nothing to serve, nil if there is something.
func (v *view) verdict() error {
	switch {
	case len(v.Entries) > 0:
		return nil
	case len(v.Unknown) > 0:
		return errUnknown // not "no": the entry may be one of those that depend on it
	case v.Traced:
		return errTraced
	}
	return errNoIdentity
}

// join returns the session of the connection's process.
func (s *Server) join(l *link) *session {
	proc := l.Process()
	s.mu.Lock()
	defer s.mu.Unlock()
	c, ok := s.sessions[proc.ID()]
	if !ok || c.proc != proc {
		c = &session{
			s: s, proc: proc,
			holder: svid.Holder{ID: proc.ID(), Gone: proc.Done()},
			links:  make(map[*link]struct{}),
			place:  sync.OnceValue(func() string { return owner(proc) }),
		}
		s.sessions[proc.ID()] = c
		go c.end()
	}
	c.mu.Lock()
	c.links[l] = struct{}{}
	c.mu.Unlock()
	return c
}

// owner looks where the process stands, which takes no runtime's answer.
func owner(p *peer.Process) string {
	place, err := attestor.PlaceOf(p)
	if err != nil {
		return ""
	}
	return place.Owner
}

func (c *session) leave(l *link) {
	c.mu.Lock()
	delete(c.links, l)
	c.mu.Unlock()
}

// end drops the session, with the keys in its messages, when the process is
// gone, and the connections that a child of it still holds.
func (c *session) end() {
	<-c.proc.Done()
	c.s.mu.Lock()
	if c.s.sessions[c.proc.ID()] == c {
		delete(c.s.sessions, c.proc.ID())
	}
	c.s.mu.Unlock()

	c.mu.Lock()
	links := make([]*link, 0, len(c.links))
	for l := range c.links {
		links = append(links, l)
	}
	c.mu.Unlock()
	for _, l := range links {
		l.GoAway(peer.ErrGone.Error())
	}
}

// match returns what the evidence gives by these entries. Of entries with the
// same hint the first counts (SPIFFE Workload API §5.2.1): the others are not
// served at all, neither as X.509 nor as JWT.
func (c *session) match(ev *attestor.Evidence, set *registry.Set) *view {
	if v := c.view.Load(); v != nil && v.ev == ev && v.set == set {
		return v
	}
	v := &view{ev: ev, set: set, Match: set.Match(ev)}
	v.Entries = uniqueHints(v.Entries)
	c.view.Store(v)
	return v
}

func uniqueHints(entries []registry.Entry) []registry.Entry {
	seen := make(map[string]bool, len(entries))
	return slices.DeleteFunc(slices.Clone(entries), func(e registry.Entry) bool {
		if e.Hint == "" {
			return false
		}
		again := seen[e.Hint]
		seen[e.Hint] = true
		return again
	})
}

// A refresh gathers evidence anew, once for all streams of a process.
type refresh struct {
	because any // the snapshot, or the evidence, that is no longer good
	done    chan struct{}
	err     error // once done
}

// gather returns the refresh for this reason when it has ended: the one that
// there is, or a new one where that failed or was of no use.
func (c *session) gather(ctx context.Context, because any, useless *refresh, turn chan struct{}) (*refresh, error) {
	c.mu.Lock()
	r := c.refresh
	if r == nil || r.because != because || r == useless || r.failed() {
		r = &refresh{because: because, done: make(chan struct{})}
		c.refresh = r
		go func() {
			defer close(r.done)
			// Others wait for the answer too: it does not end with this call.
			// The attestors have deadlines of their own.
			ctx := context.WithoutCancel(ctx)
			if r.err = enter(ctx, turn); r.err == nil {
				_, r.err = c.s.Attestors.Refresh(ctx, c.proc)
				<-turn
			}
		}()
	}
	c.mu.Unlock()
	select {
	case <-r.done:
		return r, r.err
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}

func (r *refresh) failed() bool { return closed(r.done) && r.err != nil }

// identify finds out what the process behind the connection is entitled to
// now. because is nil, or what makes kept evidence too old. The channel closes
// when entries changed.
func (s *Server) identify(ctx context.Context, l *link, because any) (*view, <-chan struct{}, error) {
	set, stale := s.Registry.Set()
	var ev *attestor.Evidence
	if because == nil {
		ev = s.Attestors.Kept(l.Conn)
	}
	if ev == nil {
		var err error
		if ev, err = s.attest(ctx, l, because); err != nil {
			return nil, nil, err
		}
	}
	if err := l.seat.move(ev.Owner); err != nil {
		l.GoAway(err.Error())
		return nil, nil, err
	}
	return l.session.match(ev, set), stale, nil
}

// attest asks what the process is. It returns only what is said of the program
// and the credentials that opened the connection: what was gathered for another
// stream, or is on its way to all who wait, may be of those that the process had
// before.
func (s *Server) attest(ctx context.Context, l *link, because any) (*attestor.Evidence, error) {
	const tries = 2 // the first may find what others gathered, which holds no more
	var useless *refresh
	for range tries {
		if err := s.check(l); err != nil {
			return nil, err
		}
		var err error
		turn := l.seat.account().attesting
		if because != nil {
			useless, err = l.session.gather(ctx, because, useless, turn)
		} else if err = enter(ctx, turn); err == nil {
			_, err = s.Attestors.Attest(ctx, l.session.proc)
			<-turn
		}
		if err != nil && code(err) == codes.Internal {
			err = fmt.Errorf("%w: %v", errUnknown, err) // the process did not hold still
		}
		if err != nil {
			return nil, err
		}
		if ev := s.Attestors.Kept(l.Conn); ev != nil {
			return ev, nil
		}
	}
	if err := s.check(l); err != nil {
		return nil, err
	}
	return nil, fmt.Errorf("%w: the process changed while it was attested", errUnknown)
}

// check closes a connection that no longer belongs to the program that opened
// it. The client opens another, on which its process is attested anew.
func (s *Server) check(l *link) error {
	err := l.Check()
	if err != nil {
		l.GoAway(err.Error())
	}
	return err
}

// due returns the last snapshot if one of its SVIDs wants renewal, which is
// when evidence is gathered anew; nil else. A bundle that changed does not count.
func (c *session) due() any {
	m := c.issued.Load()
	if m == nil || !c.s.overdue(m.ctx) {
		return nil
	}
	return m.ctx
}

// overdue reports whether an SVID of the snapshot wants renewal.
func (s *Server) overdue(x *svid.X509Context) bool {
	if !closed(x.Stale()) {
		return false
	}
	now, _ := s.Authority.Bundles()
	if now.Own != x.Bundles.Own {
		return false
	}
	for td, b := range x.Bundles.Federated {
		if now.Federated[td] != b {
			return false
		}
	}
	return true
}

func closed(c <-chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}
