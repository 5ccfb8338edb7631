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
	first int32 // of the nodes by a fixed segment
	// This node, if it is one by a fixed segment.
	segment string
	next    int32 // its sibling
	others  int32 // how many siblings follow
}

var nothing = node{any: -1, exact: -1, below: -1, first: -1, next: -1}

func newIndex(rules int) index {
	return index{
		nodes:    append(make([]node, 0, 2*rules+1), nothing),
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
			n := &x.nodes[next]
			n.segment, n.next = s.text, x.nodes[at].first
			if n.next >= 0 {
				n.others = x.nodes[n.next].others + 1
			}
			x.nodes[at].first = next
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
	x.nodes = append(x.nodes, nothing)
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
	if n.first >= 0 {
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

// clashes calls report with pairs of rules that share IDs without one's
// containing the other's: with one at least, if there are any.
//
// It walks the tree in pairs of nodes that some ID passes both of. Where rules
// are nested, as they are to be, there are few more pairs than nodes; where they
// are not, the walk may take long, and ends with the context.
func (x *index) clashes(ctx context.Context, report func(a, b int32)) error {
	w := &pairs{index: x, ctx: ctx, report: report}
	w.same(0)
	return w.err
}

// pairs is a walk of clashes.
type pairs struct {
	*index
	ctx    context.Context
	report func(a, b int32)
	steps  int
	err    error
}

// same walks pairs of which both are below one node.
func (w *pairs) same(at int32) {
	n := w.nodes[at]
	for c := n.first; c >= 0; c = w.nodes[c].next {
		w.same(c)
		if n.any >= 0 {
			w.pair(c, n.any, true, false)
		}
	}
	if n.any >= 0 {
		w.same(n.any)
	}
}

// pair walks the pairs below two nodes. aFixed says that a fixed segment led to
// a where a named one led to b; bFixed the reverse.
func (w *pairs) pair(a, b int32, aFixed, bFixed bool) {
	if w.steps++; w.steps%1024 == 0 && w.err == nil {
		if w.err = w.ctx.Err(); w.err != nil {
			w.err = fmt.Errorf("hold rules against each other: %w", w.err)
		}
	}
	if w.err != nil {
		return
	}
	u, v := w.nodes[a], w.nodes[b]
	if aFixed && bFixed {
		w.clash(u.exact, v.exact)
		w.clash(u.below, v.below)
	}
	// A rule that is longer than one with a star is no larger; and if the other
	// has a fixed segment where it has a named one, it is no smaller.
	if aFixed && u.below >= 0 {
		w.clash(u.below, w.under(b))
	}
	if bFixed && v.below >= 0 {
		w.clash(w.under(a), v.below)
	}
	if u.first >= 0 && v.first >= 0 {
		// The shorter list is walked and looked up in the other.
		from, in := a, b
		if w.nodes[u.first].others > w.nodes[v.first].others {
			from, in = b, a
		}
		for c := w.nodes[from].first; c >= 0; c = w.nodes[c].next {
			other, ok := w.branches[branch{in, w.nodes[c].segment}]
			switch {
			case !ok:
			case from == a:
				w.pair(c, other, aFixed, bFixed)
			default:
				w.pair(other, c, aFixed, bFixed)
			}
		}
	}
	if v.any >= 0 {
		for c := u.first; c >= 0; c = w.nodes[c].next {
			w.pair(c, v.any, true, bFixed)
		}
	}
	if u.any >= 0 {
		for c := v.first; c >= 0; c = w.nodes[c].next {
			w.pair(u.any, c, aFixed, true)
		}
		if v.any >= 0 {
			w.pair(u.any, v.any, aFixed, bFixed)
		}
	}
}

func (w *pairs) clash(a, b int32) {
	if a >= 0 && b >= 0 {
		w.report(min(a, b), max(a, b))
	}
}

// under is some rule of longer IDs than those that end at a node, or -1. Every
// leaf is a rule, so the way down finds one.
func (w *pairs) under(at int32) int32 {
	for {
		n := w.nodes[at]
		switch {
		case n.first >= 0:
			at = n.first
		case n.any >= 0:
			at = n.any
		default:
			return -1
		}
		if n = w.nodes[at]; n.exact >= 0 {
			return n.exact
		} else if n.below >= 0 {
			return n.below
		}
	}
}
