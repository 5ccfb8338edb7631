// Package hardship runs the real daemon where things go wrong: clients that
// misbehave, disks that fill, clocks that jump, kernels that lack what is
// wanted, descriptors that run out, interpreters instead of programs. Whatever
// happens, nothing that was issued or stored is lost, and the daemon goes on
// for everybody else.
package hardship

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/deputy-id/deputy/test/binary"
	"github.com/deputy-id/deputy/test/engine"
)

// patience bounds every wait: a machine that is busy needs it, and a wait ends
// as soon as it can.
const patience = 30 * time.Second

func TestMain(m *testing.M) {
	if play() {
		return
	}
	// They wait more than they work: for timeouts, and for each other's ends.
	flag.Parse()
	flag.Set("test.parallel", "6")
	code := engine.Main(m)
	binary.Remove()
	os.Exit(code)
}

// roleEnv names the part that a copy of this test binary plays.
const roleEnv = "DEPUTY_HARDSHIP_ROLE"

var roles = map[string]func(args []string) error{
	"hold":         hold,
	"older-kernel": olderKernel,
	"touch":        touch,
}

// play plays a role, if this copy has one.
func play() bool {
	role := os.Getenv(roleEnv)
	if role == "" {
		return false
	}
	os.Unsetenv(roleEnv)
	if err := roles[role](os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, role+":", err)
		os.Exit(1)
	}
	return true
}

// as is the command of a role.
func as(role string, args ...string) *exec.Cmd {
	cmd := exec.Command("/proc/self/exe", args...)
	cmd.Env = append(os.Environ(), roleEnv+"="+role)
	return cmd
}

func needRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() == 0 {
		return
	}
	if os.Getenv("CI") != "" {
		t.Fatal("needs root")
	}
	t.Skip("SKIPPED: needs root")
}

// A place is a directory for one daemon, short enough for sockets, which other
// users may enter.
type place struct {
	deputy                             string // the binary
	dir, data, workload, admin, config string
}

// mine is an entry that this process holds, on which most tests look.
func mine() string {
	return fmt.Sprintf("entry \"/agent/me\" {\n  selectors = [\"unix:uid:%d\"]\n}\n", os.Getuid())
}

// newPlace writes the configuration, with these lines after the usual ones.
func newPlace(t *testing.T, more string) *place {
	t.Helper()
	dir, err := os.MkdirTemp("", "h")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	p := &place{
		deputy:   binary.Deputy(t),
		dir:      dir,
		data:     filepath.Join(dir, "data"),
		workload: filepath.Join(dir, "p/w.sock"),
		admin:    filepath.Join(dir, "a/a.sock"),
		config:   filepath.Join(dir, "c.hcl"),
	}
	p.configure(t, more)
	return p
}

func (p *place) text(more string) string {
	return fmt.Sprintf("trust_domain = \"hard.example\"\ndata_dir = %q\nworkload_socket { path = %q }\nadmin_socket { path = %q }\n%s",
		p.data, p.workload, p.admin, more)
}

