package endpoint

import (
	"testing"

	"google.golang.org/grpc/codes"

	"github.com/deputy-id/deputy/attestor"
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
