// Package attestor says what a process is. It reads what the kernel, systemd
// and the container runtime know of a pinned process (attestor/peer) and
// returns it as selectors.
//
// What the workload can write is not evidence: environment, argv, working
// directory, mountinfo, and any directory, cgroup or mount that it may change
// are never believed. Selectors only ever add, so one that is missing cannot
// grant; and what could not be found out is reported as unknown, never as
// "does not match". The adversary is another process of the same host; root of
// the host is trusted.
//
// A caller owes it a peer.Process that it holds, and must ask again before
// every key that it hands out: Attest is cheap while nothing has changed.
package attestor

import (
	"context"
	"errors"
	"strings"
	"time"

	"github.com/deputy-id/deputy/attestor/peer"
)

// An Attestor finds out one kind of fact about a process. Strangers may
// implement it.
//
// No selectors and no error mean that the process is not of its kind. An error
// means that the answer is unknown and worth asking for again; the selectors
// returned beside it still hold. An error that is, or wraps, an *Unknown
// narrows what is unknown to that Unknown's prefixes; any other makes all that
// the attestor gives unknown.
type Attestor interface {
	Attest(context.Context, *peer.Process) ([]Selector, error)
}

// A Source is an attestor with its name for the log and the prefixes of the
// selectors that it gives, each ending in a colon: "unix:", "process:leader:".
type Source struct {
	Name     string
	Prefixes []string
	Attestor Attestor
}

// Unknown says that selectors with these prefixes could not be determined, and
// why. It is an error, so that an attestor can return it.
type Unknown struct {
	Prefixes []string
	Err      error
}

func (u *Unknown) Error() string { return u.Err.Error() }
func (u *Unknown) Unwrap() error { return u.Err }

// Evidence is what was found out about one process at one time. It is
// immutable and shared.
type Evidence struct {
	Selectors []Selector // sorted, each once
	Unknown   []Unknown  // what could not be determined
	Traced    bool       // a tracer is attached to one of its tasks
	Instance  string     // 26 base32 characters that name this run of the process
	Owner     string     // whose budget the process draws on: outermost trusted container, unit or user slice, else UID
	Gathered  time.Time  // monotonic
	Demand    Demand     // what had been asked for
}

// Has reports whether the evidence holds the selector.
func (e *Evidence) Has(s Selector) bool {
	_, ok := searchSelectors(e.Selectors, s)
	return ok
}

// MayHave reports whether the selector is of a kind that is unknown.
func (e *Evidence) MayHave(s Selector) bool {
	text := s.String()
	for _, u := range e.Unknown {
		for _, p := range u.Prefixes {
			if strings.HasPrefix(text, p) {
				return true
			}
		}
	}
	return false
}

// Demand says which selectors some entry asks for that are too costly to
// gather for nothing: a digest reads the whole executable.
type Demand struct {
	ExecutableDigest bool // unix:sha256
	ParentDigest     bool // process:parent_sha256
}

// Covers reports whether evidence gathered for d serves a caller that wants o.
func (d Demand) Covers(o Demand) bool {
	return (d.ExecutableDigest || !o.ExecutableDigest) && (d.ParentDigest || !o.ParentDigest)
}

// ErrGone says that the process ended while it was attested.
var ErrGone = errors.New("process is gone")
