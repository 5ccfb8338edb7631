package svid

import (
	"context"
	"crypto"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/deputy-id/deputy/svid/registry"
)

// A witAuthority signs WIT-SVIDs, which not every Authority does.
type witAuthority interface {
	// WIT returns a WIT-SVID that binds the entry's ID to the public key.
	WIT(context.Context, registry.Entry, crypto.PublicKey) (Token, error)
}

// WITContext is the WIT-SVIDs of one holder: the full state, immutable, and the
// same pointer until it is stale.
type WITContext struct {
	SVIDs []WIT
	stale chan struct{}
}

// Stale is closed when an SVID is due for renewal, or the holder is gone.
func (c *WITContext) Stale() <-chan struct{} { return c.stale }

// heldWIT is what is kept of WIT-SVIDs for one holder; its held's mu guards it.
type heldWIT struct {
	given    []registry.Entry
	snapshot *WITContext
	timer    *time.Timer // makes the snapshot stale
	bonds    []bond      // replaced as a whole
	renewal  chan struct{}
}

// A bond is a WIT-SVID with its term.
type bond struct {
	WIT
	term
}

func (b *bond) serves(e *registry.Entry) bool { return sameBond(&b.Entry, e) }
func (b *bond) under(e registry.Entry)        { b.Entry = e }
func (b *bond) ends() time.Time               { return b.Expires }

// WIT returns the holder's WIT-SVIDs under these entries as X509 does its
// X.509-SVIDs: a key of its own for each, renewed at half-life. They are kept
// apart from those, and so are their keys.
func (k *Keeper) WIT(ctx context.Context, h Holder, entries []registry.Entry) (*WITContext, error) {
	a, ok := k.authority.(witAuthority)
	if !ok {
		return nil, fmt.Errorf("authority signs no WIT-SVIDs: %w", ErrNotReady)
	}
	for {
		kept, err := k.hold(h)
		if err != nil {
			return nil, err
		}
		kept.mu.Lock()
		if kept.wit == nil {
			kept.wit = new(heldWIT)
		}
		w := kept.wit
		if c := w.current(entries); c != nil {
			kept.mu.Unlock()
			return c, nil
		}
		if other := w.renewal; other != nil {
			kept.mu.Unlock()
			select {
			case <-other:
				continue
			case <-ctx.Done():
				return nil, ctx.Err()
			}
		}
		done := make(chan struct{})
		w.renewal = done
		bonds := w.bonds
		kept.mu.Unlock()
		return k.bind(ctx, a, kept, w, entries, bonds, done)
	}
}

// bind makes the next snapshot and closes done.
func (k *Keeper) bind(ctx context.Context, a witAuthority, kept *held, w *heldWIT, entries []registry.Entry, old []bond, done chan struct{}) (*WITContext, error) {
	defer func() {
		kept.mu.Lock()
		w.renewal = nil
		kept.mu.Unlock()
		close(done)
	}()
	bonds, err := renewAll(ctx, k.log, "WIT-SVID", distinctHints(entries), old, func(ctx context.Context, e registry.Entry) (bond, error) {
		return k.bindOne(ctx, a, e)
	})
	kept.mu.Lock()
	defer kept.mu.Unlock()
	if kept.gone {
		return nil, ErrGone
	}
	if err != nil {
		w.bonds = bonds // what was issued beside the one that failed need not be again
		return nil, err
	}
	c := &WITContext{SVIDs: make([]WIT, len(bonds)), stale: make(chan struct{})}
	for i := range bonds {
		c.SVIDs[i] = bonds[i].WIT
	}
	w.retire()
	w.given, w.snapshot, w.bonds = entries, c, bonds
	if at, ok := nextRenewal(bonds); ok {
		w.timer = time.AfterFunc(time.Until(at), func() {
			kept.mu.Lock()
			defer kept.mu.Unlock()
			if w.snapshot == c {
				w.retire()
			}
		})
	}
	return c, nil
}

// bindOne asks the authority for one SVID on a new key.
func (k *Keeper) bindOne(ctx context.Context, a witAuthority, e registry.Entry) (bond, error) {
	if err := ctx.Err(); err != nil {
		return bond{}, err
	}
	key, err := k.keys.take()
	if err != nil {
		return bond{}, err
	}
	issued := time.Now()
	t, err := a.WIT(ctx, e, key.Public())
	if err != nil {
		return bond{}, err
	}
	b := bond{WIT{Entry: e, Token: t.Compact, Expires: t.Expires, Signer: key}, newTerm(t.Issued.Add(-backdate), issued, t.Expires)}
	if b.life <= 0 {
		return bond{}, errors.New("authority returned a token that has expired")
	}
	return b, nil
}

// current returns the snapshot if it is good for these entries.
func (w *heldWIT) current(entries []registry.Entry) *WITContext {
	c := w.snapshot
	if c == nil || closed(c.stale) || len(w.given) != len(entries) {
		return nil
	}
	for i := range entries {
		if !sameBond(&w.given[i], &entries[i]) || w.given[i].Hint != entries[i].Hint {
			return nil
		}
	}
	now := time.Now()
	if slices.ContainsFunc(w.bonds, func(b bond) bool { return b.due(now) }) {
		return nil
	}
	return c
}

// retire makes the snapshot stale.
func (w *heldWIT) retire() {
	if w.timer != nil {
		w.timer.Stop()
		w.timer = nil
	}
	if w.snapshot != nil && !closed(w.snapshot.stale) {
		close(w.snapshot.stale)
	}
}

// sweep is for what timers do not see.
func (w *heldWIT) sweep(now time.Time) {
	if w.snapshot != nil && slices.ContainsFunc(w.bonds, func(b bond) bool { return b.due(now) }) {
		w.retire()
	}
}

// sameBond reports whether one WIT-SVID serves both entries.
func sameBond(a, b *registry.Entry) bool {
	return a.ID == b.ID && a.SPIFFEID == b.SPIFFEID && a.X509TTL == b.X509TTL
}

func closed(c <-chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}
