package attestor

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// family starts a launcher and, below it, an agent.
func family(t *testing.T, launcher string, attr *syscall.SysProcAttr) (r *running, launcherPath, agentPath string, agent int) {
	t.Helper()
	dir := t.TempDir()
	launcherPath = copyTo(t, filepath.Join(dir, launcher))
	agentPath = copyTo(t, filepath.Join(dir, "agent"))
	r = start(t, launcherPath, attr)
	return r, launcherPath, agentPath, r.tell("start %s", agentPath)
}

func self(t *testing.T) string {
	t.Helper()
	exe, err := os.Readlink("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	return exe
}

func TestLineage(t *testing.T) {
	b := newBench(t)
	_, launcher, _, agent := family(t, "launcher", nil)
	p := b.open(agent)
	b.want(p, "process:parent_path", launcher)
	b.want(p, "process:parent_sha256") // nobody asked
	ancestors := b.values(p, "process:ancestor_path")
	if len(ancestors) < 2 || ancestors[0] != launcher || ancestors[1] != self(t) {
		t.Errorf("ancestors: got %q, want %q, %q first", ancestors, launcher, self(t))
	}
	b.demand.ParentDigest = true
	b.want(p, "process:parent_sha256", digestOfFile(t, launcher))
}

func TestHost(t *testing.T) {
	needRoot(t)
	cases := []struct {
		name string
		attr *syscall.SysProcAttr
		want []string
	}{
		{"on the host", nil, []string{"true"}},
		{"another user", &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 1, Gid: 1}}, []string{"true"}},
		{"network of its own", &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET}, []string{"true"}},
		{"mounts of its own", &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNS}, nil},
		{"PIDs of its own", &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWPID}, nil},
		{"cgroups of its own", &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWCGROUP}, nil},
		{"users of its own", &syscall.SysProcAttr{
			Cloneflags:  syscall.CLONE_NEWUSER,
			UidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: 0, Size: 1}},
			GidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: 0, Size: 1}},
		}, nil},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			b := newBench(t)
			b.want(b.open(cat(t, c.attr)), "process:host", c.want...)
		})
	}
}

func TestOrphanHasNoParent(t *testing.T) {
	b := newBench(t)
	dir := t.TempDir()
	launcher := copyTo(t, filepath.Join(dir, "launcher"))
	agent := copyTo(t, filepath.Join(dir, "agent"))
	r := start(t, launcher, nil)
	p := b.open(r.tell("start %s", agent))
	b.want(p, "process:parent_path", launcher)
	if err := unix.Kill(r.self, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	var ws syscall.WaitStatus
	if _, err := syscall.Wait4(r.self, &ws, 0, nil); err != nil {
		t.Fatal(err)
	}
	b.want(p, "process:parent_path")
	b.want(p, "process:ancestor_path")
}

func TestLineageEndsAtKnownSubreaper(t *testing.T) {
	b := newBench(t)
	dir := t.TempDir()
	tini := copyTo(t, filepath.Join(dir, "tini"))
	between := copyTo(t, filepath.Join(dir, "between"))
	agent := copyTo(t, filepath.Join(dir, "agent"))
	r := start(t, tini, nil)
	r.tell("adopt")
	r.tell("start %s", between)
	r.say("orphan %s", agent)
	// The agent speaks, and so does tini once it has seen the end of between.
	orphan := r.answer()
	if other := r.answer(); orphan == r.self {
		orphan = other
	}
	p := b.open(orphan)
	if info, err := p.Info(); err != nil || int(info.PPID) != r.self {
		t.Fatalf("the orphan's parent is %d (%v), so nothing is tested; want %d", info.PPID, err, r.self)
	}
	b.want(p, "process:parent_path")
	b.want(p, "process:ancestor_path")
}

func TestLineageEndsAtFirstOfPIDNamespace(t *testing.T) {
	needRoot(t)
	b := newBench(t)
	_, _, path, agent := family(t, "launcher", &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWPID})
	p := b.open(agent)
	b.want(p, "unix:path", path)
	b.want(p, "process:parent_path")
	b.want(p, "process:ancestor_path")
}

func TestLineageEndsAtForeignUserNamespace(t *testing.T) {
	needRoot(t)
	b := newBench(t)
	_, _, _, agent := family(t, "launcher", &syscall.SysProcAttr{
		Cloneflags:  syscall.CLONE_NEWUSER,
		UidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: 0, Size: 1}},
		GidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: 0, Size: 1}},
	})
	p := b.open(agent)
	b.want(p, "process:parent_path")
	b.want(p, "process:ancestor_path")
}

func TestLineageEndsAtParentThatLeftForItsOwnUserNamespace(t *testing.T) {
	needRoot(t)
	if _, err := exec.LookPath("unshare"); err != nil {
		t.Skip("NOT TESTED: needs unshare(1)")
	}
	b := newBench(t)
	c := exec.Command("/bin/sh", "-c", `exec 3<&0; cat <&3 & echo $!; exec unshare -U sh -c 'echo away; exec cat'`)
	in, err := c.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := c.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { in.Close(); io.Copy(io.Discard, out); c.Wait() })
	var child int
	var away string
	if _, err := fmt.Fscan(out, &child, &away); err != nil || away != "away" {
		t.Fatalf("unshare said %q (%v)", away, err)
	}
	p := b.open(child)
	b.want(p, "process:parent_path")
	b.want(p, "process:ancestor_path")
}

