package attestor

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// insideEnv tells a copy of this test that it runs beside a systemd of its own.
const insideEnv = "DEPUTY_ATTESTOR_INSIDE"

// systemdNode starts a real systemd as PID 1 of namespaces of its own, with a
// system bus and the units of testdata/systemd, and returns its PID.
func systemdNode(t *testing.T) int {
	t.Helper()
	for _, program := range []string{"/lib/systemd/systemd", "/usr/bin/dbus-daemon"} {
		if _, err := os.Stat(program); err != nil {
			t.Skipf("LOUD: the systemd attestor is not tested against systemd: %v", err)
		}
	}
	unified, systemd := hierarchies(t)
	units := t.TempDir()
	if err := os.CopyFS(units, os.DirFS("testdata/systemd/units")); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(units, 0o755); err != nil {
		t.Fatal(err)
	}
	script, err := os.ReadFile("testdata/systemd/init.sh")
	if err != nil {
		t.Fatal(err)
	}
	c := exec.Command("unshare", "--pid", "--fork", "--kill-child", "--mount", "--uts", "--ipc", "--net", "--cgroup",
		"bash", "-c", string(script), "init.sh", units, systemd, unified)
	// The namespace's root is the cgroup in which it is made.
	var tops []string
	for _, mount := range []string{systemd, unified} {
		if mount != "" {
			top := filepath.Join(mount, fmt.Sprintf("deputy-systemd-%d", os.Getpid()))
			if err := os.Mkdir(top, 0o755); err != nil {
				t.Fatal(err)
			}
			tops = append(tops, top)
		}
	}
	t.Cleanup(func() { removeTrees(t, tops) })
	var log strings.Builder
	c.Stdout, c.Stderr = &log, &log
	c.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	c.Args = append([]string{"bash", "-c", `for d in ` + strings.Join(tops, " ") + `; do echo $$ >$d/cgroup.procs; done; exec "$@"`, "sh"}, c.Args...)
	c.Path = "/bin/bash"
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		c.Process.Kill() // and with it, by --kill-child, that systemd
		c.Wait()
		if t.Failed() {
			t.Logf("systemd said:\n%s", log.String())
		}
	})
	deadline := time.Now().Add(20 * time.Second)
	for time.Now().Before(deadline) {
		children, _ := os.ReadFile(fmt.Sprintf("/proc/%d/task/%[1]d/children", c.Process.Pid))
		if pid := strings.TrimSpace(string(children)); pid != "" {
			if exec.Command("nsenter", "-a", "-t", pid, "systemctl", "is-active", "-q", "up.target").Run() == nil {
				return atoi(t, pid)
			}
		}
		<-time.After(50 * time.Millisecond) // another program's start: there is nothing to wait on
	}
	t.Fatal("systemd did not come up in 20 seconds")
	return 0
}

// removeTrees removes cgroups, once the processes in them are gone.
func removeTrees(t *testing.T, tops []string) {
	deadline := time.Now().Add(10 * time.Second)
	for _, top := range tops {
		for {
			exec.Command("find", top, "-depth", "-type", "d", "-exec", "rmdir", "{}", ";").Run()
			if _, err := os.Stat(top); os.IsNotExist(err) {
				break
			}
			if time.Now().After(deadline) {
				t.Errorf("%s cannot be removed", top)
				break
			}
			<-time.After(20 * time.Millisecond)
		}
	}
}

func TestRealSystemd(t *testing.T) {
	pid := systemdNode(t)
	binary := copyTo(t, filepath.Join(t.TempDir(), "attestor.test"))
	c := exec.Command("nsenter", "-a", "-t", itoa(pid), binary, "-test.run", "^TestBesideSystemd$", "-test.v")
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
