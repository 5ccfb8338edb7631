// Package script plays the scripts of this directory against the real binary.
package script

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/deputy-id/deputy/test/binary"
	"github.com/deputy-id/deputy/test/scratch"
	"github.com/deputy-id/deputy/test/wait"
)

func TestMain(m *testing.M) {
	code := m.Run()
	binary.Remove()
	os.Exit(code)
}

func TestScripts(t *testing.T) {
	binaries := filepath.Dir(binary.Deputy(t))
	testscript.Run(t, testscript.Params{
		Dir:                 ".",
		WorkdirRoot:         scratch.Dir(t),
		RequireExplicitExec: true,
		RequireUniqueNames:  true,
		Setup: func(env *testscript.Env) error {
			env.Setenv("PATH", binaries+string(os.PathListSeparator)+env.Getenv("PATH"))
			env.Setenv("SPIFFE_ENDPOINT_SOCKET", "unix://"+env.WorkDir+"/p/w.sock")
			env.Setenv("DEPUTY_ADMIN_SOCKET", env.WorkDir+"/a/a.sock")
			for _, name := range ports {
				l, err := net.Listen("tcp", "127.0.0.1:0")
				if err != nil {
					return err
				}
				defer l.Close() // all of them later, so that each is another
				env.Setenv(name, strconv.Itoa(l.Addr().(*net.TCPAddr).Port))
			}
			return nil
		},
		Condition: func(cond string) (bool, error) {
			if cond != "root" {
				return false, fmt.Errorf("unknown condition %q", cond)
			}
			if os.Geteuid() != 0 {
				t.Log("not root: scripts that need other users or mounts are skipped")
			}
			return os.Geteuid() == 0, nil
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"subst":   subst,
			"start":   start,
			"stop":    stopDaemon,
			"signal":  signalDaemon,
			"logged":  logged,
			"status":  status,
			"until":   until,
			"mode":    mode,
			"mount":   mount,
			"secrets": secrets,
		},
	})
}

// ports are variables that hold a TCP port of loopback that was free.
var ports = []string{"PORT1", "PORT2"}

// subst FILE... expands $WORK and the ports in files of the archive.
func subst(ts *testscript.TestScript, _ bool, args []string) {
	for _, name := range args {
		text := ts.ReadFile(name)
		for _, key := range append([]string{"WORK"}, ports...) {
			text = strings.ReplaceAll(text, "$"+key, ts.Getenv(key))
		}
		ts.Check(os.WriteFile(ts.MkAbs(name), []byte(text), 0o600))
	}
}

// A daemon runs in the background of a script.
type daemon struct {
	cmd  *exec.Cmd
	log  string
	done chan error
}

// daemons of each script, by its work directory and the daemon's name.
type daemonKey struct{ work, name string }

var daemons sync.Map // of *daemon

// start NAME [-uid N] ARG... runs "deputy run ARG..." with its log in NAME.log
// and returns when it says, as to a service manager, that it is ready.
func start(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 1 {
		ts.Fatalf("usage: start NAME [-uid N] ARG...")
	}
	name, args := args[0], args[1:]
	cred, args := credential(ts, args)

	ready, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: ts.MkAbs(name + ".ready"), Net: "unixgram"})
	ts.Check(err)
	defer ready.Close()
	ts.Check(os.Chmod(ts.MkAbs(name+".ready"), 0o666))
	ready.SetReadDeadline(time.Now().Add(wait.Patience))

	d := &daemon{log: ts.MkAbs(name + ".log"), done: make(chan error, 1)}
	log, err := os.Create(d.log)
	ts.Check(err)
	defer log.Close()
	d.cmd = command(ts, "deputy", append([]string{"run"}, args...)...)
	d.cmd.Env = append(d.cmd.Env, "NOTIFY_SOCKET="+ts.MkAbs(name+".ready"))
	d.cmd.Stderr = log
	d.cmd.SysProcAttr = &syscall.SysProcAttr{Credential: cred}
	ts.Check(d.cmd.Start())
	go func() {
		d.done <- d.cmd.Wait()
		ready.SetReadDeadline(time.Now())
	}()
	daemons.Store(daemonKey{ts.Getenv("WORK"), name}, d)
	ts.Defer(func() {
		d.cmd.Process.Signal(syscall.SIGTERM)
		d.done <- <-d.done
	})
	buf := make([]byte, 64)
	n, err := ready.Read(buf)
	if err != nil || string(buf[:n]) != "READY=1" {
		text, _ := os.ReadFile(d.log)
		ts.Fatalf("%s is not ready: %q, %v\n%s", name, buf[:n], err, text)
	}
}

// stop NAME ends a daemon and wants it to end well.
func stopDaemon(ts *testscript.TestScript, neg bool, args []string) {
	d := lookup(ts, args)
	ts.Check(d.cmd.Process.Signal(syscall.SIGTERM))
	select {
	case err := <-d.done:
		d.done <- err
		if err != nil {
			text, _ := os.ReadFile(d.log)
			ts.Fatalf("%s ended with %v\n%s", args[0], err, text)
		}
	case <-time.After(wait.Patience):
		ts.Fatalf("%s did not end", args[0])
	}
}

// signal NAME HUP|KILL sends a signal to a daemon, and waits for its end after KILL.
func signalDaemon(ts *testscript.TestScript, _ bool, args []string) {
	if len(args) != 2 {
		ts.Fatalf("usage: signal NAME HUP|KILL")
	}
	d := lookup(ts, args[:1])
	sig, ok := map[string]syscall.Signal{"HUP": syscall.SIGHUP, "KILL": syscall.SIGKILL}[args[1]]
	if !ok {
		ts.Fatalf("unknown signal %s", args[1])
	}
	ts.Check(d.cmd.Process.Signal(sig))
	if sig == syscall.SIGKILL {
		d.done <- <-d.done
	}
}

