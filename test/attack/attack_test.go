// Package attack tries to get SVIDs that are not the asker's, from a real
// daemon, as a process of the same host would: another user, a child that
// inherited a connection, a program that is replaced while it asks, a program
// or a cgroup directory that is mounted over another. Each attack stands
// beside the honest request that succeeds, so that it cannot fail to run and
// seem repelled.
package attack

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/deputy-id/deputy/test/binary"
	"github.com/deputy-id/deputy/test/daemon"
	"github.com/deputy-id/deputy/test/need"
	"github.com/deputy-id/deputy/test/process"
	"github.com/deputy-id/deputy/test/scratch"
	"github.com/deputy-id/deputy/test/wait"
)

const victimUID, attackerUID = 61001, 61002

func TestMain(m *testing.M) {
	if play() {
		return
	}
	code := m.Run()
	binary.Remove()
	os.Exit(code)
}

// A scene is a daemon with an entry for the victim's program and one for the
// victim's cgroup, and the programs of both sides.
type scene struct {
	socket           string
	victim, attacker string   // the same program at two paths
	cgroups          []string // the victim's cgroup directories
	forged           string   // a cgroup file that names the victim's cgroup
}

func newScene(t *testing.T) *scene {
	t.Helper()
	need.Root(t, "processes of other users")
	dir := scratch.Dir(t)
	s := &scene{
		victim:   scratch.Program(t, filepath.Join(dir, "victim"), "/proc/self/exe"),
		attacker: scratch.Program(t, filepath.Join(dir, "attacker"), "/proc/self/exe"),
	}
	name := filepath.Base(dir)
	for _, root := range []string{"/sys/fs/cgroup/unified", "/sys/fs/cgroup/systemd", "/sys/fs/cgroup"} {
		if _, err := os.Stat(filepath.Join(root, "cgroup.procs")); err != nil {
			continue
		}
		cg := filepath.Join(root, name)
		if err := os.Mkdir(cg, 0o755); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			wait.Until(t, "the end of all in "+cg, func() bool { return os.Remove(cg) == nil })
		})
		s.cgroups = append(s.cgroups, cg)
	}
	if len(s.cgroups) == 0 {
		t.Fatal("no cgroup hierarchy with processes found")
	}
	s.forged = scratch.Write(t, filepath.Join(dir, "cgroup"), fmt.Sprintf("1:name=systemd:/%s\n0::/%s\n", name, name))
	s.socket = daemon.Start(t, "attack.example", fmt.Sprintf(`
entry "/victim/path" {
  selectors = ["unix:path:%s"]
}

entry "/victim/user" {
  selectors = ["unix:uid:%d"]
}

entry "/victim/cgroup" {
  selectors = ["cgroup:path:/%s"]
}
`, s.victim, victimUID, name)).Workload
	return s
}

// run runs an attack and returns what it printed. That it ends with an error
// is no matter; that it could not play its part is.
func run(cmd *exec.Cmd) (out, errs string, err error) {
	var o, e bytes.Buffer
	cmd.Stdout, cmd.Stderr = &o, &e
	cmd.WaitDelay = 5 * time.Second
	var exit *exec.ExitError
	if err := cmd.Run(); err != nil && !errors.As(err, &exit) && !errors.Is(err, exec.ErrWaitDelay) {
		return "", "", fmt.Errorf("the attack could not start: %w", err)
	}
	return o.String(), e.String(), nil
}

func plundered(t *testing.T, cmd *exec.Cmd) (out, errs string) {
	t.Helper()
	out, errs, err := run(cmd)
	if err != nil {
		t.Fatal(err)
	}
	return out, errs
}

// granted wants the honest request to yield this ID.
func granted(t *testing.T, cmd *exec.Cmd, id string) {
	t.Helper()
	out, errs := plundered(t, cmd)
	if !strings.Contains(out, "spiffe://attack.example"+id+"\n") {
		t.Fatalf("the honest request: got %q (%s), want spiffe://attack.example%s", out, errs, id)
	}
}

// denied wants an attack to be refused for want of an identity, and not to have failed before it.
func denied(t *testing.T, cmd *exec.Cmd) {
	t.Helper()
	out, errs := plundered(t, cmd)
	if out != "" {
		t.Errorf("the attack got %q", out)
	}
	if !strings.Contains(errs, "PermissionDenied") {
		t.Errorf("got %q, want PermissionDenied", errs)
	}
}

func TestAnotherUser(t *testing.T) {
	s := newScene(t)
	granted(t, process.As(victimUID, as("fetch", s.attacker, s.socket)), "/victim/user")
	denied(t, process.As(attackerUID, as("fetch", s.attacker, s.socket)))
}

