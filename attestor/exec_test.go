package attestor

import (
	"errors"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/deputy-id/deputy/attestor/peer"
)

func TestExecNamesWhomItWasTold(t *testing.T) {
	b := newBench(t)
	r := start(t, self(t), nil)
	named, other := b.open(r.self), b.open(start(t, self(t), nil).self)
	e := NewExec()
	for _, name := range []string{"crawler", "crawler", "second"} {
		if err := e.Register(named, name); err != nil {
			t.Fatal(err)
		}
	}
	got, err := e.Attest(t.Context(), named)
	want := []Selector{{"process", "leader:true"}, {"process", "exec:crawler"}, {"process", "exec:second"}}
	if diff := cmp.Diff(want, got); diff != "" || err != nil {
		t.Errorf("%v, selectors (-want +got):\n%s", err, diff)
	}
	r.tell("exec /proc/self/exe")
	if got, _ := e.Attest(t.Context(), named); len(got) != 3 {
		t.Errorf("got %v after it executed its command, want the same", got)
	}
	if got, err := e.Attest(t.Context(), other); err != nil || got != nil {
		t.Errorf("got %v, %v of another process, want nothing", got, err)
	}
}

func TestExecForgetsTheEnded(t *testing.T) {
	b := newBench(t)
	r := start(t, self(t), nil)
	p := b.open(r.self)
	e := NewExec()
	if err := e.Register(p, "a"); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Kill(r.self, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	<-p.Done()
	if err := e.Register(p, "b"); !errors.Is(err, peer.ErrGone) {
		t.Errorf("got %v of an ended process, want ErrGone", err)
	}
}

func TestExecRefusesNames(t *testing.T) {
	p := newBench(t).open(start(t, self(t), nil).self)
	for _, name := range []string{"", "a b", "a:b", "ä", "a/b", "a\nb", strings.Repeat("a", 65)} {
		if err := NewExec().Register(p, name); err == nil {
			t.Errorf("took the name %q", name)
		}
	}
}