// logged NAME REGEXP waits until a daemon has logged it; with ! it has not, by now.
func logged(ts *testscript.TestScript, neg bool, args []string) {
	if len(args) != 2 {
		ts.Fatalf("usage: logged NAME REGEXP")
	}
	d := lookup(ts, args[:1])
	want := regexp.MustCompile("(?m)" + args[1])
	if neg {
		text, err := os.ReadFile(d.log)
		ts.Check(err)
		if want.Match(text) {
			ts.Fatalf("%s has logged %q:\n%s", args[0], args[1], text)
		}
		return
	}
	poll(ts, func() (bool, string) {
		text, err := os.ReadFile(d.log)
		ts.Check(err)
		return want.Match(text), fmt.Sprintf("%s did not log %q:\n%s", args[0], args[1], text)
	})
}

// status N [-uid U] COMMAND ARG... runs a command and wants this exit status.
func status(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 2 {
		ts.Fatalf("usage: status N [-uid U] COMMAND ARG...")
	}
	want, err := strconv.Atoi(args[0])
	ts.Check(err)
	cred, args := credential(ts, args[1:])
	cmd := command(ts, args[0], args[1:]...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: cred}
	cmd.Stdout, cmd.Stderr = ts.Stdout(), ts.Stderr()
	err = cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		ts.Fatalf("%v", err)
	}
	if got := cmd.ProcessState.ExitCode(); got != want {
		ts.Fatalf("got status %d, want %d", got, want)
	}
}

// until REGEXP COMMAND ARG... runs a command again and again until it prints that.
func until(ts *testscript.TestScript, neg bool, args []string) {
	if len(args) < 2 {
		ts.Fatalf("usage: until REGEXP COMMAND ARG...")
	}
	want := regexp.MustCompile("(?m)" + args[0])
	poll(ts, func() (bool, string) {
		out, _ := command(ts, args[1], args[2:]...).CombinedOutput()
		return want.Match(out) != neg, fmt.Sprintf("%s: waited for %q in vain:\n%s", strings.Join(args[1:], " "), args[0], out)
	})
}

// mode OCTAL FILE... wants the mode of files.
func mode(ts *testscript.TestScript, neg bool, args []string) {
	want, err := strconv.ParseUint(args[0], 8, 32)
	ts.Check(err)
	for _, name := range args[1:] {
		info, err := os.Stat(ts.MkAbs(name))
		ts.Check(err)
		if got := info.Mode().Perm(); got != os.FileMode(want) {
			ts.Fatalf("%s: got mode %o, want %o", name, got, want)
		}
	}
}

// mount OPTIONS DIR mounts a tmpfs, or changes one that is mounted, until the
// end of the script.
func mount(ts *testscript.TestScript, _ bool, args []string) {
	dir := ts.MkAbs(args[1])
	ts.Check(os.MkdirAll(dir, 0o755))
	ts.Check(ts.Exec("mount", "-t", "tmpfs", "-o", args[0], "tmpfs", dir))
	if !strings.Contains(args[0], "remount") {
		ts.Defer(func() { syscall.Unmount(dir, syscall.MNT_DETACH) })
	}
}

// poll waits for something that a script can only look at.
func poll(ts *testscript.TestScript, look func() (ok bool, otherwise string)) {
	for end := time.Now().Add(wait.Patience); ; time.Sleep(10 * time.Millisecond) {
		ok, otherwise := look()
		if ok {
			return
		}
		if time.Now().After(end) {
			ts.Fatalf("%s", otherwise)
		}
	}
}

// command is one with the script's directory and environment.
func command(ts *testscript.TestScript, name string, args ...string) *exec.Cmd {
	ctx, cancel := context.WithTimeout(context.Background(), 4*wait.Patience)
	ts.Defer(cancel)
	path := name
	for _, dir := range filepath.SplitList(ts.Getenv("PATH")) {
		if _, err := os.Stat(filepath.Join(dir, name)); err == nil && !strings.Contains(name, "/") {
			path = filepath.Join(dir, name)
			break
		}
	}
	cmd := exec.CommandContext(ctx, path, args...)
	cmd.Dir = ts.MkAbs(".")
	for _, key := range []string{"WORK", "PATH", "HOME", "TMPDIR", "SPIFFE_ENDPOINT_SOCKET", "DEPUTY_ADMIN_SOCKET", "XDG_RUNTIME_DIR", "XDG_STATE_HOME"} {
		if value := ts.Getenv(key); value != "" {
			cmd.Env = append(cmd.Env, key+"="+value)
		}
	}
	return cmd
}

// credential reads a leading -uid N.
func credential(ts *testscript.TestScript, args []string) (*syscall.Credential, []string) {
	if len(args) < 2 || args[0] != "-uid" {
		return nil, args
	}
	id, err := strconv.ParseUint(args[1], 10, 32)
	ts.Check(err)
	return &syscall.Credential{Uid: uint32(id), Gid: uint32(id), Groups: []uint32{}}, args[2:]
}

func lookup(ts *testscript.TestScript, args []string) *daemon {
	if len(args) != 1 {
		ts.Fatalf("want the name of a daemon")
	}
	d, ok := daemons.Load(daemonKey{ts.Getenv("WORK"), args[0]})
	if !ok {
		ts.Fatalf("no daemon %s", args[0])
	}
	return d.(*daemon)
}
