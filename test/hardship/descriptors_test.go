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

	"github.com/deputy-id/deputy/test/need"
	"github.com/deputy-id/deputy/test/process"
	"github.com/deputy-id/deputy/test/wait"
)

// firstChild waits for a process to have a child, and returns its PID.
func firstChild(t *testing.T, pid int) (child string) {
	t.Helper()
	wait.UntilNil(t, func() error {
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
func (d *host) shell(script string) *exec.Cmd {
	return exec.Command("sh", append([]string{"-c", script}, d.Args()...)...)
}

// With few descriptors one user's connections are soon too many. They cost that
// user its turn, and neither others nor administrators nor the database theirs.
func TestFewDescriptors(t *testing.T) {
	need.Root(t, "processes of other users")
	t.Parallel()
	d := newHost(t, mine()+others)
	d.StartBy(t, d.shell(`ulimit -n 128 && exec "$0" "$@"`))
	d.fetches(t, "/agent/me")
	var held []net.Conn
	for range 200 {
		held = append(held, connect(t, d.Workload))
	}
	d.othersAreServed(t)
	d.Run(t, "entry", "create", "/agent/full", "--selector", "unix:uid:4711")
	if n := d.descriptors(t); n >= 128 {
		t.Errorf("got %d descriptors, want a reserve", n)
	}
	for _, c := range held {
		c.Close()
	}
	wait.UntilNil(t, func() error { return d.Try("fetch", "x509") })
	d.othersAreServed(t)
	if out := d.Run(t, "entry", "list"); !strings.Contains(out, "/agent/full") {
		t.Errorf("got %q, want the entry that was made meanwhile", out)
	}
}

// Where others take the descriptors of the whole process, connections wait,
// and the log says so.
func TestNoDescriptorLeft(t *testing.T) {
	need.Root(t, "limits of other processes")
	t.Parallel()
	d := start(t, mine())
	pid := fmt.Sprint(d.PID())
	process.Run(t, exec.Command("prlimit", "--pid", pid, "--nofile=3:"))
	c := connect(t, d.Workload)
	d.Says(t, "accepting connections fails for now")
	process.Run(t, exec.Command("prlimit", "--pid", pid, "--nofile=4096:"))
	// The one that waited is greeted.
	c.SetDeadline(time.Now().Add(wait.Patience))
	if _, err := io.ReadFull(c, make([]byte, 9)); err != nil {
		t.Errorf("the connection that waited: %v", err)
	}
	d.fetches(t, "/agent/me")
}
