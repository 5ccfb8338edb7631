package registry

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/deputy-id/deputy/attestor"
)

const instance = "abcdefghijklmnopqrstuvwxyz"

// evidence reads selectors; a prefix with "?" before it is unknown.
func evidence(t testing.TB, texts ...string) *attestor.Evidence {
	t.Helper()
	ev := &attestor.Evidence{Instance: instance}
	for _, text := range texts {
		if prefix, ok := strings.CutPrefix(text, "?"); ok {
			ev.Unknown = append(ev.Unknown, attestor.Unknown{Prefixes: []string{prefix}})
			continue
		}
		ev.Selectors = append(ev.Selectors, selectors(t, text)...)
	}
	slices.SortFunc(ev.Selectors, attestor.Selector.Compare)
	ev.Selectors = slices.Compact(ev.Selectors)
	return ev
}

func checked(t testing.TB, entries ...Entry) []Entry {
	t.Helper()
	var out []Entry
	for i, e := range entries {
		e, err := e.Check(td)
		if err != nil {
			t.Fatal(err)
		}
		if e.ID == "" {
			e.ID = fmt.Sprintf("id-%03d", i)
		}
		out = append(out, e)
	}
	return out
}

func served(m Match) []string {
	var out []string
	for _, e := range m.Entries {
		out = append(out, e.SPIFFEID.Path())
	}
	return out
}

