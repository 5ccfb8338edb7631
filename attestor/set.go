package attestor

import (
	"context"
	"errors"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/go-hclog"

	"github.com/deputy-id/deputy/attestor/peer"
)

const (
	// keepFor is how long evidence serves at most: a change that nothing shows,
	// as in /etc/passwd, reaches a new call after it.
	keepFor = time.Minute
	// retryAfter is how long evidence with something unknown in it serves: long
	// enough that a runtime which is down is not asked by every call.
	retryAfter = time.Second
	// gatherFor is how long a source may take.
	gatherFor = 5 * time.Second
)

// A Set asks its sources side by side and keeps what they said for as long as
// the process has not changed. It is safe for concurrent use.
type Set struct {
	log     hclog.Logger
	demand  func() Demand
	sources []*source

	mu        sync.RWMutex
	processes map[uint64]*record // by peer.Process.ID
	sweepAt   int                // size at which the ended ones are dropped
}

// NewSet returns the set of these sources. demand is asked at each attestation
// which costly selectors are wanted; nil wants all of them.
func NewSet(log hclog.Logger, demand func() Demand, sources ...Source) *Set {
	s := &Set{log: log, demand: orAll(demand), processes: make(map[uint64]*record), sweepAt: minRecords}
	for _, src := range sources {
		s.sources = append(s.sources, newSource(src))
	}
	return s
}

// Attest returns what is known of the process. What it kept is returned again,
// the same pointer, while credentials, parent, cgroup and program and all that
// the sources rested on (RestOn) are unchanged, it is younger than a minute (a
// second, if something in it is unknown), and it covers the demand; otherwise
// the sources are asked. An error is the process's own end (ErrGone), that of
// the context, or a process that does not stay the same for long enough to be
// looked at; a source that fails makes its types unknown.
func (s *Set) Attest(ctx context.Context, p *peer.Process) (*Evidence, error) {
	r := s.record(p)
	if k := r.kept.Load(); k != nil && k.evidence.Demand.Covers(s.demand()) {
		switch err := k.holds(p); {
		case err == nil:
			return k.evidence, nil
		case errors.Is(err, peer.ErrGone):
			s.forget(p, r)
			return nil, ErrGone
		}
	}
	return s.join(ctx, p, r)
}

// Kept is Attest without the gathering, for the process of a connection: it
// returns what was kept while that may be used, and nil where the sources would
// have to be asked. The one look that this takes answers for the connection as
// well: what is returned is evidence of the program and the credentials that
// opened it, and they are those of the process now, as by peer.Conn.Check.
func (s *Set) Kept(c *peer.Conn) *Evidence {
	p := c.Process()
	k := s.record(p).kept.Load()
	if k == nil || !k.evidence.Demand.Covers(s.demand()) || !k.look.opened(c) || k.holds(p) != nil {
		return nil
	}
	return k.evidence
}

// Refresh is Attest without what was kept: for the rotation of a key.
func (s *Set) Refresh(ctx context.Context, p *peer.Process) (*Evidence, error) {
	return s.join(ctx, p, s.record(p))
}

// Close lets go of all that is kept, for a set that others have replaced. No
// Attest may follow; a gathering that is under way keeps nothing.
func (s *Set) Close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, r := range s.processes {
		r.drop()
	}
	clear(s.processes)
}

// A record is what the set has of one process.
type record struct {
	kept atomic.Pointer[kept]
	done <-chan struct{} // of the process: after it the record is of no use

	mu     sync.Mutex
	flight *flight // the gathering under way, nil while there is none
	ended  bool    // dropped from the set: keeps nothing any more
}

// A flight is one gathering, which all that ask meanwhile wait for.
type flight struct {
	landed   chan struct{} // closed when the rest is set
	evidence *Evidence
	err      error
}

// record returns the record of the process.
func (s *Set) record(p *peer.Process) *record {
	s.mu.RLock()
	r := s.processes[p.ID()]
	s.mu.RUnlock()
	if r != nil && r.done == p.Done() {
		return r
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if r := s.processes[p.ID()]; r != nil {
		if r.done == p.Done() {
			return r
		}
		r.drop() // the table had let go of the process, and pinned it again
	}
	if len(s.processes) >= s.sweepAt {
		s.sweepLocked()
	}
	r = &record{done: p.Done()}
	s.processes[p.ID()] = r
	return r
}

// minRecords is how many records there are before the first sweep.
const minRecords = 64

// sweepLocked drops the records of processes that have ended. It runs when
// there are twice as many as it last left, so that it costs each process
// little and nothing waits for an exit.
func (s *Set) sweepLocked() {
	for id, r := range s.processes {
		select {
		case <-r.done:
			r.drop()
			delete(s.processes, id)
		default:
		}
	}
	s.sweepAt = max(minRecords, 2*len(s.processes))
}

// forget drops the record of a process that has ended.
func (s *Set) forget(p *peer.Process, r *record) {
	s.mu.Lock()
	if s.processes[p.ID()] == r {
		delete(s.processes, p.ID())
	}
	s.mu.Unlock()
	r.drop()
}

// drop lets go of what the record keeps, for good.
func (r *record) drop() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.ended = true
	r.kept.Swap(nil).release()
}

// join waits for a gathering that covers the demand, and starts one if none is
// under way. A gathering outlives the caller that began it: others wait for it
// too, and what it finds is kept.
func (s *Set) join(ctx context.Context, p *peer.Process, r *record) (*Evidence, error) {
	for {
		want := s.demand()
		f := s.board(ctx, p, r, want)
		select {
		case <-f.landed:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
		if f.err != nil || f.evidence.Demand.Covers(want) {
			return f.evidence, f.err
		}
	}
}

// board returns the gathering under way.
func (s *Set) board(ctx context.Context, p *peer.Process, r *record, want Demand) *flight {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.flight != nil {
		return r.flight
	}
	f := &flight{landed: make(chan struct{})}
	r.flight = f
	held := p.Hold()
	go func() {
		defer held.Close()
		k, err := s.gather(context.WithoutCancel(ctx), held, want)
		s.land(held, r, f, k, err)
	}()
	return f
}

// land publishes the outcome of a gathering.
func (s *Set) land(p *peer.Process, r *record, f *flight, k *kept, err error) {
	if k != nil {
		f.evidence = k.evidence
	}
	f.err = err
	r.mu.Lock()
	r.flight = nil
	if r.ended {
		k.release()
	} else {
		r.kept.Swap(k).release()
	}
	r.mu.Unlock()
	close(f.landed)
	if errors.Is(err, ErrGone) {
		s.forget(p, r)
	}
}

func searchSelectors(sorted []Selector, s Selector) (int, bool) {
	return slices.BinarySearchFunc(sorted, s, Selector.Compare)
}
