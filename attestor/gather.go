package attestor

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/base32"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/deputy-id/deputy/attestor/peer"
)

// A source is a Source with what the set has learned of it.
type source struct {
	Source
	slowUntil atomic.Int64 // Unix time in nanoseconds

	mu   sync.Mutex
	busy map[uint64]bool // processes for which it still has not come back
}

func newSource(s Source) *source { return &source{Source: s, busy: make(map[uint64]bool)} }

// A source that did not answer in time is given hurryFor for the next slowFor:
// the others' selectors must not wait for it at every call.
const (
	hurryFor = 500 * time.Millisecond
	slowFor  = 10 * time.Second
)

// An answer is what one source said.
type answer struct {
	selectors []Selector
	err       error
}

var errBusy = errors.New("attestor has not come back from the last time it was asked")

// ask asks the source, for as long as the context lasts. An attestor that
// overstays goes on by itself, and is not asked about that process meanwhile.
func (s *source) ask(ctx context.Context, p *peer.Process) answer {
	if !s.begin(p.ID()) {
		return answer{err: errBusy}
	}
	patience := gatherFor
	if time.Now().UnixNano() < s.slowUntil.Load() {
		patience = hurryFor
	}
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	came := make(chan answer, 1)
	held := p.Hold()
	go func() {
		defer held.Close()
		var a answer
		defer func() {
			if r := recover(); r != nil { // what a workload wrote must not end the daemon
				a = answer{err: fmt.Errorf("attestor panicked: %v", r)}
			}
			s.end(held.ID()) // first: who gets the answer may ask again at once
			came <- a
		}()
		a.selectors, a.err = s.Attestor.Attest(ctx, held)
	}()
	var a answer
	select {
	case a = <-came:
	case <-ctx.Done():
		a = answer{err: ctx.Err()}
	}
	switch {
	case a.err == nil:
		s.slowUntil.Store(0)
	case ctx.Err() != nil && patience == gatherFor:
		s.slowUntil.Store(time.Now().Add(slowFor).UnixNano())
	}
	return a
}

func (s *source) begin(id uint64) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.busy[id] {
		return false
	}
	s.busy[id] = true
	return true
}

func (s *source) end(id uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.busy, id)
}

// gives reports whether the source declares selectors of this kind.
func (s *source) gives(sel string) bool {
	return slices.ContainsFunc(s.Prefixes, func(p string) bool { return strings.HasPrefix(sel, p) })
}

// gather asks the sources. What was gathered while the process changed is of
// neither the one nor the other, and is thrown away.
func (s *Set) gather(ctx context.Context, p *peer.Process, want Demand) (*kept, error) {
	const tries = 3
	var err error
	for range tries {
		var k *kept
		if k, err = s.gatherOnce(ctx, p, want); err == nil {
			return k, nil
		}
		if !errors.Is(err, errStale) && !errors.Is(err, peer.ErrProgramChanged) {
			break
		}
	}
	if errors.Is(err, peer.ErrGone) || errors.Is(p.Alive(), peer.ErrGone) {
		return nil, ErrGone
	}
	return nil, fmt.Errorf("attest %d: %w", p.PID(), err)
}

func (s *Set) gatherOnce(ctx context.Context, p *peer.Process, want Demand) (k *kept, err error) {
	started := time.Now()
	before, err := lookAt(p)
	if err != nil {
		return nil, err
	}
	var resting bases
	defer func() {
		if err != nil {
			closeAll(resting.collect())
		}
	}()
	answers := s.askAll(context.WithValue(ctx, basesKey{}, &resting), p)

	e := &Evidence{Gathered: started, Demand: want}
	if e.Instance, err = instance(p); err != nil {
		return nil, err
	}
	if e.Traced, err = traced(p, time.Now().Add(tracedFor)); err != nil {
		return nil, err
	}
	foreign, foreignErr := p.ForeignUserNamespace()
	s.merge(e, answers, foreign, foreignErr)
	e.Owner = s.owner(p, before.info.UID)

	if err := before.holds(p); err != nil {
		return nil, err
	}
	if err := p.Alive(); err != nil {
		return nil, err
	}
	until := started.Add(keepFor)
	if len(e.Unknown) > 0 {
		until = time.Now().Add(retryAfter)
	}
	return &kept{evidence: e, look: before, until: until, bases: resting.collect()}, nil
}

// askAll asks the sources side by side.
func (s *Set) askAll(ctx context.Context, p *peer.Process) []answer {
	answers := make([]answer, len(s.sources))
	var wg sync.WaitGroup
	for i, src := range s.sources {
		wg.Go(func() { answers[i] = src.ask(ctx, p) })
	}
	wg.Wait()
	return answers
}

