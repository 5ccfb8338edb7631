package attestor

import (
	"context"
	"sync"
)

// A turnstile lets one at a time through for each key, so that one client's
// work waits for that client's alone.
type turnstile[K comparable] struct {
	mu    sync.Mutex
	lanes map[K]*lane
}

type lane struct {
	slot  chan struct{} // holds one value while somebody is through
	users int           // those through and those waiting; of the turnstile, under its lock
}

// enter waits for its turn. leave must be called once it is over.
func (t *turnstile[K]) enter(ctx context.Context, key K) (leave func(), err error) {
	t.mu.Lock()
	if t.lanes == nil {
		t.lanes = make(map[K]*lane)
	}
	l := t.lanes[key]
	if l == nil {
		l = &lane{slot: make(chan struct{}, 1)}
		t.lanes[key] = l
	}
	l.users++
	t.mu.Unlock()

	gone := func() {
		t.mu.Lock()
		defer t.mu.Unlock()
		if l.users--; l.users == 0 {
			delete(t.lanes, key)
		}
	}
	select {
	case l.slot <- struct{}{}:
		return func() { <-l.slot; gone() }, nil
	case <-ctx.Done():
		gone()
		return nil, context.Cause(ctx)
	}
}
