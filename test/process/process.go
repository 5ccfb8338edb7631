// Package process runs other programs for tests, and shows what they said where
// a test fails.
package process

import (
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/deputy-id/deputy/test/wait"
)

// Try runs a command to its end, and returns all that it said; so does the
// error, if it ends badly.
func Try(cmd *exec.Cmd) (string, error) {
	out, err := cmd.CombinedOutput()
	if err != nil {
		err = fmt.Errorf("%s %s: %w\n%s", filepath.Base(cmd.Path), strings.Join(cmd.Args[1:], " "), err, out)
	}
	return string(out), err
}

// Run is Try for a command that has to end well.
func Run(tb testing.TB, cmd *exec.Cmd) string {
	tb.Helper()
	out, err := Try(cmd)
	if err != nil {
		tb.Fatal(err)
	}
	return out
}

// As makes a command run as this user, and alone in the group of that number.
func As(uid uint32, cmd *exec.Cmd) *exec.Cmd {
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: uid}}
	return cmd
}

// A Process is a program that runs beside a test.
type Process struct {
	cmd     *exec.Cmd
	said    *os.File      // which has no name any more
	done    chan struct{} // closed when it has ended
	err     error         // of its end
	awaited bool
}

// Start starts a program. What it writes is kept, unless the command says where
// that goes. It is asked to end when the test does.
func Start(tb testing.TB, cmd *exec.Cmd) *Process {
	tb.Helper()
	// Not a pipe: whom the program leaves behind would keep it open.
	said, err := os.CreateTemp("", "said-")
	if err != nil {
		tb.Fatal(err)
	}
	if err := os.Remove(said.Name()); err != nil {
		tb.Fatal(err)
	}
	p := &Process{cmd: cmd, said: said, done: make(chan struct{})}
	if cmd.Stdout == nil {
		cmd.Stdout = said
	}
	if cmd.Stderr == nil {
		cmd.Stderr = said
	}
	if err := cmd.Start(); err != nil {
		tb.Fatal(err)
	}
	go func() {
		p.err = cmd.Wait()
		close(p.done)
	}()
	tb.Cleanup(func() {
		cmd.Process.Signal(syscall.SIGTERM)
		select {
		case <-p.done:
		case <-time.After(wait.Patience):
			tb.Errorf("%s had to be killed", p)
			cmd.Process.Kill()
			<-p.done
		}
		if tb.Failed() {
			const last = 64 << 10
			log := p.Log()
			tb.Logf("end of what %s said:\n%s", p, log[max(0, len(log)-last):])
		}
	})
	return p
}

// String is the name of the program.
func (p *Process) String() string { return filepath.Base(p.cmd.Path) }

// PID is its process ID.
func (p *Process) PID() int { return p.cmd.Process.Pid }

// Log is what it has written so far.
func (p *Process) Log() string {
	text, err := io.ReadAll(io.NewSectionReader(p.said, 0, 1<<62))
	if err != nil {
		return err.Error()
	}
	return string(text)
}

// Done is closed when it has ended.
func (p *Process) Done() <-chan struct{} { return p.done }

func (p *Process) ended() bool {
	select {
	case <-p.done:
		return true
	default:
		return false
	}
}

// Alive wants it not to have ended.
func (p *Process) Alive(tb testing.TB) {
	tb.Helper()
	if p.ended() {
		tb.Fatalf("%s has ended: %s", p, p.cmd.ProcessState)
	}
}

// Until waits for something that it brings about.
func (p *Process) Until(tb testing.TB, what string, holds func() bool) {
	tb.Helper()
	wait.Until(tb, what, func() bool {
		last := p.ended() // what it did until then is done
		if holds() {
			return true
		}
		if last {
			p.Alive(tb)
		}
		return false
	})
}

// Says waits until it has written what matches the pattern.
func (p *Process) Says(tb testing.TB, pattern string) {
	tb.Helper()
	want := regexp.MustCompile(pattern)
	p.Until(tb, fmt.Sprintf("%q in what %s says", pattern, p), func() bool { return want.MatchString(p.Log()) })
}

// Signal sends it a signal.
func (p *Process) Signal(tb testing.TB, signal os.Signal) {
	tb.Helper()
	if err := p.cmd.Process.Signal(signal); err != nil {
		tb.Errorf("%s to %s: %v", signal, p, err)
	}
}

// Wait waits for its end, and returns how that was: nil if well.
func (p *Process) Wait(tb testing.TB) error {
	tb.Helper()
	p.awaited = true
	select {
	case <-p.done:
		return p.err
	case <-time.After(wait.Patience):
		tb.Fatalf("%s does not end", p)
		return nil
	}
}

// End asks it to end, and waits for that.
func (p *Process) End(tb testing.TB) error {
	tb.Helper()
	p.Signal(tb, syscall.SIGTERM)
	return p.Wait(tb)
}

// Awaited reports whether the test has waited for its end.
func (p *Process) Awaited() bool { return p.awaited }
