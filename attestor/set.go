package attestor

import (
	"context"
	"slices"

	"github.com/hashicorp/go-hclog"

	"github.com/deputy-id/deputy/attestor/peer"
)

// A Set asks its sources side by side and keeps what they said for as long as
// the process has not changed. It is safe for concurrent use.
type Set struct{}

// NewSet returns the set of these sources. demand is asked at each attestation
// which costly selectors are wanted; nil wants all of them.
func NewSet(log hclog.Logger, demand func() Demand, sources ...Source) *Set { panic("unbuilt") }

// Attest returns what is known of the process. What it kept is returned again,
// the same pointer, while credentials, parent, cgroup and program are
// unchanged, it is younger than a minute, and it covers the demand; otherwise
// the sources are asked. The only errors are the process's own end (ErrGone)
// and that of the context: a source that fails makes its types unknown.
func (s *Set) Attest(ctx context.Context, p *peer.Process) (*Evidence, error) { panic("unbuilt") }

// Refresh is Attest without what was kept: for the rotation of a key.
func (s *Set) Refresh(ctx context.Context, p *peer.Process) (*Evidence, error) { panic("unbuilt") }

func searchSelectors(sorted []Selector, s Selector) (int, bool) {
	return slices.BinarySearchFunc(sorted, s, Selector.Compare)
}
