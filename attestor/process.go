package attestor

import (
	"context"

	"github.com/deputy-id/deputy/attestor/peer"
)

// Process attests where a process comes from: process:parent_path,
// process:parent_sha256 and process:ancestor_path, and process:host:true for
// one that stands on the host itself.
//
// A lineage says what the ancestors run now. Anybody who may execute the
// ancestor's program can start a child first and execute it then, so an entry
// that names a lineage should name a user or a unit beside it.
type Process struct {
	table       *peer.Table
	host        *Host
	executables *Executables
	demand      func() Demand
}

// NewProcess returns the attestor. It pins ancestors in the table. demand is
// asked each time whether the parent's digest is wanted; nil wants it.
func NewProcess(table *peer.Table, host *Host, executables *Executables, demand func() Demand) *Process {
	return &Process{table: table, host: host, executables: executables, demand: orAll(demand)}
}

// Source is the attestor with the prefixes of what it gives: of process:exec and
// process:leader others tell.
func (a *Process) Source() Source {
	return Source{
		Name:     "process",
		Prefixes: []string{"process:host:", "process:parent_path:", "process:parent_sha256:", "process:ancestor_path:"},
		Attestor: a,
	}
}

// Attest implements Attestor.
func (a *Process) Attest(ctx context.Context, p *peer.Process) ([]Selector, error) {
	var out []Selector
	add := func(kind, value string) {
		if s := (Selector{Type: "process", Value: kind + ":" + value}); selectable(s.String()) {
			out = append(out, s)
		}
	}
	var unknown unknowns

	onHost, err := a.onHost(p)
	if err != nil {
		unknown.add(err, "process:host:")
	} else if onHost {
		add("host", "true")
	}

	up, err := a.above(ctx, p)
	if err != nil {
		unknown.add(err, "process:parent_path:", "process:parent_sha256:", "process:ancestor_path:")
	}
	for i, x := range up {
		parent := i == 0
		if x.pathErr != nil {
			unknown.add(x.pathErr, "process:ancestor_path:")
			if parent {
				unknown.add(x.pathErr, "process:parent_path:")
			}
		}
		if x.sumErr != nil {
			unknown.add(x.sumErr, "process:parent_sha256:")
		}
		if x.path != "" {
			add("ancestor_path", x.path)
			if parent {
				add("parent_path", x.path)
			}
		}
		if parent && x.sum != "" {
			add("parent_sha256", x.sum)
		}
	}
	return out, unknown.err(p)
}

// above returns the ancestors. In a user namespace that is not ours a process
// has none: its owner picks them.
func (a *Process) above(ctx context.Context, p *peer.Process) ([]ancestor, error) {
	if foreign, err := p.ForeignUserNamespace(); foreign || err != nil {
		return nil, err
	}
	return lineage(ctx, a.table, a.executables, p, a.demand().ParentDigest)
}

// onHost reports whether the process is in no container and shares the
// namespaces of the host.
func (a *Process) onHost(p *peer.Process) (bool, error) {
	if shares, err := a.host.shares(p); !shares || err != nil {
		return false, err
	}
	place, err := PlaceOf(p)
	if err != nil {
		return false, err
	}
	return place.Container == nil, nil
}
