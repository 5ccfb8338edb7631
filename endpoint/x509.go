package endpoint

import (
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"

	"github.com/deputy-id/deputy/attestor/peer"
	"github.com/deputy-id/deputy/svid"
	"github.com/deputy-id/deputy/svid/registry"
)

// An x509Message is a snapshot as its streams send it.
type x509Message struct {
	ctx  *svid.X509Context
	view *view
	body encoded
}

// A state is what a client has, or is to be sent: the full state, and what
// makes it old.
type state struct {
	body     encoded
	view     *view
	svids    []svid.X509       // X.509 and secret streams only, as the next three
	kept     []svid.X509       // those of them that the evidence neither confirms nor denies
	bundles  *svid.Bundles     // at least those that the entries federate with
	snapshot *svid.X509Context // if it is exactly that
	wits     []svid.WIT        // WIT streams only
	stale    <-chan struct{}   // SVIDs or bundles
	entries  <-chan struct{}
	poll     time.Duration // look again after that, zero: never
	again    bool          // something is unknown: ask again after a while
	doubt    bool          // the process may be entitled to more
}

// fetchX509SVID is one loop: identify, send, wait, and back to identify.
func (s *Server) fetchX509SVID(ctx context.Context, l *link, st grpc.ServerStream) error {
	return s.stream(ctx, l, st, s.x509State)
}

// stream sends states until the client or its process leaves, or there is
// nothing to serve any more.
func (s *Server) stream(ctx context.Context, l *link, st grpc.ServerStream, next func(context.Context, *link, *state) (*state, error)) error {
	return s.follow(st, func(has *state) (*state, error) { return next(ctx, l, has) }, func(has *state, again <-chan time.Time) error {
		_, err := s.wait(ctx, l, has, again, nil)
		return err
	})
}

// follow is stream for whoever asks, and for whomever. wait returns when what
// the client has may be old; an error if the stream is to end.
func (s *Server) follow(st grpc.ServerStream, next func(has *state) (*state, error), wait func(has *state, again <-chan time.Time) error) error {
	var has *state // what the client has
	var clock retry
	defer clock.stop()
	for {
		now, err := next(has)
		switch {
		case err == nil:
			if has == nil || !bytes.Equal(now.body, has.body) {
				if err := st.SendMsg(now.body); err != nil {
					return err
				}
			}
			has = now
		case has == nil || !passing(err):
			return err
		case !has.lives(time.Now()):
			return later(err)
		default:
			// The client keeps what it has while that lives; what could not be
			// found out is not held against it.
			_, has.entries = s.Registry.Set()
			has.stale, has.poll, has.again = nil, 0, true
		}
		clock.set(has)
		if err := wait(has, clock.again); err != nil {
			return err
		}
	}
}

// A retry says when a stream asks again for what is unknown.
type retry struct {
	delay pause
	timer *time.Timer // stopped, or nil, while nothing is unknown
	again <-chan time.Time
}

// set is for what the client has from now on.
func (r *retry) set(has *state) {
	r.stop()
	r.again = nil
	if !has.again {
		r.delay.reset()
		return
	}
	d := r.delay.next()
	if end := has.expires(); !end.IsZero() {
		d = min(d, max(time.Until(end), 0)+time.Millisecond)
	}
	if r.timer == nil {
		r.timer = time.NewTimer(d)
	} else {
		r.timer.Reset(d)
	}
	r.again = r.timer.C
}

func (r *retry) stop() {
	if r.timer != nil {
		r.timer.Stop()
	}
}

// wait returns when what the client has may be old, or with what the client
// says; an error if the stream is to end. has is nil before anything was sent.
func (s *Server) wait(ctx context.Context, l *link, has *state, again <-chan time.Time, said <-chan message) (*message, error) {
	var stale, entries <-chan struct{}
	if has != nil {
		stale, entries = has.stale, has.entries
	}
	select {
	case <-ctx.Done():
		return nil, ctx.Err()
	case <-l.session.proc.Done():
		return nil, l.ended().err()
	case <-s.stopping:
		return nil, errStopping
	case <-stale:
	case <-entries:
	case <-again:
	case m := <-said:
		return &m, m.err
	}
	return nil, nil
}