func TestMatch(t *testing.T) {
	instanced := entry(t, "/run", "unix:uid:1")
	instanced.Instance = true
	traced := entry(t, "/traced", "unix:uid:1")
	traced.AllowTraced = true
	expired := entry(t, "/expired", "unix:uid:1")
	expired.ExpiresAt = time.Now().Add(-time.Second)
	for name, tc := range map[string]struct {
		entries []Entry
		has     []string
		traced  bool
		want    []string
		unknown []string
		dropped bool
	}{
		"every selector is needed": {
			entries: []Entry{entry(t, "/a", "unix:uid:1", "unix:gid:1"), entry(t, "/b", "unix:uid:1")},
			has:     []string{"unix:uid:1"},
			want:    []string{"/b"},
		},
		"no evidence matches nothing": {
			entries: []Entry{entry(t, "/a", "unix:uid:1")},
		},
		"an expired entry never matches": {
			entries: []Entry{expired},
			has:     []string{"unix:uid:1"},
		},
		"an instance is appended": {
			entries: []Entry{instanced},
			has:     []string{"unix:uid:1"},
			want:    []string{"/run/" + instance},
		},
		"a traced process gets what allows it": {
			entries: []Entry{entry(t, "/a", "unix:uid:1"), traced},
			has:     []string{"unix:uid:1"},
			traced:  true,
			want:    []string{"/traced"},
			dropped: true,
		},
		"a trace matters only to what matches": {
			entries: []Entry{entry(t, "/a", "unix:uid:2")},
			has:     []string{"unix:uid:1"},
			traced:  true,
		},
		"a template takes its value": {
			entries: []Entry{entry(t, "/{{unix.user}}/x-{{docker.label:a.b}}", "unix:uid:1")},
			has:     []string{"unix:uid:1", "unix:user:o_b", "docker:label:a.b:c:d", "docker:label:a.bc:x"},
			want:    []string{"/o_5fb/x-c_3ad"},
		},
		"a missing value is no match": {
			entries: []Entry{entry(t, "/{{unix.user}}", "unix:uid:1")},
			has:     []string{"unix:uid:1"},
		},
		"two values are no match": {
			entries: []Entry{entry(t, "/{{unix.supplementary_gid}}", "unix:uid:1")},
			has:     []string{"unix:uid:1", "unix:supplementary_gid:1", "unix:supplementary_gid:2"},
		},
		"a value never leads below /spire": {
			entries: []Entry{entry(t, "/{{unix.user}}", "unix:uid:1"), entry(t, "/{{unix.user}}/agent", "unix:uid:1"), entry(t, "/sp{{unix.group}}", "unix:uid:1")},
			has:     []string{"unix:uid:1", "unix:user:spire", "unix:group:ire"},
		},
		"a value that makes the ID too long is no match": {
			entries: []Entry{entry(t, "/{{unix.user}}", "unix:uid:1")},
			has:     []string{"unix:uid:1", "unix:user:" + strings.Repeat("_", 1000)},
		},
		"an entry that needs nothing unknown is served": {
			entries: []Entry{entry(t, "/a", "unix:uid:1")},
			has:     []string{"unix:uid:1", "?docker:"},
			want:    []string{"/a"},
		},
		"what only an unknown selector keeps back is reported": {
			entries: []Entry{entry(t, "/a", "unix:uid:1", "docker:label:a:b"), entry(t, "/b", "unix:uid:1")},
			has:     []string{"unix:uid:1", "?docker:"},
			want:    []string{"/b"},
			unknown: []string{"docker:"},
		},
		"what something known keeps back is not": {
			entries: []Entry{entry(t, "/a", "unix:uid:2", "docker:label:a:b")},
			has:     []string{"unix:uid:1", "?docker:"},
		},
		"several unknowns are reported together": {
			entries: []Entry{entry(t, "/a", "process:leader:true", "docker:label:a:b")},
			has:     []string{"?docker:", "?process:leader:", "?image:", "?container:"},
			unknown: []string{"docker:", "process:leader:"},
		},
		"an unknown prefix covers no other name": {
			entries: []Entry{entry(t, "/a", "process:exec:x")},
			has:     []string{"?process:leader:"},
		},
		"a selector held beside an unknown counts": {
			entries: []Entry{entry(t, "/a", "docker:label:a:b")},
			has:     []string{"docker:label:a:b", "?docker:"},
			want:    []string{"/a"},
		},
		"an unknown value of a template is unknown": {
			entries: []Entry{entry(t, "/{{container.name}}", "unix:uid:1")},
			has:     []string{"unix:uid:1", "?container:"},
			unknown: []string{"container:"},
		},
		"a value that may not be the only one is unknown": {
			entries: []Entry{entry(t, "/{{docker.label:a}}", "unix:uid:1")},
			has:     []string{"unix:uid:1", "docker:label:a:b", "?docker:label:"},
			unknown: []string{"docker:label:"},
		},
		"a template without a value is not kept back": {
			entries: []Entry{entry(t, "/{{unix.user}}", "docker:label:a:b")},
			has:     []string{"?docker:"},
		},
		"an expired entry is not kept back": {
			entries: []Entry{func() Entry { e := expired; e.Selectors = selectors(t, "docker:label:a:b"); return e }()},
			has:     []string{"?docker:"},
		},
		"a trace does not turn unknown into no": {
			entries: []Entry{entry(t, "/a", "docker:label:a:b")},
			has:     []string{"?docker:"},
			traced:  true,
			unknown: []string{"docker:"},
		},
	} {
		t.Run(name, func(t *testing.T) {
			ev := evidence(t, tc.has...)
			ev.Traced = tc.traced
			m := NewSet(checked(t, tc.entries...)).Match(ev)
			if diff := cmp.Diff(tc.want, served(m)); diff != "" {
				t.Errorf("entries: %s", diff)
			}
			if diff := cmp.Diff(tc.unknown, m.Unknown); diff != "" {
				t.Errorf("unknown: %s", diff)
			}
			if m.Traced != tc.dropped {
				t.Errorf("traced: got %t, want %t", m.Traced, tc.dropped)
			}
		})
	}
}

func TestAnInstanceNeedsTheProcessesOwnName(t *testing.T) {
	e := entry(t, "/run", "unix:uid:1")
	e.Instance = true
	ev := evidence(t, "unix:uid:1")
	for _, name := range []string{"", "short"} {
		ev.Instance = name
		if m := NewSet(checked(t, e)).Match(ev); len(m.Entries) != 0 {
			t.Errorf("%q: got %v, want nothing", name, served(m))
		}
	}
}

func TestEntriesAreServedInOrder(t *testing.T) {
	now := time.Now()
	at := func(path, id string, age time.Duration, file bool) Entry {
		e := checked(t, entry(t, path, "unix:uid:1"))[0]
		e.ID, e.CreatedAt, e.FromFile = id, now.Add(-age), file
		return e
	}
	set := NewSet([]Entry{
		at("/young", "a", time.Second, false), at("/second", "z", 0, true), at("/old-b", "b", time.Hour, false),
		at("/third", "a1", time.Hour, true), at("/old-a", "a2", time.Hour, false),
	})
	want := []string{"/second", "/third", "/old-a", "/old-b", "/young"}
	if diff := cmp.Diff(want, served(set.Match(evidence(t, "unix:uid:1")))); diff != "" {
		t.Error(diff)
	}
}