// notForeign are the selectors that a process in a foreign user namespace does
// not get: whoever owns that can make it run anything under any path, and
// forge whose child or whose leader it is.
var notForeign = []string{
	"unix:path:", "unix:sha256:", "container:path:",
	"process:leader:", "process:host:", "process:parent_path:", "process:parent_sha256:", "process:ancestor_path:",
}

func isNotForeign(s string) bool {
	return slices.ContainsFunc(notForeign, func(p string) bool { return strings.HasPrefix(s, p) })
}

// merge puts the answers together. It fails closed: what a source may not
// give is dropped, and what it did not say is unknown.
func (s *Set) merge(e *Evidence, answers []answer, foreign bool, foreignErr error) {
	drop := foreign || foreignErr != nil
	if foreignErr != nil {
		e.Unknown = append(e.Unknown, Unknown{Prefixes: notForeign, Err: foreignErr})
	}
	for i, a := range answers {
		src := s.sources[i]
		for _, sel := range a.selectors {
			text := sel.String()
			switch {
			case drop && isNotForeign(text), !selectable(text), strings.Contains(sel.Type, ":"):
			case !src.gives(text):
				s.log.Warn("attestor gave a selector of a kind that it does not declare", "attestor", src.Name)
			default:
				e.Selectors = append(e.Selectors, sel)
			}
		}
		if a.err == nil {
			continue
		}
		s.log.Debug("attestor does not know", "attestor", src.Name, "error", a.err)
		u := Unknown{Prefixes: src.Prefixes, Err: fmt.Errorf("%s: %w", src.Name, a.err)}
		if narrow, ok := errors.AsType[*Unknown](a.err); ok {
			u.Prefixes = narrow.Prefixes
		}
		if foreign { // these it will never have
			u.Prefixes = slices.DeleteFunc(slices.Clone(u.Prefixes), isNotForeign)
		}
		if len(u.Prefixes) > 0 {
			e.Unknown = append(e.Unknown, u)
		}
	}
	slices.SortFunc(e.Selectors, Selector.Compare)
	e.Selectors = slices.Compact(e.Selectors)
}

// owner says whose budget the process draws on. A source may know; else it is
// the real UID's.
func (s *Set) owner(p *peer.Process, uid uint32) string {
	type owner interface {
		Owner(*peer.Process) (string, error)
	}
	for _, src := range s.sources {
		if o, ok := src.Attestor.(owner); ok {
			if by, err := o.Owner(p); err == nil && by != "" {
				return by
			}
		}
	}
	return "uid:" + decimal(uid)
}

// bootID tells one boot of the machine from another.
var bootID = sync.OnceValues(func() (string, error) {
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return "", fmt.Errorf("read boot ID: %w", err)
	}
	return strings.TrimSpace(string(b)), nil
})

var instanceEncoding = base32.NewEncoding("abcdefghijklmnopqrstuvwxyz234567").WithPadding(base32.NoPadding)

// instance names this run of the process: the same for a restarted daemon,
// never the same for another process.
func instance(p *peer.Process) (string, error) {
	boot, err := bootID()
	if err != nil {
		return "", err
	}
	sum := sha256.Sum256(fmt.Appendf(nil, "deputy process instance\x00%s\x00%d\x00%d", boot, p.PID(), p.StartTime()))
	return instanceEncoding.EncodeToString(sum[:])[:26], nil
}

// tracedFor bounds the look at all tasks; it is enough for some 100,000.
const tracedFor = time.Second

// traced reports whether any task of the process has a tracer: one that
// attached to another thread does not show on the first. Tasks that could not
// be looked at in time may have one, so the answer is then yes.
func traced(p *peer.Process, deadline time.Time) (bool, error) {
	tasks, err := p.ReadDir("task")
	if err != nil {
		return false, err
	}
	for _, t := range tasks {
		if time.Now().After(deadline) {
			return true, nil
		}
		status, err := p.ReadFile("task/" + t.Name() + "/status")
		switch {
		case errors.Is(err, fs.ErrNotExist), errors.Is(err, unix.ESRCH):
			continue // the thread ended
		case err != nil:
			return false, err
		}
		tracer, err := tracerOf(status)
		if err != nil {
			return false, fmt.Errorf("read status of task %s of %d: %w", t.Name(), p.PID(), err)
		}
		if tracer {
			return true, nil
		}
	}
	return false, nil
}

// tracerOf reads TracerPid. The kernel escapes line breaks in the name that
// the thread gave itself, which comes first.
func tracerOf(status []byte) (bool, error) {
	for line := range bytes.Lines(status) {
		if value, ok := bytes.CutPrefix(line, []byte("TracerPid:")); ok {
			return string(bytes.TrimSpace(value)) != "0", nil
		}
	}
	return false, errors.New("TracerPid is missing")
}