// An ending is when somebody is gone without whom a stream has no sense.
type ending struct {
	done <-chan struct{} // nil: never
	err  func() error
}

func (l *link) ended() ending {
	return ending{l.session.proc.Done(), func() error {
		l.GoAway(peer.ErrGone.Error()) // a child may hold the connection still
		return peer.ErrGone
	}}
}

// later is an error for a client that had an identity until now: whatever the
// reason that it has none, it may come back for it.
func later(err error) error {
	if code(err) == code(errUnknown) {
		return err
	}
	return fmt.Errorf("%w: %v", errUnknown, err)
}

// expires is when the first of the SVIDs ends, zero if there is none.
func (st *state) expires() time.Time {
	var first time.Time
	for _, x := range st.svids {
		if end := x.Chain[0].NotAfter; first.IsZero() || end.Before(first) {
			first = end
		}
	}
	for _, w := range st.wits {
		if first.IsZero() || w.Expires.Before(first) {
			first = w.Expires
		}
	}
	return first
}

func (st *state) lives(now time.Time) bool {
	end := st.expires()
	return end.IsZero() || now.Before(end)
}

// x509State is holdings as the Workload API has them.
func (s *Server) x509State(ctx context.Context, l *link, has *state) (*state, error) {
	next, err := s.holdings(ctx, l, has)
	if err != nil {
		return nil, err
	}
	if next.snapshot != nil {
		next.body, err = l.session.x509Body(next.snapshot, next.view)
	} else {
		next.body, err = encodeX509(next.svids, next.bundles)
	}
	return next, err
}

// holdings returns the SVIDs that the process is entitled to now, and those
// that it had and that the evidence neither confirms nor denies.
func (s *Server) holdings(ctx context.Context, l *link, has *state) (*state, error) {
	v, entries, err := s.identify(ctx, l, l.session.due())
	if err != nil {
		return nil, err
	}
	kept := v.unsettled(has, time.Now())
	verdict := v.verdict()
	if verdict != nil && len(kept) == 0 {
		if has != nil && verdict == errTraced {
			verdict = later(verdict) // it was served, and is hidden from only while it is traced
		}
		return nil, verdict
	}
	next := &state{view: v, entries: entries, kept: kept, again: len(v.Unknown) > 0 || len(kept) > 0, doubt: len(v.Unknown) > 0 || v.Traced}
	if verdict != nil {
		next.bundles, next.stale = s.Authority.Bundles()
		next.svids = kept
		return next, nil
	}
	if err := s.charge(ctx, l, v, has != nil); err != nil {
		return nil, err
	}
	before := l.session.issued.Load()
	snapshot, err := s.Keeper.X509(ctx, l.session.holder, v.Entries)
	if err != nil {
		return nil, err
	}
	if before == nil || before.ctx != snapshot {
		// Signing may have waited: whoever reads the answer is still the one.
		if err := s.check(l); err != nil {
			return nil, err
		}
	}
	l.session.remember(snapshot, v)
	next.stale, next.bundles = snapshot.Stale(), snapshot.Bundles
	if len(kept) == 0 {
		next.svids, next.snapshot = snapshot.SVIDs, snapshot
	} else {
		next.svids = v.merge(snapshot.SVIDs, kept)
		next.bundles, _ = s.Authority.Bundles() // what is kept may federate with others
	}
	return next, nil
}

// charge takes what the issuing costs from the budget, if there is anything
// to issue.
func (s *Server) charge(ctx context.Context, l *link, v *view, wait bool) error {
	if m := l.session.issued.Load(); m != nil && m.view == v && !closed(m.ctx.Stale()) {
		return nil
	}
	return l.seat.account().mint(ctx, len(v.Entries), wait)
}

