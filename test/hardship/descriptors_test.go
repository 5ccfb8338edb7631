package hardship

import (
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"
)

// firstChild waits for a process to have a child, and returns its PID.
func firstChild(t *testing.T, pid int) (child string) {
	t.Helper()
	eventually(t, func() error {
		text, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%[1]d/children", pid))
		if f := strings.Fields(string(text)); err == nil && len(f) > 0 {
			child = f[0]
			return nil
		}
		return fmt.Errorf("process %d has no child", pid)
	})
	return child
}

// shell is the daemon's command by way of a shell.
func shell(p *place, script string) *exec.Cmd {
	return exec.Command("sh", append([]string{"-c", script}, p.command().Args...)...)
}

// With few descriptors one user's connections are soon too many. They cost that
// user its turn, and neither others nor administrators nor the database theirs.
func TestFewDescriptors(t *testing.T) {
	needRoot(t)
	t.Parallel()
	p := newPlace(t, mine()+others)
	d := p.begin(t, shell(p, `ulimit -n 128 && exec "$0" "$@"`))
	d.fetches(t, "/agent/me")
	var held []net.Conn
	for range 200 {
		held = append(held, connect(t, d.workload))
	}
	d.othersAreServed(t)
	d.run(t, "entry", "create", "/agent/full", "--selector", "unix:uid:4711")
	if n := d.descriptors(t); n >= 128 {
		t.Errorf("got %d descriptors, want a reserve", n)
	}
	for _, c := range held {
		c.Close()
	}
	eventually(t, func() error { return d.try("fetch", "x509") })
	d.othersAreServed(t)
	if out := d.run(t, "entry", "list"); !strings.Contains(out, "/agent/full") {
		t.Errorf("got %q, want the entry that was made meanwhile", out)
	}
}

// Where others take the descriptors of the whole process, connections wait,
// and the log says so.
func TestNoDescriptorLeft(t *testing.T) {
	needRoot(t)
	t.Parallel()
	p := newPlace(t, mine())
	d := p.start(t)
	pid := fmt.Sprint(d.cmd.Process.Pid)
	if out, err := exec.Command("prlimit", "--pid", pid, "--nofile=3:").CombinedOutput(); err != nil {
		t.Fatalf("prlimit: %v\n%s", err, out)
	}
	c := connect(t, d.workload)
	d.logged(t, "accepting connections fails for now")
	if out, err := exec.Command("prlimit", "--pid", pid, "--nofile=4096:").CombinedOutput(); err != nil {
		t.Fatalf("prlimit: %v\n%s", err, out)
	}
	// The one that waited is greeted.
	c.SetDeadline(time.Now().Add(patience))
	if _, err := io.ReadFull(c, make([]byte, 9)); err != nil {
		t.Errorf("the connection that waited: %v", err)
	}
	d.fetches(t, "/agent/me")
}