func TestDemand(t *testing.T) {
	s := open(t, "")
	want := func(d attestor.Demand) {
		t.Helper()
		set, _ := s.Set()
		if got := set.Demand(); got != d {
			t.Errorf("got %+v, want %+v", got, d)
		}
	}
	create(t, s, entry(t, "/a", "unix:uid:1"))
	want(attestor.Demand{})
	b := create(t, s, entry(t, "/b", "unix:sha256:00"))
	c := create(t, s, entry(t, "/c", "process:parent_sha256:00"))
	d := create(t, s, entry(t, "/{{unix.sha256}}", "unix:uid:1"))
	want(attestor.Demand{ExecutableDigest: true, ParentDigest: true})
	for _, e := range []Entry{b, c} {
		if _, err := s.Delete(t.Context(), e.ID); err != nil {
			t.Fatal(err)
		}
	}
	want(attestor.Demand{ExecutableDigest: true})
	if _, err := s.Delete(t.Context(), d.ID); err != nil {
		t.Fatal(err)
	}
	want(attestor.Demand{})
}

// FuzzMatch compares the index, as changes leave it, with the definition.
func FuzzMatch(f *testing.F) {
	for seed := range uint64(20) {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, seed uint64) {
		rng := rand.New(rand.NewPCG(seed, 0))
		pool := []string{"unix:uid:1", "unix:uid:2", "unix:gid:1", "unix:user:a", "cgroup:unit:x", "docker:label:a:b", "docker:label:a:c", "image:digest:x", "image:digest:y"}
		some := func(n int) (texts []string) {
			for _, i := range rng.Perm(len(pool))[:n] {
				texts = append(texts, pool[i])
			}
			return texts
		}
		s := open(t, "")
		for i := range 30 {
			path := fmt.Sprintf("/e%d", i)
			if rng.IntN(4) == 0 {
				path += "/{{docker.label:a}}"
			}
			if rng.IntN(5) == 0 {
				if err := s.ReplaceFile(checked(t, entry(t, path+"/f", some(1+rng.IntN(3))...))); err != nil {
					t.Fatal(err)
				}
			}
			create(t, s, entry(t, path, some(1+rng.IntN(3))...))
			set, _ := s.Set()
			e := set.Entries()[rng.IntN(set.Len())]
			if e.FromFile {
				continue
			}
			switch rng.IntN(3) {
			case 0:
				if _, err := s.Delete(t.Context(), e.ID); err != nil {
					t.Fatal(err)
				}
			case 1:
				if _, err := s.Update(t.Context(), e.ID, func(e *Entry) error {
					e.Selectors = selectors(t, some(1+rng.IntN(3))...)
					return nil
				}); err != nil {
					t.Fatal(err)
				}
			}
		}
		set, _ := s.Set()
		for range 10 {
			texts := some(rng.IntN(len(pool)))
			for _, prefix := range []string{"docker:", "image:"} {
				if rng.IntN(3) == 0 {
					texts = append(texts, "?"+prefix)
				}
			}
			ev := evidence(t, texts...)
			got := set.Match(ev)
			entries, unknown := define(set, ev)
			if diff := cmp.Diff(entries, served(got)); diff != "" {
				t.Fatalf("%v: %s", texts, diff)
			}
			if diff := cmp.Diff(unknown, got.Unknown); diff != "" {
				t.Fatalf("%v: unknown: %s", texts, diff)
			}
		}
	})
}

// define is Match as one would say it, for the paths and prefixes of FuzzMatch.
func define(s *Set, ev *attestor.Evidence) (ids, unknown []string) {
	for _, e := range s.Entries() {
		possible, missing := true, map[string]bool{}
		for _, sel := range e.Selectors {
			if !ev.Has(sel) {
				possible = possible && ev.MayHave(sel)
				missing[sel.Type+":"] = true
			}
		}
		path := e.Path
		if strings.Contains(path, "{{") {
			b := ev.Has(attestor.Selector{Type: "docker", Value: "label:a:b"})
			c := ev.Has(attestor.Selector{Type: "docker", Value: "label:a:c"})
			switch {
			case ev.MayHave(attestor.Selector{Type: "docker", Value: "label:a:x"}):
				missing["docker:"] = true
			case b == c:
				possible = false
			case b:
				path = strings.Replace(path, "{{docker.label:a}}", "b", 1)
			case c:
				path = strings.Replace(path, "{{docker.label:a}}", "c", 1)
			}
		}
		if !possible {
			continue
		}
		if len(missing) == 0 {
			ids = append(ids, path)
		}
		for prefix := range missing {
			if !slices.Contains(unknown, prefix) {
				unknown = append(unknown, prefix)
			}
		}
	}
	slices.Sort(unknown)
	return ids, unknown
}

