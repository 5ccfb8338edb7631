package attestor

import (
	"bytes"
	"context"
	"errors"
	"sync"
	"time"

	"github.com/deputy-id/deputy/attestor/peer"
)

// A Basis is something else that an attestor's answer rests on: a container's
// init process, say. Done is closed when the answer may no longer hold. A
// *peer.Process is one.
type Basis interface {
	Done() <-chan struct{}
	Close() error
}

// RestOn says, from within Attest, that the answer holds only until b is done.
// The Set that asked takes b over and closes it when it keeps the answer no
// longer; outside of a Set b is closed at once.
func RestOn(ctx context.Context, b Basis) {
	if g, ok := ctx.Value(basesKey{}).(*bases); ok && g.add(b) {
		return
	}
	b.Close()
}

// bases collects what the sources rest on, during one gathering.
type bases struct {
	mu     sync.Mutex
	list   []Basis
	closed bool // collected: a source that is late has nobody to rest for
}

type basesKey struct{}

func (g *bases) add(b Basis) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.closed {
		return false
	}
	g.list = append(g.list, b)
	return true
}

func (g *bases) collect() []Basis {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.closed = true
	return g.list
}

// kept is evidence with what it was gathered under.
type kept struct {
	evidence *Evidence
	look     look
	until    time.Time
	bases    []Basis
}

// release closes what the evidence rested on. Nil is fine.
func (k *kept) release() {
	if k != nil {
		closeAll(k.bases)
	}
}

func closeAll(list []Basis) {
	for _, b := range list {
		b.Close()
	}
}

// errStale says that evidence must be gathered anew.
var errStale = errors.New("evidence is stale")

// holds returns nil while the evidence may be used. It is asked at each call:
// a few system calls, and no allocation.
func (k *kept) holds(p *peer.Process) error {
	if !time.Now().Before(k.until) {
		return errStale
	}
	for _, b := range k.bases {
		select {
		case <-b.Done():
			return errStale
		default:
		}
	}
	if err := k.look.holds(p); err != nil {
		return err
	}
	return p.Alive() // last, so that all before was of a living process
}

// A look is what a process was when it was attested, as far as that may change
// while it lives.
type look struct {
	info    peer.Info
	program *peer.Program
	cgroup  []byte // text of the cgroup file; nil where info.CgroupID says as much
}

func lookAt(p *peer.Process) (look, error) {
	program, err := p.Program()
	if err != nil {
		return look{}, err
	}
	info, err := p.Info()
	if err != nil {
		return look{}, err
	}
	l := look{info: info, program: program}
	text, err := p.ReadFile("cgroup")
	if err != nil {
		return look{}, err
	}
	if info.CgroupID == 0 || !v2Decides(text) {
		// A move in v1's hierarchy leaves v2's ID as it was.
		l.cgroup = text
	}
	return l, nil
}

// opened reports whether what was looked at is what opened the connection.
func (l *look) opened(c *peer.Conn) bool {
	return l.program == c.Program() && l.info.Credentials == c.Credentials()
}

// holds returns nil if the process is still what it was.
func (l *look) holds(p *peer.Process) error {
	info, err := p.Info()
	switch {
	case err != nil:
		return err
	case info != l.info:
		return errStale
	}
	if l.cgroup != nil {
		text, err := p.ReadFile("cgroup")
		if err != nil {
			return err
		}
		if !bytes.Equal(text, l.cgroup) {
			return errStale
		}
	}
	return l.program.Current()
}
