package attestor

import (
	"context"

	"github.com/deputy-id/deputy/attestor/peer"
)

// Cgroup attests where a process stands in the tree of control groups:
// cgroup:path, cgroup:ancestor, cgroup:unit and cgroup:slice, each as far as
// root alone decides it.
type Cgroup struct {
	cgroups *Cgroups
}

// NewCgroup returns the attestor.
func NewCgroup(c *Cgroups) *Cgroup { return &Cgroup{cgroups: c} }

// Source is the attestor with the prefixes of what it gives.
func (a *Cgroup) Source() Source {
	return Source{Name: "cgroup", Prefixes: []string{"cgroup:"}, Attestor: a}
}

// Attest implements Attestor.
func (a *Cgroup) Attest(_ context.Context, p *peer.Process) ([]Selector, error) {
	place, err := a.cgroups.Place(p)
	if err != nil {
		return nil, err
	}
	return place.selectors(), nil
}

// Owner says whose budget the process draws on.
func (a *Cgroup) Owner(p *peer.Process) (string, error) {
	place, err := a.cgroups.Place(p)
	return place.Owner, err
}

// selectors are those of a place. A process in the root, or whose first
// directory is not to be believed, has none.
func (p Place) selectors() []Selector {
	if p.Trusted == "/" {
		return nil
	}
	out := []Selector{{"cgroup", "path:" + p.Trusted}}
	for _, up := range p.Ancestors() {
		out = append(out, Selector{"cgroup", "ancestor:" + up})
	}
	if p.Unit != "" {
		out = append(out, Selector{"cgroup", "unit:" + p.Unit})
	}
	if p.Slice != "" {
		out = append(out, Selector{"cgroup", "slice:" + p.Slice})
	}
	return out
}