func TestOlderSetsStayAsTheyWere(t *testing.T) {
	s := open(t, "")
	var sets []*Set
	for i := range 50 {
		create(t, s, entry(t, fmt.Sprintf("/e%d", i), "unix:uid:1"))
		set, _ := s.Set()
		sets = append(sets, set)
	}
	first, _ := s.Set()
	for _, e := range first.Entries()[:25] {
		if _, err := s.Delete(t.Context(), e.ID); err != nil {
			t.Fatal(err)
		}
	}
	create(t, s, entry(t, "/new", "unix:uid:1"))
	for i, set := range sets {
		m := set.Match(evidence(t, "unix:uid:1"))
		if len(m.Entries) != i+1 || set.Len() != i+1 {
			t.Fatalf("set %d: got %d matches of %d entries", i, len(m.Entries), set.Len())
		}
	}
}

// many returns n entries, each for a unit of its own, all for one user.
func many(t testing.TB, n int) []Entry {
	entries := make([]Entry, n)
	for i := range entries {
		entries[i] = Entry{
			ID:       fmt.Sprintf("id-%06d", i),
			Path:     fmt.Sprintf("/agent/%d", i),
			SPIFFEID: spiffeid.RequireFromPath(td, fmt.Sprintf("/agent/%d", i)),
			ParentID: NodeID(td),
			Selectors: []attestor.Selector{
				{Type: "cgroup", Value: fmt.Sprintf("unit:agent%d.service", i)},
				{Type: "process", Value: "leader:true"},
				{Type: "unix", Value: "uid:1000"},
			},
		}
	}
	return entries
}

func TestMatchDoesNotLookAtEveryEntry(t *testing.T) {
	set := NewSet(many(t, 10000))
	looked := 0
	for _, sel := range selectors(t, "process:leader:true", "unix:uid:1000", "cgroup:unit:agent7.service") {
		looked += len(set.index.get(sel))
	}
	if looked > 10 {
		t.Errorf("got %d candidates, want at most 10", looked)
	}
}

func BenchmarkMatch(b *testing.B) {
	var texts []string
	for i := range 15 {
		texts = append(texts, fmt.Sprintf("unix:supplementary_gid:%d", i))
	}
	texts = append(texts, "unix:uid:1000", "process:leader:true", "cgroup:unit:agent7.service", "unix:user:u", "unix:path:/usr/bin/x")
	for _, n := range []int{10, 1000, 100000} {
		set := NewSet(many(b, n))
		ev := evidence(b, texts...)
		b.Run(fmt.Sprintf("entries=%d", n), func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if m := set.Match(ev); len(m.Entries) != 1 {
					b.Fatal(len(m.Entries))
				}
			}
		})
		unknown := evidence(b, append(texts, "?cgroup:")...)
		unknown.Selectors = slices.DeleteFunc(unknown.Selectors, func(s attestor.Selector) bool { return s.Type == "unix" })
		b.Run(fmt.Sprintf("entries=%d/unknown", n), func(b *testing.B) {
			for b.Loop() {
				set.Match(unknown)
			}
		})
	}
}

func BenchmarkNewSet(b *testing.B) {
	for _, n := range []int{1000, 10000, 100000} {
		entries := many(b, n)
		b.Run(fmt.Sprintf("entries=%d", n), func(b *testing.B) {
			for b.Loop() {
				NewSet(entries)
			}
		})
	}
}

func BenchmarkSetChange(b *testing.B) {
	for _, n := range []int{1000, 10000, 100000} {
		entries := many(b, n+1)
		set := NewSet(entries[:n])
		r := newRecord(entries[n], 0, false)
		b.Run(fmt.Sprintf("entries=%d", n), func(b *testing.B) {
			for b.Loop() {
				set.with(r).without(r)
			}
		})
	}
}
