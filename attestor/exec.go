package attestor

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"

	"github.com/deputy-id/deputy/attestor/peer"
)

// Exec attests the processes that root registered under a name when it started
// them: process:exec:NAME, and process:leader:true. The process keeps its names
// until it ends, whatever it executes; its children have none.
type Exec struct {
	mu    sync.Mutex
	names map[uint64][]string // by peer.Process.ID
}

// NewExec returns the attestor, with nobody registered.
func NewExec() *Exec { return &Exec{names: make(map[uint64][]string)} }

// Register gives the process a name, of 1 to 64 letters, digits, dots, dashes
// and underscores. What was attested before knows nothing of it: register a
// process before it executes its command.
func (e *Exec) Register(p *peer.Process, name string) error {
	if !execName(name) {
		return fmt.Errorf("register exec: name %q is not 1 to 64 of A-Z a-z 0-9 . _ -", name)
	}
	held := p.Hold()
	if err := held.Alive(); err != nil {
		held.Close()
		return fmt.Errorf("register exec: %w", err)
	}
	e.mu.Lock()
	first := len(e.names[p.ID()]) == 0
	if !slices.Contains(e.names[p.ID()], name) {
		e.names[p.ID()] = append(slices.Clone(e.names[p.ID()]), name)
	}
	e.mu.Unlock()
	if !first {
		return held.Close()
	}
	go func() { // ends with the process
		defer held.Close()
		<-held.Done()
		e.mu.Lock()
		defer e.mu.Unlock()
		delete(e.names, held.ID())
	}()
	return nil
}

// Source is the attestor with the prefixes of what it gives.
func (e *Exec) Source() Source {
	return Source{Name: "exec", Prefixes: []string{"process:exec:", leaderPrefix}, Attestor: e}
}

// Attest implements Attestor.
func (e *Exec) Attest(_ context.Context, p *peer.Process) ([]Selector, error) {
	e.mu.Lock()
	names := e.names[p.ID()]
	e.mu.Unlock()
	if len(names) == 0 {
		return nil, nil
	}
	out := []Selector{leaderSelector}
	for _, name := range names {
		out = append(out, Selector{"process", "exec:" + name})
	}
	return out, nil
}

// leaderSelector says that a process is the one that what it runs in is for.
var leaderSelector = Selector{"process", "leader:true"}

func execName(s string) bool {
	return len(s) >= 1 && len(s) <= 64 &&
		strings.Trim(s, "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._-") == ""
}
