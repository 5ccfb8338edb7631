package daemon_test

import (
	"fmt"
	"os"
	"runtime"
	"strings"
	"syscall"
	"testing"

	"github.com/deputy-id/deputy/test/binary"
	"github.com/deputy-id/deputy/test/daemon"
)

func TestMain(m *testing.M) {
	code := m.Run()
	binary.Remove()
	os.Exit(code)
}

// A trial is a test that is to fail.
type trial struct {
	testing.TB
	failed   bool
	said     strings.Builder
	cleanups []func()
}

func (t *trial) Helper()          {}
func (t *trial) Failed() bool     { return t.failed }
func (t *trial) Cleanup(f func()) { t.cleanups = append(t.cleanups, f) }

func (t *trial) Logf(format string, args ...any) { fmt.Fprintf(&t.said, format+"\n", args...) }

func (t *trial) Errorf(format string, args ...any) {
	t.failed = true
	t.Logf(format, args...)
}

func (t *trial) Fatal(args ...any) { t.Fatalf("%s", fmt.Sprint(args...)) }

func (t *trial) Fatalf(format string, args ...any) {
	t.Errorf(format, args...)
	runtime.Goexit()
}

// failure is what the test says that fails by this.
func failure(t *testing.T, f func(testing.TB)) string {
	t.Helper()
	inner := &trial{TB: t}
	do := func(f func()) {
		ended := make(chan struct{})
		go func() {
			defer close(ended)
			f()
		}()
		<-ended
	}
	do(func() { f(inner) })
	for i := len(inner.cleanups) - 1; i >= 0; i-- {
		do(inner.cleanups[i])
	}
	if !inner.failed {
		t.Error("the test passes")
	}
	return inner.said.String()
}

// A test fails where the daemon does, and shows why.
func TestFailures(t *testing.T) {
	for name, c := range map[string]struct {
		test func(testing.TB)
		want []string
	}{
		"a daemon that does not start": {func(tb testing.TB) {
			daemon.Start(tb, "example.org", "nonsense = 1\n")
		}, []string{"deputy has ended: exit status 1", "deputy.hcl:5:1: "}},
		"a daemon that ends before the test": {func(tb testing.TB) {
			d := daemon.Start(tb, "example.org", "")
			syscall.Kill(d.PID(), syscall.SIGKILL)
			<-d.Done()
		}, []string{"deputy run: signal: killed", "started: "}},
		"something that is never logged": {func(tb testing.TB) {
			d := daemon.Start(tb, "example.org", "")
			d.Signal(tb, syscall.SIGTERM)
			d.Says(tb, "good morning")
		}, []string{"deputy has ended: exit status 0", "stopping"}},
		"a command that fails": {func(tb testing.TB) {
			daemon.Start(tb, "example.org", "").Run(tb, "fetch", "x509")
		}, []string{"deputy fetch x509: exit status 3", "no identity issued", `reason="no identity issued"`}},
	} {
		t.Run(name, func(t *testing.T) {
			said := failure(t, c.test)
			for _, want := range c.want {
				if !strings.Contains(said, want) {
					t.Errorf("got %q, want %q in it", said, want)
				}
			}
		})
	}
}

func TestConfigurationStandsInItsPlace(t *testing.T) {
	d := daemon.New(t, "", "broker { socket = \"/run/deputy/broker/b.sock\" }\n")
	text, err := os.ReadFile(d.Config)
	if err != nil {
		t.Fatal(err)
	}
	if strings.Contains(string(text), "trust_domain") || !strings.Contains(string(text), fmt.Sprintf("socket = %q", d.Dir+"/broker/b.sock")) {
		t.Errorf("got %s", text)
	}
	if err := syscall.Access(d.Workload, 0); err == nil {
		t.Error("it runs")
	}
}
