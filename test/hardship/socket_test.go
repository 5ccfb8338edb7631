package hardship

import (
	"os"
	"path/filepath"
	"testing"
)

// Whose sockets are taken away while it runs serves those who are connected,
// and leaves to another daemon what that has put in their place.
func TestSocketsThatAreTakenAway(t *testing.T) {
	t.Parallel()
	p := newPlace(t, mine())
	d := p.start(t)
	watching := d.cli("watch")
	var updates transcript
	watching.Stdout, watching.Stderr = &updates, &updates
	if err := watching.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { watching.Process.Kill(); watching.Wait() })
	eventually(t, updates.has("update 1"))
	for _, path := range []string{p.workload, p.admin} {
		if err := os.RemoveAll(filepath.Dir(path)); err != nil {
			t.Fatal(err)
		}
	}
	d.configure(t, mine()+entry("/agent/two"))
	eventually(t, updates.has("/agent/two"))

	second := *p
	second.data = filepath.Join(p.dir, "second")
	second.config = filepath.Join(p.dir, "second.hcl")
	second.configure(t, mine()+entry("/agent/second"))
	next := second.start(t)
	d.stop(t)
	next.holds(t, "/agent/me", "/agent/second")
	next.run(t, "entry", "list")
}
