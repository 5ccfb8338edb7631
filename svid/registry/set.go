package registry

import (
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/deputy-id/deputy/attestor"
)

// instanceLength is that of attestor.Evidence.Instance.
const instanceLength = 26

// A Set is an immutable collection of entries, indexed by selector.
type Set struct {
	order []*record // as they are served
	ids   *table[string, *record]
	kin   *table[kinship, *record]
	index *table[attestor.Selector, []*record] // each record once, under one of its selectors
	types map[string]int                       // how many records need a selector of the type
	sums  demands
}

// A record is an entry with what is computed from it once.
type record struct {
	Entry
	path      *template
	place     int               // in the file
	indexed   attestor.Selector // under which the index has it
	transient bool              // not in the database
}

// demands counts the records that want a costly selector.
type demands struct{ executable, parent int }

// A Match is what a process is entitled to by its evidence.
type Match struct {
	Entries []Entry  // rendered, in the order in which SVIDs are served: of the file, then by CreatedAt, then by ID
	Traced  bool     // some entry was left out because the process is traced
	Unknown []string // prefixes of unknown selectors but for which more entries might match

	Unfilled []Unfilled // entries that were left out because their path has no value for the process
}

// NewSet indexes the entries, which must have passed Check or come from a
// server that did as much. Those whose path cannot be read match nothing.
func NewSet(entries []Entry) *Set {
	records := make([]*record, 0, len(entries))
	for i, e := range entries {
		records = append(records, newRecord(e, i, false))
	}
	return buildSet(records)
}

func newRecord(e Entry, place int, transient bool) *record {
	r := &record{Entry: e, place: place, transient: transient}
	if t, err := parsePath(e.Path); err == nil {
		r.path = t
	}
	return r
}

// compare is the order in which records are served.
func (r *record) compare(o *record) int {
	switch {
	case r.FromFile && o.FromFile:
		return r.place - o.place
	case r.FromFile:
		return -1
	case o.FromFile:
		return 1
	}
	return r.Entry.compare(&o.Entry)
}

func emptySet() *Set {
	return &Set{
		ids:   new(table[string, *record]),
		kin:   new(table[kinship, *record]),
		index: new(table[attestor.Selector, []*record]),
		types: make(map[string]int),
	}
}

func buildSet(records []*record) *Set {
	s := emptySet()
	s.order = records
	slices.SortStableFunc(s.order, (*record).compare)
	for _, r := range s.order {
		s.ids.put(r.ID, r)
		s.kin.put(kin(&r.Entry), r)
		if r.path == nil || len(r.Selectors) == 0 {
			continue // matches nothing
		}
		r.indexed = s.rarest(r)
		s.index.put(r.indexed, append(s.index.get(r.indexed), r))
		count(s.types, r, 1)
		s.sums.add(r, 1)
	}
	return s
}

// rarest chooses the selector of the record that the fewest others are indexed
// under, so that a selector which all entries share costs nobody anything.
func (s *Set) rarest(r *record) attestor.Selector {
	best, fewest := attestor.Selector{}, -1
	for _, sel := range r.Selectors {
		if n := len(s.index.get(sel)); fewest < 0 || n < fewest {
			best, fewest = sel, n
		}
	}
	return best
}

// with returns a set that has the record too.
func (s *Set) with(r *record) *Set {
	next := *s
	at, _ := slices.BinarySearchFunc(s.order, r, (*record).compare)
	if at == len(s.order) {
		// The spare room behind the slice belongs to the newest set, and sets
		// descend from one another in one line: no older set sees it.
		next.order = append(s.order, r)
	} else {
		next.order = slices.Concat(s.order[:at], []*record{r}, s.order[at:])
	}
	next.ids = s.ids.with(r.ID, r)
	next.kin = s.kin.with(kin(&r.Entry), r)
	if r.path == nil || len(r.Selectors) == 0 {
		return &next
	}
	r.indexed = s.rarest(r)
	next.index = s.index.with(r.indexed, slices.Concat(s.index.get(r.indexed), []*record{r}))
	next.types = maps.Clone(s.types)
	count(next.types, r, 1)
	next.sums.add(r, 1)
	return &next
}

