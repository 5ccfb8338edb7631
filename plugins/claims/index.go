package claims

import (
	"context"
	"fmt"
)

// An index finds rules by the segments of an ID. It is a tree with a branch for
// each segment, kept in one map: a map for each of a hundred thousand nodes
// would take longer to make than the rules to read.
type index struct {
	nodes    []node
	branches map[branch]int32
}

// A branch leads from a node by a fixed segment.
type branch struct {
	from    int32
	segment string
}

// A node is what the segments so far lead to. Its numbers are -1 for nothing.
type node struct {
	any   int32 // the node by a named segment
	exact int32 // the rule that ends here
	below int32 // the rule of all that is below
	fixed bool  // whether branches lead on
}

func newIndex(rules int) index {
	return index{
		nodes:    append(make([]node, 0, 2*rules+1), node{-1, -1, -1, false}),
		branches: make(map[branch]int32, 2*rules),
	}
}

// add enters a rule. Where one with the same IDs is there already it returns
// the number of that one.
func (x *index) add(p *pattern, n int) (same int, ok bool) {
	at := int32(0)
	for _, s := range p.segments {
		if s.named {
			if x.nodes[at].any < 0 {
				x.nodes[at].any = x.grow()
			}
			at = x.nodes[at].any
			continue
		}
		b := branch{at, s.text}
		next, ok := x.branches[b]
		if !ok {
			next = x.grow()
			x.branches[b] = next
			x.nodes[at].fixed = true
		}
		at = next
	}
	to := &x.nodes[at].exact
	if p.below {
		to = &x.nodes[at].below
	}
	if *to >= 0 {
		return int(*to), false
	}
	*to = int32(n)
	return n, true
}

func (x *index) grow() int32 {
	x.nodes = append(x.nodes, node{-1, -1, -1, false})
	return int32(len(x.nodes) - 1)
}

// find returns the most specific rule of these segments, or -1. All rules that
// an ID has contain one another, so the one that is fixed where the others are
// not is the smallest: a fixed segment is tried before a named one, and what is
// below a node last.
func (x *index) find(segments []string) int {
	if len(x.nodes) == 0 {
		return -1
	}
	return int(x.from(0, segments))
}

func (x *index) from(at int32, segments []string) int32 {
	n := &x.nodes[at]
	if len(segments) == 0 {
		return n.exact
	}
	if n.fixed {
		if next, ok := x.branches[branch{at, segments[0]}]; ok {
			if found := x.from(next, segments[1:]); found >= 0 {
				return found
			}
		}
	}
	if n.any >= 0 {
		if found := x.from(n.any, segments[1:]); found >= 0 {
			return found
		}
	}
	return n.below
}

// clashes calls report with each pair of rules that share IDs without one's
// containing the other's. Whether two rules may be such a pair shows in their
// shapes, of which there are few: with thousands of them, which nobody writes,
// it ends with the context.
func clashes(ctx context.Context, rules []rule, report func(a, b int)) error {
	shapes := make(map[string][]int32)
	var order []string
	for i := range rules {
		s := rules[i].shape()
		if _, ok := shapes[s]; !ok {
			order = append(order, s)
		}
		shapes[s] = append(shapes[s], int32(i))
	}
	var key []byte
	keyOf := func(n int32, at []int) string {
		key = key[:0]
		for _, i := range at {
			key = append(append(key, rules[n].segments[i].text...), '/')
		}
		return string(key)
	}
	for i, a := range order {
		for _, b := range order[i+1:] {
			if ctx.Err() != nil {
				return fmt.Errorf("hold rules of %d shapes against each other: %w", len(order), ctx.Err())
			}
			o := compare(a, b)
			if !o.possible || o.nested {
				continue
			}
			small, large := shapes[a], shapes[b]
			if len(small) > len(large) {
				small, large = large, small
			}
			by := make(map[string]int32, len(small))
			for _, n := range small {
				k := keyOf(n, o.both)
				if _, ok := by[k]; !ok {
					by[k] = n
				}
			}
			for _, n := range large {
				if m, ok := by[keyOf(n, o.both)]; ok {
					report(int(min(n, m)), int(max(n, m)))
				}
			}
		}
	}
	return nil
}