// unsettled returns the SVIDs of a state that are neither confirmed nor ruled
// out: their entry is still there, every selector of it is held or unknown, and
// they have not expired. They stay with the client; they are not renewed.
func (v *view) unsettled(has *state, now time.Time) []svid.X509 {
	if has == nil || len(v.Unknown) == 0 && !v.Traced {
		return nil
	}
	return slices.DeleteFunc(slices.Clone(has.svids), func(x svid.X509) bool {
		if slices.ContainsFunc(v.Entries, func(e registry.Entry) bool { return e.ID == x.Entry.ID }) {
			return true
		}
		e, ok := v.set.Entry(x.Entry.ID)
		if !ok || e.Path != x.Entry.Path || e.Revision != x.Entry.Revision || !now.Before(x.Chain[0].NotAfter) {
			return true
		}
		open := v.ev.Traced && !e.AllowTraced
		for _, sel := range e.Selectors {
			switch {
			case v.ev.Has(sel):
			case v.ev.MayHave(sel):
				open = true
			default:
				return true
			}
		}
		return !open && len(v.Unknown) == 0 // a template may still hang on what is unknown
	})
}

// merge puts SVIDs into serving order.
func (v *view) merge(a, b []svid.X509) []svid.X509 {
	place := make(map[string]int)
	for i, e := range v.set.Entries() {
		place[e.ID] = i
	}
	all := slices.Concat(a, b)
	slices.SortStableFunc(all, func(x, y svid.X509) int { return place[x.Entry.ID] - place[y.Entry.ID] })
	return all
}

// x509Body returns the message for a snapshot: made once, whatever the number
// of streams.
func (c *session) x509Body(snapshot *svid.X509Context, v *view) (encoded, error) {
	if m := c.x509.Load(); m != nil && m.ctx == snapshot && m.view == v {
		return m.body, nil
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if m := c.x509.Load(); m != nil && m.ctx == snapshot && m.view == v {
		return m.body, nil
	}
	body, err := encodeX509(snapshot.SVIDs, snapshot.Bundles)
	if err != nil {
		return nil, err
	}
	if m := c.x509.Load(); m != nil && bytes.Equal(m.body, body) {
		body = m.body // streams go on sharing the bytes that they hold already
	}
	if !closed(c.proc.Done()) { // else nobody would drop the keys
		c.x509.Store(&x509Message{ctx: snapshot, view: v, body: body})
	}
	return body, nil
}

var deterministic = proto.MarshalOptions{Deterministic: true}

func encodeX509(svids []svid.X509, bundles *svid.Bundles) (encoded, error) {
	if bundles == nil || bundles.Own == nil {
		return nil, svid.ErrNotReady
	}
	out := &workload.X509SVIDResponse{Svids: make([]*workload.X509SVID, 0, len(svids))}
	for _, x := range svids {
		key, err := x.KeyDER()
		if err != nil {
			return nil, fmt.Errorf("encode key of %s: %w", x.Entry.SPIFFEID, err)
		}
		out.Svids = append(out.Svids, &workload.X509SVID{
			SpiffeId:    x.Entry.SPIFFEID.String(),
			X509Svid:    x.ChainDER(),
			X509SvidKey: key,
			Bundle:      bundles.Own.DER(),
			Hint:        x.Entry.Hint,
		})
		for _, td := range x.Entry.FederatesWith {
			if b, ok := bundles.Federated[td]; ok {
				if out.FederatedBundles == nil {
					out.FederatedBundles = make(map[string][]byte)
				}
				out.FederatedBundles[td.IDString()] = b.DER()
			}
		}
	}
	body, err := deterministic.Marshal(out)
	if err != nil {
		return nil, fmt.Errorf("encode X.509-SVIDs: %w", err)
	}
	return body, nil
}

// jitter changes a time by up to a tenth.
func jitter(d time.Duration) time.Duration {
	return d + time.Duration((rand.Float64()-0.5)*0.2*float64(d))
}