func TestChildThatInheritedTheConnection(t *testing.T) {
	s := newScene(t)
	granted(t, process.As(attackerUID, as("fetch", s.victim, s.socket)), "/victim/path")
	out, errs := plundered(t, process.As(attackerUID, as("inherit", s.victim, s.socket, s.attacker)))
	if out != "" {
		t.Errorf("the child got %q", out)
	}
	if strings.Contains(errs, "challenge") {
		t.Errorf("the parent did not get as far as the child: %s", errs)
	}
}

func TestProgramReplacedWhileAChildReads(t *testing.T) {
	s := newScene(t)
	granted(t, process.As(attackerUID, as("fetch", s.victim, s.socket)), "/victim/path")
	var attacks sync.WaitGroup
	for _, wait := range []time.Duration{0, 100 * time.Microsecond, 300 * time.Microsecond, time.Millisecond, 3 * time.Millisecond, 10 * time.Millisecond, 50 * time.Millisecond} {
		for range 5 {
			attacks.Go(func() {
				out, errs, err := run(process.As(attackerUID, as("swap", s.attacker, s.socket, s.attacker, s.victim, wait.String())))
				if out != "" || errs != "" || err != nil {
					t.Errorf("executing the victim's program after %s: the child got %q, want nothing; %q, %v", wait, out, errs, err)
				}
			})
		}
	}
	attacks.Wait()
}

func TestProgramThatEchoesTheChallenge(t *testing.T) {
	s := newScene(t)
	cat, err := exec.LookPath("cat")
	if err != nil {
		t.Fatal(err)
	}
	// cat, at the victim's path, with the connection as its input and output,
	// would send the challenge back.
	if err := os.Remove(s.victim); err != nil {
		t.Fatal(err)
	}
	scratch.Program(t, s.victim, cat)
	fd, err := syscall.Socket(syscall.AF_UNIX, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	conn := os.NewFile(uintptr(fd), "connection")
	defer conn.Close()
	echo := process.As(attackerUID, exec.Command("/bin/sh", "-c", "exec "+s.victim))
	if err := syscall.Connect(fd, &syscall.SockaddrUnix{Name: s.socket}); err != nil {
		t.Fatal(err)
	}
	if _, err := syscall.Write(fd, request()); err != nil {
		t.Fatal(err)
	}
	echo.Stdin, echo.Stdout = conn, conn
	if err := echo.Start(); err != nil {
		t.Fatal(err)
	}
	defer echo.Wait()
	defer echo.Process.Kill()
	if err := syscall.SetsockoptTimeval(fd, syscall.SOL_SOCKET, syscall.SO_RCVTIMEO, &syscall.Timeval{Sec: 10}); err != nil {
		t.Fatal(err)
	}
	got, err := io.ReadAll(conn)
	if bytes.Contains(got, []byte("spiffe://attack.example")) {
		t.Errorf("the attacker got an SVID")
	}
	if err != nil && !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("the connection was left open: %v", err)
	}
}

func TestProgramMountedOverAnother(t *testing.T) {
	s := newScene(t)
	granted(t, process.As(attackerUID, as("fetch", s.victim, s.socket)), "/victim/path")
	cmd := as("bind", s.attacker, s.socket, s.attacker, s.victim)
	namespaces(cmd, syscall.CLONE_NEWUSER|syscall.CLONE_NEWNS)
	denied(t, cmd)
}

func TestCgroupDirectoryMountedOverAnother(t *testing.T) {
	s := newScene(t)
	inside := exec.Command("/bin/sh", "-c", `for c in "$@"; do echo $$ >"$c/cgroup.procs" || exit 9; done; exec "$0" "$SOCKET"`, s.attacker)
	inside.Args = append(inside.Args, s.cgroups...)
	inside.Env = []string{role + "=fetch", "SOCKET=" + s.socket}
	granted(t, inside, "/victim/cgroup")

	cmd := as("bind-cgroup", s.attacker, s.socket, strings.Join(s.cgroups, ","), s.forged)
	namespaces(cmd, syscall.CLONE_NEWUSER|syscall.CLONE_NEWNS|syscall.CLONE_NEWCGROUP)
	denied(t, cmd)
}

// namespaces starts the command as the attacker, as root of new namespaces of
// the attacker's: what unshare(1) does for anybody.
func namespaces(cmd *exec.Cmd, flags uintptr) {
	self := cmd.Path
	args := strings.Join(cmd.Args[1:], "' '")
	option := map[uintptr]string{
		syscall.CLONE_NEWUSER | syscall.CLONE_NEWNS:                           "-Urm",
		syscall.CLONE_NEWUSER | syscall.CLONE_NEWNS | syscall.CLONE_NEWCGROUP: "-UrmC",
	}[flags]
	cmd.Path = "/bin/sh"
	cmd.Args = []string{"sh", "-c", "exec unshare " + option + " " + self + " '" + args + "'"}
	cmd.Env = append(cmd.Env, "PATH=/usr/bin:/bin")
	process.As(attackerUID, cmd)
}
