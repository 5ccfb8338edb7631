package container

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync/atomic"
	"time"

	"github.com/deputy-id/deputy/attestor"
	"github.com/deputy-id/deputy/attestor/peer"
)

// A known container is one whose init process was verified and is held.
type known struct {
	at      place
	init    *peer.Process
	paths   *paths
	dropped chan struct{} // closed when another took its place
	said    atomic.Pointer[facts]
}

func newKnown(at place, init *peer.Process) *known {
	return &known{at: at, init: init, paths: newPaths(init), dropped: make(chan struct{})}
}

// facts are what the engine said of a container at one time. Immutable.
type facts struct {
	selectors []attestor.Selector // all but the name
	image     image
	run       inspected
	name      string
	nameErr   error     // why the name is not known any more
	asked     time.Time // monotonic
}

func (k *known) facts() *facts { return k.said.Load() }
func (k *known) set(f *facts)  { k.said.Store(f) }
func (k *known) young() bool   { return time.Since(k.facts().asked) < fresh }

// attest says what the container says of one process in it.
func (k *known) attest(ctx context.Context, p *peer.Process) ([]attestor.Selector, error) {
	f := k.facts()
	out := slices.Clone(f.selectors)
	var unknown []string
	var errs []error
	switch {
	case f.nameErr != nil:
		unknown, errs = append(unknown, "container:name:"), append(errs, f.nameErr)
	case f.name != "":
		out = add(out, "container", "name:"+f.name)
	}
	// Whoever owns a user namespace can replace what runs in it: its first
	// process leads nothing, and paths in it say nothing.
	foreign, err := k.foreign(p)
	switch {
	case err != nil:
		unknown, errs = append(unknown, "container:path:", "process:leader:"), append(errs, err)
	case !foreign:
		if p.ID() == k.init.ID() {
			out = add(out, "process", "leader:true")
		}
		path, err := k.paths.of(ctx, p)
		if err == nil {
			foreign, err = k.foreign(p) // it may have gone there while we looked
		}
		if err != nil {
			unknown, errs = append(unknown, "container:path:"), append(errs, err)
		} else if path != "" && !foreign {
			out = add(out, "container", "path:"+path)
		}
	}
	if len(errs) > 0 {
		return out, &attestor.Unknown{Prefixes: unknown, Err: errors.Join(errs...)}
	}
	return out, nil
}

// foreign reports whether the process, or the init in whose root its path
// would be looked up, is in a user namespace that is not ours.
func (k *known) foreign(p *peer.Process) (bool, error) {
	for _, x := range []*peer.Process{p, k.init} {
		if foreign, err := x.ForeignUserNamespace(); foreign || err != nil {
			if err != nil {
				err = fmt.Errorf("look up user namespace: %w", err)
			}
			return true, err
		}
	}
	return false, nil
}
