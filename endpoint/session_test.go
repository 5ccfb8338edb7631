package endpoint

import (
	"context"
	"crypto"
	"crypto/x509"
	"errors"
	"testing"

	"github.com/hashicorp/go-hclog"
	"google.golang.org/grpc/codes"

	"github.com/deputy-id/deputy/attestor"
	"github.com/deputy-id/deputy/attestor/peer"
	"github.com/deputy-id/deputy/svid"
	"github.com/deputy-id/deputy/svid/local"
	"github.com/deputy-id/deputy/svid/registry"
)

// onlyLink is the one connection of the one process.
func (w *world) onlyLink() *link {
	w.t.Helper()
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, c := range w.sessions {
		c.mu.Lock()
		defer c.mu.Unlock()
		for l := range c.links {
			return l
		}
	}
	w.t.Fatal("nobody is connected")
	return nil
}

// A rotation that came to nothing leaves its reason behind. What was gathered
// for it is of that time: the process may run another program since.
func TestEvidenceOfARotationIsNotUsedAfterItChanged(t *testing.T) {
	w := start(t)
	w.entry("/a", nil, mine)
	recv(t, x509Stream(t, w.workloadAPI()), "/a")
	l, because := w.onlyLink(), new(int)
	v, _, err := w.identify(call(t), l, because)
	if err != nil || len(v.Entries) != 1 {
		t.Fatalf("got %v, %v, want an entry", v, err)
	}
	w.evidence.set(func(ev *attestor.Evidence) { ev.Selectors = []attestor.Selector{other} })
	if v, _, err = w.identify(call(t), l, because); err != nil {
		t.Fatal(err)
	}
	if len(v.Entries) != 0 {
		t.Errorf("got %s by evidence that was gathered before, want nothing", v.Entries[0].Path)
	}
	// Nor once it holds no more.
	before := w.evidence.times()
	w.evidence.mu.Lock()
	w.evidence.stranger = true
	w.evidence.mu.Unlock()
	w.identify(call(t), l, because)
	if w.evidence.times() == before {
		t.Error("what does not hold any more was not gathered anew")
	}
}

func TestEvidenceOfAnotherProgramIsNotUsed(t *testing.T) {
	w := start(t)
	w.entry("/a", nil, mine)
	w.evidence.stranger = true
	_, err := x509Stream(t, w.workloadAPI()).Recv()
	wantCode(t, err, codes.Unavailable)
	_, err = fetch(call(t), w.workloadAPI())
	wantCode(t, err, codes.Unavailable)
}

// A slow authority has something happen before it signs, or does not.
type slow struct {
	svid.Authority
	before func()
	err    error
}

func (s *slow) X509(ctx context.Context, e registry.Entry, key crypto.Signer) ([]*x509.Certificate, error) {
	s.before()
	if s.err != nil {
		return nil, s.err
	}
	return s.Authority.X509(ctx, e, key)
}

// Between the question and the answer a process may execute another program,
// and signing takes as long as it takes.
func TestKeyIsNotSentToAProgramThatWasExecutedWhileItWasSigned(t *testing.T) {
	authority := &slow{before: func() {}}
	w := start(t, func(c *Config, _ *local.Options) {
		c.Keeper = svid.NewKeeper(authority, svid.KeeperOptions{Log: hclog.NewNullLogger()})
	})
	authority.Authority = w.authority
	w.entry("/a", nil, mine)
	p := w.run("later:" + w.socket)
	p.says(t, "[/a]")
	l := w.onlyLink()
	authority.before = func() {
		p.execute()
		eventually(t, "the client executes another program", func() bool { return l.Check() != nil })
	}
	w.entry("/b", nil, mine) // which the client's own stream asks for as well
	if _, err := w.x509State(call(t), l, nil); !errors.Is(err, peer.ErrProgramChanged) {
		t.Errorf("got %v, want %v", err, peer.ErrProgramChanged)
	}
}
