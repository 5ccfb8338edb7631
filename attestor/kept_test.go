package attestor

import (
	"net"
	"path/filepath"
	"testing"
	"time"

	"github.com/deputy-id/deputy/attestor/peer"
)

// connect returns a connection of this very process.
func connect(t *testing.T) *peer.Conn {
	t.Helper()
	table, _, err := peer.NewTable()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { table.Close() })
	path := filepath.Join(t.TempDir(), "s")
	l, err := peer.Listen(path, table, peer.Options{Mode: 0o600, Group: -1})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	client, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { client.Close() })
	c, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c.(*peer.Conn)
}

func TestKeptIsOfWhatOpenedTheConnection(t *testing.T) {
	for name, spoil := range map[string]func(*kept){ // nil: nothing
		"unchanged":                    nil,
		"evidence of another program":  func(k *kept) { k.look.program = new(peer.Program) },
		"evidence of other privileges": func(k *kept) { k.look.info.EUID++ },
		"another parent":               func(k *kept) { k.look.info.PPID++ },
		"too old":                      func(k *kept) { k.until = time.Now() },
		"less than is asked for":       func(k *kept) { e := *k.evidence; e.Demand = Demand{}; k.evidence = &e },
	} {
		t.Run(name, func(t *testing.T) {
			c := connect(t)
			s := newTestSet(from(says(uid7), "unix:"))
			if got := s.Kept(c); got != nil {
				t.Fatalf("got %v before anything was attested, want nothing", got)
			}
			want := mustAttest(t, s, c.Process())
			if spoil != nil {
				spoilt := *s.record(c.Process()).kept.Load()
				spoil(&spoilt)
				s.record(c.Process()).kept.Store(&spoilt)
				want = nil
			}
			if got := s.Kept(c); got != want {
				t.Errorf("got %p, want %p", got, want)
			}
		})
	}
}

func TestEvidenceOfWhatDidNotOpenTheConnection(t *testing.T) {
	c := connect(t)
	l, err := lookAt(c.Process())
	if err != nil {
		t.Fatal(err)
	}
	if !l.opened(c) {
		t.Error("got no for the program and the credentials that opened the connection")
	}
	program, user := l, l
	program.program = new(peer.Program)
	user.info.EUID++
	if program.opened(c) || user.opened(c) {
		t.Errorf("got %v for another program and %v for another user, want no", program.opened(c), user.opened(c))
	}
}
