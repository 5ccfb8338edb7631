package registry

import (
	"hash/maphash"
	"maps"
)

// shards is how many parts a table has: a change copies one of them.
const shards = 256

var seed = maphash.MakeSeed()

// A table is a map of which cheap changed copies can be made: a copy shares
// all parts with the original but the one that the changed key is in.
type table[K comparable, V any] struct {
	parts [shards]map[K]V
}

func part[K comparable](k K) uint64 { return maphash.Comparable(seed, k) % shards }

func (t *table[K, V]) get(k K) V { return t.parts[part(k)][k] }

// put changes the table itself: only while nobody else has it.
func (t *table[K, V]) put(k K, v V) {
	p := &t.parts[part(k)]
	if *p == nil {
		*p = make(map[K]V)
	}
	(*p)[k] = v
}

// with returns a copy in which k has the value v.
func (t *table[K, V]) with(k K, v V) *table[K, V] {
	next := t.own(k)
	next.put(k, v)
	return next
}

// without returns a copy in which k has no value.
func (t *table[K, V]) without(k K) *table[K, V] {
	next := t.own(k)
	delete(next.parts[part(k)], k)
	return next
}

func (t *table[K, V]) own(k K) *table[K, V] {
	next := *t
	next.parts[part(k)] = maps.Clone(t.parts[part(k)])
	return &next
}
