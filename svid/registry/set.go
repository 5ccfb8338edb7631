package registry

import "github.com/deputy-id/deputy/attestor"

// A Set is an immutable collection of entries, indexed by selector.
type Set struct{}

// A Match is what a process is entitled to by its evidence.
type Match struct {
	Entries []Entry  // rendered, in the order in which SVIDs are served: of the file, then by CreatedAt, then by ID
	Traced  bool     // some entry was left out because the process is traced
	Unknown []string // prefixes of unknown selectors but for which more entries might match
}

// NewSet indexes the entries.
func NewSet(entries []Entry) *Set { panic("unbuilt") }

// Entries lists all entries in serving order, unrendered.
func (s *Set) Entries() []Entry { panic("unbuilt") }

// Match returns the entries all of whose selectors the evidence holds, with
// templates and instances rendered.
func (s *Set) Match(ev *attestor.Evidence) Match { panic("unbuilt") }

// Demand says which costly selectors the entries ask for.
func (s *Set) Demand() attestor.Demand { panic("unbuilt") }
