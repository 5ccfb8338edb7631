package attestor

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/deputy-id/deputy/test/systemd"
)

// insideEnv tells a copy of this test that it runs beside a systemd of its own.
const insideEnv = "DEPUTY_ATTESTOR_INSIDE"

func TestRealSystemd(t *testing.T) {
	node := systemd.Start(t, os.DirFS("testdata/systemd"))
	binary := copyTo(t, filepath.Join(t.TempDir(), "attestor.test"))
	c := node.Command(binary, "-test.run", "^TestBesideSystemd$", "-test.v")
	c.Env = append(os.Environ(), insideEnv+"=1")
	out, err := c.CombinedOutput()
	if err != nil || !strings.Contains(string(out), "--- PASS: TestBesideSystemd") {
		t.Errorf("beside systemd: %v\n%s", err, out)
	}
}

// TestBesideSystemd runs in the namespaces that TestRealSystemd made.
func TestBesideSystemd(t *testing.T) {
	if os.Getenv(insideEnv) == "" {
		t.Skip("runs as a part of TestRealSystemd")
	}
	b := newBench(t)
	s := NewSystemd(DefaultBus, openCgroups(t))
	defer s.Close()

	main := func(unit string) int {
		out, err := exec.Command("systemctl", "show", "-P", "MainPID", unit).Output()
		if err != nil {
			t.Fatal(err)
		}
		return atoi(t, strings.TrimSpace(string(out)))
	}
	other := func(unit string) int { // a process of the unit that is not its main one
		out, err := exec.Command("systemctl", "show", "-P", "ControlGroup", unit).Output()
		if err != nil {
			t.Fatal(err)
		}
		unified, _ := hierarchies(t)
		procs, err := os.ReadFile(unified + strings.TrimSpace(string(out)) + "/cgroup.procs")
		if err != nil {
			t.Fatal(err)
		}
		for _, pid := range strings.Fields(string(procs)) {
			if atoi(t, pid) != main(unit) {
				return atoi(t, pid)
			}
		}
		t.Fatalf("%s has one process", unit)
		return 0
	}
	for name, test := range map[string]struct {
		unit  string
		pid   int
		leads bool
	}{
		"main process of a simple service":                {"simple.service", main("simple.service"), true},
		"another process of it":                           {"simple.service", other("simple.service"), false},
		"main process of a notify service":                {"notify.service", main("notify.service"), true},
		"main process of one where anybody may notify":    {"anybody.service", main("anybody.service"), false},
		"main process of a forking service is a guess":    {"forking.service", main("forking.service"), false},
		"main process of a service that may make cgroups": {"delegated.service", main("delegated.service"), true},
	} {
		t.Run(name, func(t *testing.T) {
			p := b.open(test.pid)
			got, err := s.Attest(context.Background(), p)
			if err != nil {
				t.Fatal(err)
			}
			if ids := pick(got, "systemd:id"); !cmp.Equal(ids, []string{test.unit}) {
				t.Errorf("got systemd:id %v, want %s", ids, test.unit)
			}
			if paths := pick(got, "systemd:fragment_path"); len(paths) != 1 || filepath.Base(paths[0]) != test.unit {
				t.Errorf("got systemd:fragment_path %v, want that of %s", paths, test.unit)
			}
			if leads := len(pick(got, "process:leader")) == 1; leads != test.leads {
				t.Errorf("got leader %v, want %v", leads, test.leads)
			}
			alone, err := s.LeaderSource().Attestor.Attest(context.Background(), p)
			if err != nil || len(alone) > 1 || (len(alone) == 1) != test.leads {
				t.Errorf("leader alone: got %v, %v, want leader %v and nothing else", alone, err, test.leads)
			}
		})
	}
	t.Run("process from outside of the cgroup namespace", func(t *testing.T) {
		if got, err := s.Attest(context.Background(), b.open(os.Getpid())); err == nil {
			t.Errorf("got %v, want it unknown", got)
		}
	})
	t.Run("process of no unit", func(t *testing.T) {
		unified, systemd := hierarchies(t)
		pid := enter(t, unified)
		if systemd != "" {
			if err := os.WriteFile(systemd+"/cgroup.procs", []byte(itoa(pid)), 0); err != nil {
				t.Fatal(err)
			}
		}
		if got, err := s.Attest(context.Background(), b.open(pid)); err != nil || got != nil {
			t.Errorf("got %v, %v, want nothing", got, err)
		}
	})
	t.Run("another socket than root's", func(t *testing.T) {
		bus := filepath.Join(t.TempDir(), "bus")
		if err := os.Symlink(DefaultBus, bus); err != nil {
			t.Fatal(err)
		}
		if err := os.Chown(DefaultBus, 65534, 65534); err != nil {
			t.Fatal(err)
		}
		defer os.Chown(DefaultBus, 0, 0)
		other := NewSystemd(bus, openCgroups(t))
		if got, err := other.Attest(context.Background(), b.open(main("simple.service"))); err == nil {
			t.Errorf("got %v of a bus that is another user's, want it unknown", got)
		}
	})
	t.Run("a bus that went away and came back", func(t *testing.T) {
		s.bus.conn.Close()
		if got, err := s.Attest(context.Background(), b.open(main("simple.service"))); err != nil || len(got) != 3 {
			t.Errorf("got %v, %v, want all of it again", got, err)
		}
	})
}
