package attestor

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/deputy-id/deputy/attestor/peer"
)

// obeyEnv makes the test binary, run again, an obedient process.
const obeyEnv = "DEPUTY_ATTESTOR_OBEY"

// chainEnv is how many processes such a one starts below each other before the
// last of them obeys.
const chainEnv = "DEPUTY_ATTESTOR_CHAIN"

// The copies that tests start must not run tests: an init, so that it works
// whoever owns TestMain.
func init() {
	if os.Getenv(obeyEnv) != "" {
		obey()
		os.Exit(0)
	}
}

// obey says its PID and does what it is told, a line at a time, until its
// input ends.
func obey() {
	answer := func(err error) {
		if err != nil {
			fmt.Println("error", err)
			return
		}
		self, err := os.Readlink("/proc/self") // the PID that the test knows, also from another namespace
		if err != nil {
			self = err.Error()
		}
		fmt.Println("ok", self)
	}
	if n, err := strconv.Atoi(os.Getenv(chainEnv)); err == nil && n > 0 {
		os.Setenv(chainEnv, strconv.Itoa(n-1))
		if err := child("/proc/self/exe").Run(); err != nil {
			answer(err)
		}
		return
	}
	answer(nil)
	in := bufio.NewReader(os.Stdin)
	for {
		line, err := in.ReadString('\n')
		if err != nil {
			return
		}
		switch f := strings.Fields(line); f[0] {
		case "exec":
			answer(syscall.Exec(f[1], f[1:], os.Environ()))
		case "bind":
			answer(unix.Mount(f[1], f[2], "", unix.MS_BIND, ""))
		case "adopt":
			answer(unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0))
		case "start": // a child that reads on from our input, while we wait for it
			answer(child(f[1]).Run())
		case "orphan": // the same, but we leave it behind
			if err := child(f[1]).Start(); err != nil {
				answer(err)
			}
			return
		}
	}
}

// child is an obedient process on our own input and output.
func child(path string) *exec.Cmd {
	c := exec.Command(path)
	c.Stdin, c.Stdout, c.Stderr = os.Stdin, os.Stdout, os.Stderr
	return c
}

// A running is a process that does what the test tells it.
type running struct {
	t    *testing.T
	in   io.Writer
	out  *bufio.Reader
	self int
}

func start(t *testing.T, path string, attr *syscall.SysProcAttr, env ...string) *running {
	t.Helper()
	c := exec.Command(path)
	c.Env = append(os.Environ(), obeyEnv+"=1")
	c.Env = append(c.Env, env...)
	c.SysProcAttr = attr
	c.Stderr = os.Stderr
	in, err := c.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := c.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Start(); err != nil {
		t.Fatalf("start %s: %v", path, err)
	}
	t.Cleanup(func() {
		in.Close()
		io.Copy(io.Discard, out)
		c.Wait()
	})
	r := &running{t: t, in: in, out: bufio.NewReader(out)}
	r.self = r.answer()
	return r
}

// answer reads the PID of whoever answers next.
func (r *running) answer() int {
	r.t.Helper()
	line, err := r.out.ReadString('\n')
	if err != nil {
		r.t.Fatalf("read answer: %v", err)
	}
	f := strings.Fields(line)
	if f[0] != "ok" {
		r.t.Fatalf("process answered %q", line)
	}
	pid, err := strconv.Atoi(f[1])
	if err != nil {
		r.t.Fatalf("process answered %q", line)
	}
	return pid
}

// tell gives an order and returns the PID of whoever answers.
func (r *running) tell(format string, args ...any) int {
	r.t.Helper()
	r.say(format, args...)
	return r.answer()
}

func (r *running) say(format string, args ...any) {
	r.t.Helper()
	if _, err := fmt.Fprintf(r.in, format+"\n", args...); err != nil {
		r.t.Fatal(err)
	}
}

// cat starts a program that root owns and that waits for its input to end.
func cat(t *testing.T, attr *syscall.SysProcAttr) int {
	t.Helper()
	c := exec.Command("/usr/bin/cat")
	c.SysProcAttr = attr
	in, err := c.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { in.Close(); c.Wait() })
	return c.Process.Pid
}

// copyTo copies the test binary.
func copyTo(t *testing.T, path string) string {
	t.Helper()
	copyFile(t, "/proc/self/exe", path)
	return path
}

func copyFile(t *testing.T, from, to string) {
	t.Helper()
	b, err := os.ReadFile(from)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(filepath.Dir(to), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(to, b, 0o755); err != nil {
		t.Fatal(err)
	}
}

// A bench is what tests look at processes with.
type bench struct {
	*testing.T
	table       *peer.Table
	host        *Host
	executables *Executables
	demand      Demand
}

func newBench(t *testing.T) *bench {
	t.Helper()
	h, err := OpenHost()
	if err != nil {
		t.Fatal(err)
	}
	b := &bench{T: t, host: h, executables: NewExecutables(h, 0)}
	b.table = b.newTable()
	return b
}

func (b *bench) newTable() *peer.Table {
	b.Helper()
	table, _, err := peer.NewTable()
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { table.Close() })
	return table
}

func (b *bench) open(pid int) *peer.Process {
	b.Helper()
	p, err := b.table.Open(int32(pid))
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { p.Close() })
	return p
}

// values attests and returns the values of the selectors of one kind, "unix:path".
func (b *bench) values(p *peer.Process, kind string) []string {
	b.Helper()
	demand := func() Demand { return b.demand }
	var a Attestor = NewUnix(b.host, b.executables, demand)
	if strings.HasPrefix(kind, "process:") {
		a = NewProcess(b.table, b.host, b.executables, demand)
	}
	selectors, err := a.Attest(context.Background(), p)
	var unknown *Unknown
	if err != nil && (!errors.As(err, &unknown) || slices.Contains(unknown.Prefixes, kind+":")) {
		b.Fatalf("attest %s: %v", kind, err)
	}
	return pick(selectors, kind)
}

func pick(selectors []Selector, kind string) []string {
	var out []string
	for _, s := range selectors {
		if v, ok := strings.CutPrefix(s.String(), kind+":"); ok {
			out = append(out, v)
		}
	}
	return out
}

func (b *bench) want(p *peer.Process, kind string, want ...string) {
	b.Helper()
	if got := b.values(p, kind); !slices.Equal(got, want) {
		b.Errorf("%s: got %q, want %q", kind, got, want)
	}
}

func needRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		_, _, line, _ := runtime.Caller(1)
		t.Skipf("NOT TESTED: needs root (line %d)", line)
	}
}