// without returns a set that lacks the record.
func (s *Set) without(r *record) *Set {
	next := *s
	next.order = make([]*record, 0, len(s.order))
	for _, o := range s.order {
		if o != r {
			next.order = append(next.order, o)
		}
	}
	next.ids = s.ids.without(r.ID)
	if k := kin(&r.Entry); s.kin.get(k) == r {
		next.kin = s.kin.without(k)
	}
	if r.path == nil || len(r.Selectors) == 0 {
		return &next
	}
	rest := slices.DeleteFunc(slices.Clone(s.index.get(r.indexed)), func(o *record) bool { return o == r })
	if len(rest) == 0 {
		next.index = s.index.without(r.indexed)
	} else {
		next.index = s.index.with(r.indexed, rest)
	}
	next.types = maps.Clone(s.types)
	count(next.types, r, -1)
	next.sums.add(r, -1)
	return &next
}

// count adds n for each type that the record needs a selector of.
func count(types map[string]int, r *record, n int) {
	add := func(typ string) {
		if types[typ] += n; types[typ] == 0 {
			delete(types, typ)
		}
	}
	for i, s := range r.Selectors {
		if i == 0 || s.Type != r.Selectors[i-1].Type {
			add(s.Type)
		}
	}
	for _, k := range r.path.keys {
		typ, _, _ := strings.Cut(k, ":")
		add(typ)
	}
}

func (d *demands) add(r *record, n int) {
	wants := func(typ, name string) bool {
		return slices.Contains(r.path.keys, typ+":"+name) || slices.ContainsFunc(r.Selectors, func(s attestor.Selector) bool {
			return s.Type == typ && strings.HasPrefix(s.Value, name)
		})
	}
	if wants("unix", "sha256:") {
		d.executable += n
	}
	if wants("process", "parent_sha256:") {
		d.parent += n
	}
}

// Entries lists all entries in serving order, unrendered.
func (s *Set) Entries() []Entry {
	entries := make([]Entry, len(s.order))
	for i, r := range s.order {
		entries[i] = r.Entry
	}
	return entries
}

// Len is the number of entries.
func (s *Set) Len() int { return len(s.order) }

// Entry returns the entry with this ID, unrendered.
func (s *Set) Entry(id string) (Entry, bool) {
	if r := s.ids.get(id); r != nil {
		return r.Entry, true
	}
	return Entry{}, false
}

// Demand says which costly selectors the entries ask for.
func (s *Set) Demand() attestor.Demand {
	return attestor.Demand{ExecutableDigest: s.sums.executable > 0, ParentDigest: s.sums.parent > 0}
}

// Match returns the entries all of whose selectors the evidence holds, with
// templates and instances rendered. Its cost grows with the selectors of the
// process; only while some of those are unknown does it look at all entries.
func (s *Set) Match(ev *attestor.Evidence) Match {
	now := time.Now()
	var found []*record
	for i, sel := range ev.Selectors {
		if i > 0 && sel == ev.Selectors[i-1] {
			continue
		}
		for _, r := range s.index.get(sel) {
			if r.live(now) && r.held(ev) {
				found = append(found, r)
			}
		}
	}
	slices.SortFunc(found, (*record).compare)

	var m Match
	for _, r := range found {
		if r.uncertain(ev) {
			continue // a value that is not known for sure makes no identity
		}
		e, ok := r.render(ev)
		switch {
		case !ok:
			m.Unfilled = append(m.Unfilled, r.unfilled(ev))
		case ev.Traced && !r.AllowTraced:
			m.Traced = true
		default:
			m.Entries = append(m.Entries, e)
		}
	}
	m.Unknown = s.unknown(ev, now)
	return m
}

// live reports whether the entry has not expired.
func (r *record) live(now time.Time) bool {
	return r.ExpiresAt.IsZero() || now.Before(r.ExpiresAt)
}

func (r *record) held(ev *attestor.Evidence) bool {
	for _, s := range r.Selectors {
		if s != r.indexed && !ev.Has(s) {
			return false
		}
	}
	return true
}

// uncertain reports whether a place of the path could have another value than
// the evidence shows.
func (r *record) uncertain(ev *attestor.Evidence) bool {
	if r.path.fixed() {
		return false
	}
	for _, u := range ev.Unknown {
		if slices.ContainsFunc(u.Prefixes, r.path.mayDiffer) {
			return true
		}
	}
	return false
}