func TestParentWithoutPathOnTheHostIsNotNamed(t *testing.T) {
	needRoot(t)
	b := newBench(t)
	dir := t.TempDir()
	evil := copyTo(t, filepath.Join(dir, "evil"))
	launcher := copyTo(t, filepath.Join(dir, "launcher"))
	agent := copyTo(t, filepath.Join(dir, "agent"))
	r := start(t, evil, &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS})
	r.tell("bind %s %s", evil, launcher)
	r.tell("exec %s", launcher)
	p := b.open(r.tell("start %s", agent))
	b.want(p, "process:parent_path")
	if got := b.values(p, "process:ancestor_path"); slices.Contains(got, launcher) || !slices.Contains(got, self(t)) {
		t.Errorf("ancestors: got %q, want %q among them and not %q", got, self(t), launcher)
	}
}

func TestDeepLineageIsCutOff(t *testing.T) {
	b := newBench(t)
	path := copyTo(t, filepath.Join(t.TempDir(), "link"))
	p := b.open(start(t, path, nil, chainEnv+"=34").self)
	got := b.values(p, "process:ancestor_path")
	if len(got) != 32 || slices.ContainsFunc(got, func(s string) bool { return s != path }) {
		t.Errorf("got %d ancestors %q, want 32 times %q", len(got), got, path)
	}
}

func TestChildOfAnotherIsMoved(t *testing.T) {
	b := newBench(t)
	r, _, _, agent := family(t, "launcher", nil)
	child, parent, stranger := b.open(agent), b.open(r.self), b.open(cat(t, nil))
	if err := isChild(child, parent); err != nil {
		t.Errorf("of its parent: got %v, want nil", err)
	}
	if err := isChild(child, stranger); !errors.Is(err, errMoved) {
		t.Errorf("of another: got %v, want %v", err, errMoved)
	}
	if err := unix.Kill(r.self, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	<-parent.Done()
	if err := isChild(child, parent); err == nil {
		t.Error("of a parent that ended: got nil, want an error")
	}
}

func TestUnknownProgramOfParentIsUnknownLineage(t *testing.T) {
	b := newBench(t)
	_, _, _, agent := family(t, "launcher", nil)
	p := b.open(agent)
	b.want(p, "unix:path", filepath.Join(filepath.Dir(b.values(p, "process:parent_path")[0]), "agent"))

	fresh := NewExecutables(b.host, 0) // which has not confirmed the parent yet
	leave, err := fresh.lookups.enter(context.Background(), client(p))
	if err != nil {
		t.Fatal(err)
	}
	defer leave()
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	selectors, err := NewProcess(b.table, b.host, fresh, func() Demand { return Demand{} }).Attest(ctx, p)
	for _, kind := range []string{"process:parent_path", "process:ancestor_path"} {
		if got := pick(selectors, kind); len(got) != 0 {
			t.Errorf("%s: got %q, want none", kind, got)
		}
		var unknown *Unknown
		if !errors.As(err, &unknown) || !slices.Contains(unknown.Prefixes, kind+":") {
			t.Errorf("%s: got error %#v, want it unknown", kind, err)
		}
	}
}

func TestAdopter(t *testing.T) {
	cases := map[string]bool{
		"/usr/lib/systemd/systemd":            true,
		"/usr/lib/systemd/systemd (deleted)":  true,
		"/usr/bin/containerd-shim-runc-v2":    true,
		"/opt/anything/conmon":                true,
		"/usr/bin/tini-static":                true,
		"/usr/bin/bash":                       false,
		"/usr/local/bin/launcher":             false,
		"/opt/systemd/launcher":               false,
		"/home/a/my-tini (deleted) (deleted)": false,
		"":                                    false,
	}
	for link, want := range cases {
		if got := adopter(link); got != want {
			t.Errorf("%q: got %v, want %v", link, got, want)
		}
	}
}

func TestFirstOfNamespace(t *testing.T) {
	cases := map[string]bool{
		status:                       false,
		"NSpid:\t1\n":                true,
		"NSpid:\t4711\t1\n":          true,
		"NSpid:\t4711\t12\n":         false,
		"NSpid:\t1\t12\n":            false,
		"NSpid:\n":                   true,
		"Pid:\t4711\nNSsid:\t4711\n": true, // it does not say
		"":                           true,
	}
	for file, want := range cases {
		if got := firstOfNamespace([]byte(file)); got != want {
			t.Errorf("%q: got %v, want %v", file, got, want)
		}
	}
}

func FuzzFirstOfNamespace(f *testing.F) {
	f.Add([]byte(status))
	f.Add([]byte("NSpid:\t4711\t1\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		if !firstOfNamespace(b) && !bytes.Contains(b, []byte("NSpid:")) {
			t.Error("got false for a status that does not say")
		}
	})
}
