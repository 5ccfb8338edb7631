// Package watch publishes immutable values. A reader takes the value together
// with a channel that closes when the value is no longer the newest, and waits
// on that channel beside whatever else it waits for: there are no callbacks
// and nothing to unsubscribe.
//
// What is published must not change afterwards; the publisher owes its readers
// a new value instead.
package watch

import "sync"

// Value holds the newest T. Make one with New.
type Value[T any] struct {
	mu    sync.RWMutex // guards v and stale
	v     T
	stale chan struct{}
}

// New returns a Value that holds v.
func New[T any](v T) *Value[T] {
	return &Value[T]{v: v, stale: make(chan struct{})}
}

// Load returns the newest value and the channel that closes when it is stale.
func (w *Value[T]) Load() (T, <-chan struct{}) {
	w.mu.RLock()
	defer w.mu.RUnlock()
	return w.v, w.stale
}

// Store publishes v and wakes all who wait on the value before it.
func (w *Value[T]) Store(v T) {
	w.mu.Lock()
	old := w.stale
	w.v, w.stale = v, make(chan struct{})
	w.mu.Unlock()
	close(old)
}
