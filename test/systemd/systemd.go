// Package systemd gives tests a real systemd: PID 1 of namespaces of its own,
// with a system bus, the units that the test brings and none of the machine's.
// It needs root, systemd and dbus.
package systemd

import (
	"embed"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"testing/fstest"
	"time"

	"github.com/deputy-id/deputy/test/need"
	"github.com/deputy-id/deputy/test/process"
)

//go:embed units
var base embed.FS

//go:embed init.sh
var script string

// Units are units of a test's own, by name.
type Units map[string]string

// Open opens one as a file, without the dependencies that units have by default
// and the node has not.
func (u Units) Open(name string) (fs.File, error) {
	files := make(fstest.MapFS)
	for name, text := range u {
		if !strings.Contains(text, "[Unit]\n") {
			text = "[Unit]\n" + text
		}
		files[name] = &fstest.MapFile{Data: []byte(strings.Replace(text, "[Unit]\n", "[Unit]\nDefaultDependencies=no\n", 1))}
	}
	return files.Open(name)
}

// Log returns a file for what a unit says (StandardError=append:FILE), which is
// shown should the test fail.
func Log(tb testing.TB) (file string) {
	tb.Helper()
	file = filepath.Join(tb.TempDir(), "log")
	tb.Cleanup(func() {
		if text, err := os.ReadFile(file); err == nil && tb.Failed() {
			tb.Logf("log of a unit:\n%s", text)
		}
	})
	return file
}

// A Node is a running systemd.
type Node struct{ PID int }

// Start runs a systemd with these units for the length of the test. It comes
// up with up.target, which wants the bus and, if the test brings one of that
// name, what that says.
func Start(tb testing.TB, units fs.FS) *Node {
	tb.Helper()
	for _, program := range []string{"/lib/systemd/systemd", "/usr/bin/dbus-daemon"} {
		need.Program(tb, program)
	}
	if os.Geteuid() != 0 {
		tb.Fatal("a systemd of one's own needs root")
	}
	c := &exec.Cmd{Path: "/bin/bash", SysProcAttr: &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}}
	v1, v2 := mounts()
	tops := cgroups(tb, v1, v2)
	// The namespace's root is the cgroup in which it is made.
	c.Args = append([]string{"bash", "-c", `for d in ` + strings.Join(tops, " ") + `; do echo $$ >$d/cgroup.procs; done; exec "$@"`, "sh"},
		"unshare", "--pid", "--fork", "--kill-child", "--mount", "--uts", "--ipc", "--net", "--cgroup",
		"bash", "-c", script, "init.sh", lay(tb, units), v1, v2)
	p := process.Start(tb, c)
	tb.Cleanup(func() {
		p.Signal(tb, syscall.SIGKILL) // and with it, by --kill-child, that systemd
		p.Wait(tb)
	})
	n := new(Node)
	p.Until(tb, "up.target", func() bool {
		children, _ := os.ReadFile(fmt.Sprintf("/proc/%d/task/%[1]d/children", p.PID()))
		var err error
		n.PID, err = strconv.Atoi(strings.TrimSpace(string(children)))
		return err == nil && n.Command("systemctl", "is-active", "-q", "up.target").Run() == nil
	})
	return n
}

// Command is one in the node's namespaces. Its cgroup stays the test's: for
// the node's processes it stands outside.
func (n *Node) Command(name string, args ...string) *exec.Cmd {
	return exec.Command("nsenter", append([]string{"-a", "-t", strconv.Itoa(n.PID), name}, args...)...)
}

// Run runs a command in the node, which has to end well, and returns what it said.
func (n *Node) Run(tb testing.TB, name string, args ...string) string {
	tb.Helper()
	return process.Run(tb, n.Command(name, args...))
}

// lay puts the units into a directory that everybody may read.
func lay(tb testing.TB, units fs.FS) string {
	dir := tb.TempDir()
	ours, err := fs.Sub(base, "units")
	if err != nil {
		tb.Fatal(err)
	}
	for _, from := range []fs.FS{ours, units} {
		names, err := fs.Glob(from, "*")
		if err != nil {
			tb.Fatal(err)
		}
		for _, name := range names {
			text, err := fs.ReadFile(from, name)
			if err != nil {
				tb.Fatal(err)
			}
			if err := os.WriteFile(filepath.Join(dir, name), text, 0o644); err != nil {
				tb.Fatal(err)
			}
		}
	}
	if err := os.Chmod(dir, 0o755); err != nil {
		tb.Fatal(err)
	}
	return dir
}

// mounts are where the hierarchies lie, v1's name=systemd only beside v2's in
// a directory of its own.
func mounts() (v1, v2 string) {
	v2 = "/sys/fs/cgroup"
	if _, err := os.Stat(v2 + "/unified/cgroup.procs"); err == nil {
		v2 += "/unified"
	}
	if _, err := os.Stat("/sys/fs/cgroup/systemd/tasks"); err == nil {
		v1 = "/sys/fs/cgroup/systemd"
	}
	return v1, v2
}

// cgroups makes a cgroup in each hierarchy, and removes them after the test.
func cgroups(tb testing.TB, mounts ...string) (tops []string) {
	for _, mount := range mounts {
		if mount == "" {
			continue
		}
		top := filepath.Join(mount, fmt.Sprintf("deputy-systemd-%d", os.Getpid()))
		if err := os.Mkdir(top, 0o755); err != nil {
			tb.Fatal(err)
		}
		tops = append(tops, top)
	}
	tb.Cleanup(func() {
		end := time.Now().Add(10 * time.Second)
		for _, top := range tops {
			for {
				exec.Command("find", top, "-depth", "-type", "d", "-exec", "rmdir", "{}", ";").Run()
				if _, err := os.Stat(top); os.IsNotExist(err) {
					break
				}
				if time.Now().After(end) {
					tb.Errorf("%s cannot be removed", top)
					break
				}
				<-time.After(20 * time.Millisecond) // until its processes are gone
			}
		}
	})
	return tops
}
