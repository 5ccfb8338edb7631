package claims

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"
)

// shape is all of a pattern but the text of its segments.
func (p *pattern) shape() string {
	b := make([]byte, 0, 32)
	for _, s := range p.segments {
		if s.named {
			b = append(b, '?')
		} else {
			b = append(b, '=')
		}
	}
	if p.below {
		b = append(b, '*')
	}
	return string(b)
}

// An overlap is how the sets of two shapes may lie to one another.
type overlap struct {
	possible bool  // some ID may be in both
	nested   bool  // if one is, one set contains the other
	both     []int // segments that are fixed in both
}

func compare(a, b string) (o overlap) {
	a, aBelow := strings.CutSuffix(a, "*")
	b, bBelow := strings.CutSuffix(b, "*")
	switch {
	case !aBelow && !bBelow:
		o.possible = len(a) == len(b)
	case !aBelow:
		o.possible = len(a) > len(b)
	case !bBelow:
		o.possible = len(b) > len(a)
	default:
		o.possible = true
	}
	if !o.possible {
		return o
	}
	aInB := bBelow && len(a) >= len(b) || !aBelow && !bBelow
	bInA := aBelow && len(b) >= len(a) || !aBelow && !bBelow
	for i := range min(len(a), len(b)) {
		switch {
		case a[i] == '=' && b[i] == '=':
			o.both = append(o.both, i)
		case a[i] == '=':
			bInA = false
		case b[i] == '=':
			aInB = false
		}
	}
	o.nested = aInB || bInA
	return o
}

// clash holds two patterns against each other segment by segment.
func clash(a, b *pattern) bool {
	o := compare(a.shape(), b.shape())
	for _, i := range o.both {
		if a.segments[i].text != b.segments[i].text {
			return false
		}
	}
	return o.possible && !o.nested
}

// has says, without an index, whether an ID is a pattern's.
func (p *pattern) has(segments []string) bool {
	if len(segments) < len(p.segments) || p.below == (len(segments) == len(p.segments)) {
		return false
	}
	for i, s := range p.segments {
		if !s.named && s.text != segments[i] {
			return false
		}
	}
	return true
}

// The index finds a clash if and only if two of the rules clash, and else the
// smallest rule of each ID.
func TestTheIndexAgreesWithThePatterns(t *testing.T) {
	r := rand.New(rand.NewPCG(3, 4))
	clashing, clean := 0, 0
	for range 5_000 {
		var text strings.Builder
		var patterns []*pattern
		seen := map[string]bool{}
		for range 2 + r.IntN(5) {
			var b strings.Builder
			for s := range 1 + r.IntN(4) {
				switch r.IntN(5) {
				case 0, 1:
					fmt.Fprintf(&b, "/{s%d}", s)
				case 2, 3:
					fmt.Fprintf(&b, "/%c", 'a'+rune(r.IntN(2)))
				default:
					b.WriteString("/a")
				}
			}
			if r.IntN(3) == 0 {
				b.WriteString("/*")
			}
			if seen[b.String()] {
				continue
			}
			seen[b.String()] = true
			p, _, err := parsePattern(b.String())
			if err != nil {
				t.Fatal(err)
			}
			patterns = append(patterns, &p)
			fmt.Fprintf(&text, "rule %q {}\n", b.String())
		}
		want := false
		for i, p := range patterns {
			for _, q := range patterns[:i] {
				want = want || clash(p, q)
			}
		}
		rules, err := Load(t.Context(), Source{Name: "x", Text: text.String()}, domain)
		if (err != nil) != want {
			t.Fatalf("got %v, want a clash: %t, of\n%s", err, want, &text)
		}
		if want {
			clashing++
			continue
		}
		clean++
		for range 20 {
			segments := strings.Split("a/b/c/a/b/c/a/b/c"[2*r.IntN(3):], "/")[:1+r.IntN(5)]
			r.Shuffle(len(segments), func(i, j int) { segments[i], segments[j] = segments[j], segments[i] })
			best := -1
			for i, p := range patterns {
				if p.has(segments) && (best < 0 || smaller(p, patterns[best])) {
					best = i
				}
			}
			if got := rules.index.find(segments); got != best {
				t.Fatalf("%v: got rule %d, want %d, of\n%s", segments, got, best, &text)
			}
		}
	}
	if clashing < 500 || clean < 500 {
		t.Errorf("got %d sets of rules with a clash and %d without, too few of one", clashing, clean)
	}
}

// smaller reports whether a's IDs are all b's, where both have one in common.
func smaller(a, b *pattern) bool {
	if a.below && !b.below || a.below && b.below && len(a.segments) < len(b.segments) || b.below && len(a.segments) < len(b.segments) {
		return false
	}
	for i := range min(len(a.segments), len(b.segments)) {
		if a.segments[i].named && !b.segments[i].named {
			return false
		}
	}
	return true
}

func TestTheSearchForClashesEndsWithItsContext(t *testing.T) {
	// Every prefix of fixed and named segments, so that very many pairs overlap.
	var x = newIndex(0)
	for i := range 1 << 14 {
		var p pattern
		for bit := range 14 {
			p.segments = append(p.segments, segment{fmt.Sprint("s", bit), i&(1<<bit) != 0})
		}
		p.segments = append(p.segments, segment{text: fmt.Sprint(i)})
		x.add(&p, i)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := x.clashes(ctx, func(a, b int32) { t.Fatalf("got a clash of %d and %d", a, b) }); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v, want the context's error", err)
	}
}
