// Package engine gives tests a real container engine: Docker's daemon, started
// by hand on directories and a socket of its own, and a registry on loopback,
// so that the digests that are attested are those that a registry gave out.
//
// What the machine lacks is installed with apt-get. Where that cannot be (not
// root, not Debian) the test is skipped, and says so; where CI is set it fails
// instead. One engine serves a whole test binary, whose TestMain ends it:
//
//	func TestMain(m *testing.M) { os.Exit(engine.Main(m)) }
package engine

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// An Engine is a running Docker daemon. Its methods fail the test that is
// given to them, and are safe for concurrent use.
type Engine struct {
	dir    string
	docker string
	daemon *process

	mu       sync.Mutex
	registry *Registry
	built    map[string]string // programs by package
}

// shared is the engine of this test binary.
var shared struct {
	mu     sync.Mutex
	engine *Engine
	err    error
}

// Main runs the tests and ends the engine, if one of them started it. It
// returns the exit status.
func Main(m *testing.M) int {
	code := m.Run()
	shared.mu.Lock()
	defer shared.mu.Unlock()
	if e := shared.engine; e != nil {
		if err := e.stop(); err != nil {
			fmt.Fprintln(os.Stderr, "engine: end:", err)
			code = max(code, 1)
		}
	}
	return code
}

// Start returns the engine of this test binary and starts it at the first call,
// which takes seconds, or a minute where Docker has to be installed.
func Start(tb testing.TB) *Engine {
	tb.Helper()
	shared.mu.Lock()
	defer shared.mu.Unlock()
	if shared.engine == nil && shared.err == nil {
		shared.engine, shared.err = start()
	}
	var cannot *cannotError
	switch err := shared.err; {
	case errors.As(err, &cannot) && os.Getenv("CI") == "":
		fmt.Fprintf(os.Stderr, "engine: SKIPPING %s: %v\n", tb.Name(), err)
		tb.Skip(err)
	case err != nil:
		tb.Fatalf("start engine: %v", err)
	}
	return shared.engine
}

// Socket is the path of the API's socket. It is root's, in root's directory.
func (e *Engine) Socket() string { return filepath.Join(e.dir, "docker.sock") }

// Docker runs Docker's command line against the engine and returns what it
// wrote to its standard output, without white space around it.
func (e *Engine) Docker(tb testing.TB, args ...string) string {
	tb.Helper()
	out, err := e.run(args...)
	if err != nil {
		tb.Fatal(err)
	}
	return out
}

func (e *Engine) run(args ...string) (string, error) {
	cmd := e.Command(args...)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return "", fmt.Errorf("docker %s: %w: %s", strings.Join(args, " "), err, bytes.TrimSpace(stderr.Bytes()))
	}
	return strings.TrimSpace(string(out)), nil
}

const (
	startTime = 30 * time.Second
	stopTime  = 20 * time.Second
	poll      = 20 * time.Millisecond
)

func start() (*Engine, error) {
	if err := need("docker.io"); err != nil {
		return nil, err
	}
	docker, err := find("docker")
	if err != nil {
		return nil, err
	}
	dockerd, err := find("dockerd")
	if err != nil {
		return nil, err
	}
	dir, err := os.MkdirTemp("", "deputy-engine-")
	if err != nil {
		return nil, err
	}
	e := &Engine{dir: dir, docker: docker, built: make(map[string]string)}
	if err := os.WriteFile(filepath.Join(dir, "daemon.json"), []byte("{}"), 0o600); err != nil {
		return nil, err
	}
	// No bridge and no packet filter: the engine shares the machine's network
	// with whatever else is there, and containers here have none.
	e.daemon, err = spawn(filepath.Join(dir, "dockerd.log"), unix.SIGTERM, dockerd,
		"--config-file", filepath.Join(dir, "daemon.json"),
		"--data-root", filepath.Join(dir, "data"), "--exec-root", filepath.Join(dir, "exec"),
		"--pidfile", filepath.Join(dir, "pid"), "--host", "unix://"+e.Socket(),
		"--bridge=none", "--iptables=false", "--ip6tables=false", "--shutdown-timeout=1")
	if err == nil {
		err = e.daemon.await(startTime, func() bool { _, err := e.run("version"); return err == nil })
	}
	if err != nil {
		return nil, errors.Join(err, e.stop())
	}
	return e, nil
}

// stop ends what was started, by its PID, and removes its mounts and files.
// The empty parent of all containers' cgroups stays: it may be another engine's too.
func (e *Engine) stop() error {
	var errs []error
	if e.registry != nil {
		errs = append(errs, e.registry.server.end(unix.SIGTERM))
	}
	if e.daemon != nil {
		if out, err := e.run("ps", "--all", "--quiet"); err == nil && out != "" {
			_, err := e.run(append([]string{"rm", "--force"}, strings.Fields(out)...)...)
			errs = append(errs, err)
		}
		errs = append(errs, e.daemon.end(unix.SIGTERM))
	}
	errs = append(errs, unmount(e.dir), os.RemoveAll(e.dir))
	return errors.Join(errs...)
}

// unmount unmounts what is left below the directory, the innermost first.
func unmount(dir string) error {
	b, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return err
	}
	lines := strings.Split(string(b), "\n")
	var errs []error
	for i := len(lines) - 1; i >= 0; i-- {
		if f := strings.Fields(lines[i]); len(f) > 4 && strings.HasPrefix(f[4], dir+"/") {
			errs = append(errs, unix.Unmount(f[4], unix.MNT_DETACH))
		}
	}
	return errors.Join(errs...)
}

// A process is a server that was started. It ends with the test binary, even
// if that is killed.
type process struct {
	cmd  *exec.Cmd
	log  string
	done chan struct{} // closed when it has ended
}

// spawn starts a server that gets the signal should the test binary die.
func spawn(log string, death syscall.Signal, path string, args ...string) (*process, error) {
	f, err := os.Create(log)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	p := &process{cmd: exec.Command(path, args...), log: log, done: make(chan struct{})}
	p.cmd.Stdout, p.cmd.Stderr = f, f
	// What it leaves behind, as containerd does its stacks when it is slow to
	// end, goes with the directory.
	p.cmd.Env = append(os.Environ(), "TMPDIR="+filepath.Dir(log))
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: death}
	started := make(chan error)
	go func() {
		// The signal comes when the thread ends that started the server.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		err := p.cmd.Start()
		started <- err
		if err == nil {
			p.cmd.Wait()
			close(p.done)
		}
	}()
	if err := <-started; err != nil {
		return nil, err
	}
	return p, nil
}

// await returns when ready says so.
func (p *process) await(most time.Duration, ready func() bool) error {
	deadline := time.After(most)
	tick := time.NewTicker(poll)
	defer tick.Stop()
	for !ready() {
		select {
		case <-tick.C:
		case <-p.done:
			return fmt.Errorf("%s ended: %s", filepath.Base(p.cmd.Path), p.last())
		case <-deadline:
			return fmt.Errorf("%s is not ready after %v: %s", filepath.Base(p.cmd.Path), most, p.last())
		}
	}
	return nil
}

// end asks the process to end, and kills it if it does not.
func (p *process) end(sig syscall.Signal) error {
	p.cmd.Process.Signal(sig)
	select {
	case <-p.done:
		return nil
	case <-time.After(stopTime):
	}
	p.cmd.Process.Kill()
	<-p.done
	return fmt.Errorf("%s had to be killed: %s", filepath.Base(p.cmd.Path), p.last())
}

// last is the end of the log.
func (p *process) last() string {
	b, _ := os.ReadFile(p.log)
	return string(b[max(0, len(b)-2048):])
}
