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
	d := start(t, mine())
	watching := d.watch(t)
	for _, path := range []string{d.Workload, d.Admin} {
		if err := os.RemoveAll(filepath.Dir(path)); err != nil {
			t.Fatal(err)
		}
	}
	d.Configure(t, mine()+entry("/agent/two"))
	watching.Says(t, "/agent/two")

	next := newHost(t, "")
	next.Workload, next.Admin = d.Workload, d.Admin
	next.Configure(t, mine()+entry("/agent/second"))
	next.Start(t)
	d.Stop(t)
	next.holds(t, "/agent/me", "/agent/second")
	next.Run(t, "entry", "list")
}