// render returns the entry with the SPIFFE ID that this process has under it.
func (r *record) render(ev *attestor.Evidence) (Entry, bool) {
	if r.path.fixed() && !r.Instance && !r.SPIFFEID.IsZero() {
		return r.Entry, true
	}
	path, ok := r.path.render(ev.Selectors)
	if !ok {
		return Entry{}, false
	}
	if r.Instance {
		if len(ev.Instance) != instanceLength {
			return Entry{}, false // else two processes would share one ID
		}
		path += "/" + ev.Instance
	}
	id, err := spiffeid.FromPath(r.ParentID.TrustDomain(), path)
	if err != nil || len(id.String()) > maxID {
		return Entry{}, false
	}
	e := r.Entry
	e.SPIFFEID = id
	return e, true
}

// unknown lists the unknown prefixes that stand between the process and an
// entry all of whose other selectors it has. That an entry does not allow a
// traced process does not matter here: what is unknown is never "no".
func (s *Set) unknown(ev *attestor.Evidence, now time.Time) []string {
	asked := s.asked(ev)
	if len(asked) == 0 {
		return nil
	}
	has := make(map[attestor.Selector]struct{}, len(ev.Selectors))
	for _, sel := range ev.Selectors {
		has[sel] = struct{}{}
	}
	reported := make([]bool, len(asked))
	between := make([]bool, len(asked))
	left := len(asked)
	for _, r := range s.order {
		if r.path == nil || len(r.Selectors) == 0 || !r.live(now) {
			continue
		}
		clear(between)
		if !r.between(asked, has, ev, between) {
			continue
		}
		for i, b := range between {
			if b && !reported[i] {
				reported[i] = true
				left--
			}
		}
		if left == 0 {
			break
		}
	}
	var prefixes []string
	for i, yes := range reported {
		if yes {
			prefixes = append(prefixes, asked[i].text)
		}
	}
	slices.Sort(prefixes)
	return prefixes
}

// between marks which of the asked prefixes keep the entry from the process,
// and reports false where something else does.
func (r *record) between(asked []prefix, has map[attestor.Selector]struct{}, ev *attestor.Evidence, mark []bool) bool {
	covered := func(sel attestor.Selector) bool {
		return slices.ContainsFunc(asked, func(p prefix) bool { return p.covers(sel) })
	}
	if r.path.fixed() && !slices.ContainsFunc(r.Selectors, covered) {
		return false
	}
	// What is known comes first: it rules most entries out.
	for _, sel := range r.Selectors {
		if !covered(sel) {
			if _, ok := has[sel]; !ok {
				return false
			}
		}
	}
	for _, sel := range r.Selectors {
		if _, ok := has[sel]; ok {
			continue
		}
		for i := range asked {
			mark[i] = mark[i] || asked[i].covers(sel)
		}
	}
	for _, key := range r.path.keys {
		open := false
		for i := range asked {
			if overlap(key, asked[i].text) {
				open, mark[i] = true, true
			}
		}
		if !open {
			if _, ok := single(ev.Selectors, key); !ok {
				return false
			}
		}
	}
	return true
}

// A prefix is what Unknown says of selectors, cut where a Selector is.
type prefix struct{ text, typ, value string }

func (p *prefix) covers(s attestor.Selector) bool {
	if p.typ == "" { // without a colon, which no attestor gives
		return strings.HasPrefix(s.String(), p.text)
	}
	return s.Type == p.typ && strings.HasPrefix(s.Value, p.value)
}

// asked returns the unknown prefixes of types that some entry needs, each once.
func (s *Set) asked(ev *attestor.Evidence) []prefix {
	var asked []prefix
	for _, u := range ev.Unknown {
		for _, text := range u.Prefixes {
			p := prefix{text: text}
			if typ, value, ok := strings.Cut(text, ":"); ok {
				p.typ, p.value = typ, value
				if s.types[typ] == 0 {
					continue
				}
			}
			if !slices.Contains(asked, p) {
				asked = append(asked, p)
			}
		}
	}
	return asked
}
