package svid

import (
	"slices"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/deputy-id/deputy/svid/registry"
)

// held is what is kept for one holder.
type held struct {
	mu       sync.Mutex // guards what follows
	gone     bool
	given    []registry.Entry       // what the snapshot was made for
	others   []spiffeid.TrustDomain // whose bundles it holds beside our own
	snapshot *X509Context
	timer    *time.Timer   // makes the snapshot stale
	leaves   []leaf        // replaced as a whole
	renewal  chan struct{} // closes when the one that is under way ends
	tokens   map[tokenKey]*token
	minting  map[tokenKey]chan struct{}
	wit      *heldWIT // nil: none was asked for
}

// hold returns what is kept for the holder, at first nothing.
func (k *Keeper) hold(h Holder) (*held, error) {
	select {
	case <-h.Gone:
		return nil, ErrGone
	default:
	}
	k.mu.RLock()
	kept, ok := k.holders[h.ID]
	k.mu.RUnlock()
	if ok {
		return kept, nil
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	if kept, ok := k.holders[h.ID]; ok {
		return kept, nil
	}
	kept = &held{}
	k.holders[h.ID] = kept
	go func() {
		<-h.Gone
		k.drop(h.ID, kept)
	}()
	if !k.watching {
		k.watching = true
		go k.watch()
	}
	return kept, nil
}

func (k *Keeper) drop(id uint64, kept *held) {
	k.mu.Lock()
	delete(k.holders, id)
	last := len(k.holders) == 0
	k.mu.Unlock()
	if last {
		select {
		case k.emptied <- struct{}{}:
		default:
		}
	}
	kept.mu.Lock()
	defer kept.mu.Unlock()
	kept.gone = true
	kept.retire()
	kept.snapshot, kept.given, kept.leaves, kept.tokens = nil, nil, nil, nil
	if kept.wit != nil {
		kept.wit.retire()
		kept.wit.snapshot, kept.wit.given, kept.wit.bonds = nil, nil, nil
	}
}

// watch makes snapshots stale when a bundle in them changed, or the clock
// jumped, until no holder is left.
func (k *Keeper) watch() {
	tick := time.NewTicker(sweepEvery)
	defer tick.Stop()
	for {
		_, stale := k.authority.Bundles()
		k.sweep(time.Now())
		select {
		case <-stale:
		case <-tick.C:
		case <-k.emptied:
		}
		k.mu.Lock()
		if len(k.holders) == 0 {
			k.watching = false
			k.mu.Unlock()
			return
		}
		k.mu.Unlock()
	}
}

func (k *Keeper) sweep(now time.Time) {
	k.mu.RLock()
	all := make([]*held, 0, len(k.holders))
	for _, kept := range k.holders {
		all = append(all, kept)
	}
	k.mu.RUnlock()
	for _, kept := range all {
		kept.mu.Lock()
		if c := kept.snapshot; c != nil {
			b, err := k.bundles(kept.others)
			changed := err == nil && !b.same(c.Bundles)
			if changed || slices.ContainsFunc(kept.leaves, func(l leaf) bool { return l.due(now) }) {
				kept.retire()
			}
		}
		if kept.wit != nil {
			kept.wit.sweep(now)
		}
		kept.mu.Unlock()
	}
}

// current returns the snapshot if it is good for these entries. The caller
// holds mu.
func (h *held) current(entries []registry.Entry) *X509Context {
	c := h.snapshot
	if c == nil || len(h.given) != len(entries) {
		return nil
	}
	for i := range entries {
		if !sameService(&h.given[i], &entries[i]) {
			return nil
		}
	}
	select {
	case <-c.stale:
		return nil
	default:
	}
	now := time.Now()
	for i := range h.leaves {
		if h.leaves[i].due(now) {
			return nil
		}
	}
	return c
}

// retire makes the snapshot stale. The caller holds mu.
func (h *held) retire() {
	if h.timer != nil {
		h.timer.Stop()
		h.timer = nil
	}
	if h.snapshot == nil {
		return
	}
	select {
	case <-h.snapshot.stale:
	default:
		close(h.snapshot.stale)
	}
}