// configure puts a new configuration in the place of the old.
func (p *place) configure(t *testing.T, more string) {
	t.Helper()
	next := p.config + ".next"
	if err := os.WriteFile(next, []byte(p.text(more)), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(next, p.config); err != nil {
		t.Fatal(err)
	}
}

// A daemon runs in a place.
type daemon struct {
	*place
	cmd  *exec.Cmd
	log  *transcript
	done chan struct{} // closed when it has ended
	err  error         // of its end
}

// start runs the daemon until the end of the test and returns when it serves.
func (p *place) start(t *testing.T) *daemon {
	t.Helper()
	return p.begin(t, p.command())
}

func (p *place) command() *exec.Cmd {
	return exec.Command(p.deputy, "run", "--config", p.config)
}

// begin is start by a command of the test's, which leads to the daemon.
func (p *place) begin(t *testing.T, cmd *exec.Cmd) *daemon {
	t.Helper()
	d := &daemon{place: p, cmd: cmd, log: new(transcript), done: make(chan struct{})}
	if cmd.Stderr == nil {
		cmd.Stderr = d.log
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		d.err = cmd.Wait()
		close(d.done)
	}()
	t.Cleanup(func() {
		d.cmd.Process.Signal(syscall.SIGTERM)
		select {
		case <-d.done:
		case <-time.After(patience):
			t.Error("the daemon does not end")
			d.cmd.Process.Kill()
			<-d.done
		}
		if t.Failed() {
			t.Logf("log of the daemon:\n%s", d.log)
		}
	})
	eventually(t, func() error {
		select {
		case <-d.done:
			t.Fatalf("the daemon ended: %v\n%s", d.err, d.log)
		default:
		}
		return p.try("health")
	})
	return d
}

// stop ends the daemon and wants it to end well.
func (d *daemon) stop(t *testing.T) {
	t.Helper()
	d.cmd.Process.Signal(syscall.SIGTERM)
	select {
	case <-d.done:
	case <-time.After(patience):
		t.Fatal("the daemon does not end")
	}
	if d.err != nil {
		t.Fatalf("the daemon ended with %v\n%s", d.err, d.log)
	}
}

// alive wants the daemon to be the one that was started.
func (d *daemon) alive(t *testing.T) {
	t.Helper()
	select {
	case <-d.done:
		t.Fatalf("the daemon ended: %v\n%s", d.err, d.log)
	default:
	}
}

// logged waits until the daemon has logged this.
func (d *daemon) logged(t *testing.T, pattern string) {
	t.Helper()
	want := regexp.MustCompile(pattern)
	eventually(t, func() error {
		if !want.MatchString(d.log.String()) {
			return fmt.Errorf("not logged: %s", pattern)
		}
		return nil
	})
}

// refusesToStart wants the daemon to end with status 1 and these words.
func (p *place) refusesToStart(t *testing.T, words ...string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	cmd := p.command()
	out, err := exec.CommandContext(ctx, cmd.Path, cmd.Args[1:]...).CombinedOutput()
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.ExitCode() != 1 {
		t.Fatalf("got %v, want status 1\n%s", err, out)
	}
	for _, w := range words {
		if !strings.Contains(string(out), w) {
			t.Errorf("got %q, want %q in it", out, w)
		}
	}
}

// cli is a command of deputy's on the place's sockets.
func (p *place) cli(args ...string) *exec.Cmd {
	cmd := exec.Command(p.deputy, args...)
	cmd.Env = append(os.Environ(), "SPIFFE_ENDPOINT_SOCKET=unix://"+p.workload, "DEPUTY_ADMIN_SOCKET="+p.admin)
	cmd.Dir = p.dir
	return cmd
}

// run runs a command of deputy's and returns what it said.
func (p *place) run(t *testing.T, args ...string) string {
	t.Helper()
	out, err := p.cli(args...).CombinedOutput()
	if err != nil {
		t.Fatalf("deputy %s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return string(out)
}

func (p *place) try(args ...string) error {
	if out, err := p.cli(args...).CombinedOutput(); err != nil {
		return fmt.Errorf("deputy %s: %w\n%s", strings.Join(args, " "), err, out)
	}
	return nil
}

// fetches wants this process to get its identity now.
func (p *place) fetches(t *testing.T, id string) {
	t.Helper()
	if out := p.run(t, "fetch", "x509"); !strings.Contains(out, "spiffe://hard.example"+id) {
		t.Fatalf("got %q, want spiffe://hard.example%s in it", out, id)
	}
}

// dial opens a gRPC client on a socket.
func dial(t *testing.T, socket string) *grpc.ClientConn {
	t.Helper()
	conn, err := grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn
}

// connect opens a bare connection.
func connect(t *testing.T, socket string) net.Conn {
	t.Helper()
	conn, err := net.Dial("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn
}

// eventually waits for something that can only be looked at.
func eventually(t *testing.T, look func() error) {
	t.Helper()
	for end := time.Now().Add(patience); ; time.Sleep(20 * time.Millisecond) {
		err := look()
		if err == nil {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("in vain for %s: %v", patience, err)
		}
	}
}

// A transcript is what a process has written so far.
type transcript struct {
	mu   sync.Mutex // guards what follows
	text bytes.Buffer
}

func (s *transcript) Write(b []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.text.Write(b)
}

func (s *transcript) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.text.String()
}

// has looks for a text in what was written so far.
func (s *transcript) has(text string) func() error {
	return func() error {
		if all := s.String(); !strings.Contains(all, text) {
			return fmt.Errorf("got %q, want %q in it", all, text)
		}
		return nil
	}
}
