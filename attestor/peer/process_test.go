package peer

import (
	"errors"
	"io"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/deputy-id/deputy/test/bubble"
)

func open(t *testing.T, table *Table, pid int32) *Process {
	t.Helper()
	p, err := table.Open(pid)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.Close() })
	return p
}

func TestProcessTellsWhatTheKernelKnows(t *testing.T) {
	kernels(t, func(t *testing.T, kernel features) {
		h := play(t, "wait", nil)
		h.expect("ready")
		p := open(t, openTable(t, kernel), h.pid())
		if p.PID() != h.pid() {
			t.Errorf("PID: got %d, want %d", p.PID(), h.pid())
		}
		info, err := p.Info()
		if err != nil {
			t.Fatal(err)
		}
		if info.PPID != int32(os.Getpid()) || info.EUID != uint32(os.Geteuid()) || info.EGID != uint32(os.Getegid()) {
			t.Errorf("got %+v, want a child of %d with our credentials", info, os.Getpid())
		}
		status, err := p.status()
		if err != nil {
			t.Fatal(err)
		}
		info.CgroupID = 0
		if diff := cmp.Diff(status, info); diff != "" {
			t.Errorf("status and Info differ (-status +Info):\n%s", diff)
		}
		own, err := os.Readlink("/proc/self/exe")
		if err != nil {
			t.Fatal(err)
		}
		if exe, err := p.Readlink("exe"); err != nil || exe != own {
			t.Errorf("Readlink exe: got %q, %v, want %q", exe, err, own)
		}
		f, err := p.Open("exe")
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		magic := make([]byte, 4)
		if _, err := io.ReadFull(f, magic); err != nil || string(magic) != "\x7fELF" {
			t.Errorf("Open exe: got %q, %v, want the executable", magic, err)
		}
		tasks, err := p.ReadDir("task")
		if err != nil {
			t.Fatal(err)
		}
		var found bool
		for _, e := range tasks {
			found = found || e.Name() == strconv.Itoa(int(h.pid()))
		}
		if !found {
			t.Errorf("ReadDir task: got %v, want %d among them", tasks, h.pid())
		}
		program, err := p.Program()
		if err != nil {
			t.Fatal(err)
		}
		var st unix.Stat_t
		if err := unix.Stat(own, &st); err != nil {
			t.Fatal(err)
		}
		if want := (FileID{st.Dev, st.Ino}); program.Executable() != want {
			t.Errorf("Executable: got %v, want %v", program.Executable(), want)
		}
		if again, err := p.Program(); again != program || err != nil {
			t.Errorf("Program again: got %p, %v, want the same %p", again, err, program)
		}
		if foreign, err := p.ForeignUserNamespace(); foreign || err != nil {
			t.Errorf("ForeignUserNamespace: got %v, %v, want false", foreign, err)
		}
	})
}

func TestProcessIsReadBelowItsDirectoryOnly(t *testing.T) {
	p := open(t, openTable(t, features{}), int32(os.Getpid()))
	for _, name := range []string{"/etc/passwd", "../self/stat", "task/../../1/stat", ""} {
		if b, err := p.ReadFile(name); err == nil {
			t.Errorf("ReadFile %q: got %d bytes, want an error", name, len(b))
		}
	}
}

func TestProcessEnds(t *testing.T) {
	kernels(t, func(t *testing.T, kernel features) {
		h := play(t, "wait", nil)
		h.expect("ready")
		table := openTable(t, kernel)
		p := open(t, table, h.pid())
		program, err := p.Program()
		if err != nil {
			t.Fatal(err)
		}
		if err := p.Alive(); err != nil {
			t.Fatalf("Alive before the end: %v", err)
		}
		if err := h.cmd.Process.Kill(); err != nil {
			t.Fatal(err)
		}
		<-p.Done() // a zombie, as nobody waited for it
		gone := func(what string, err error) {
			t.Helper()
			if !errors.Is(err, ErrGone) {
				t.Errorf("%s: got %v, want ErrGone", what, err)
			}
		}
		gone("Alive of a zombie", p.Alive())
		gone("Current of a zombie", program.Current())
		_, err = p.Program()
		gone("Program of a zombie", err)
		_, err = table.Open(h.pid())
		gone("Open of a zombie", err)
		h.kill()
		gone("Alive", p.Alive())
		gone("Current", program.Current())
		_, err = p.Info()
		gone("Info", err)
		_, err = p.ReadFile("stat")
		gone("ReadFile", err)
		_, err = table.Open(h.pid())
		gone("Open", err)
	})
}

// A PID that was given to another process since is not taken for its owner.
func TestReusedPIDIsNotTheProcess(t *testing.T) {
	kernels(t, func(t *testing.T, kernel features) {
		h := play(t, "wait", nil)
		h.expect("ready")
		pidfd, err := unix.PidfdOpen(int(h.pid()), 0)
		if err != nil {
			t.Fatal(err)
		}
		h.kill()
		if _, err := openTable(t, kernel).intern(pidfd, int32(os.Getpid())); !errors.Is(err, ErrGone) {
			t.Errorf("got %v, want ErrGone", err)
		}
	})
}

func TestProcessWithoutAProgramIsRefused(t *testing.T) {
	kernels(t, func(t *testing.T, kernel features) {
		p, err := openTable(t, kernel).Open(2)
		if err != nil {
			t.Skip("SKIPPED: no kernel thread has PID 2 here")
		}
		defer p.Close()
		if name, _ := p.ReadFile("comm"); strings.TrimSpace(string(name)) != "kthreadd" {
			t.Skip("SKIPPED: PID 2 is no kernel thread here")
		}
		if g, err := p.Program(); err == nil {
			t.Errorf("kernel thread: got program %v, want an error", g.Executable())
		}
	})
}

func TestProgramEndsWithExec(t *testing.T) {
	needRoot(t)
	for _, file := range []string{"same", "other"} {
		t.Run(file, func(t *testing.T) {
			kernels(t, func(t *testing.T, kernel features) {
				l := listen(t, openTable(t, kernel), Options{})
				h := play(t, "exec", nil, l.Addr().String(), file)
				c := accept(t, l)
				if err := c.Challenge(t.Context()); err != nil {
					t.Fatal(err)
				}
				h.expect("answered")
				if err := c.Check(); err != nil {
					t.Fatalf("before: %v", err)
				}
				blind := &Program{process: c.process, exe: c.program.exe, mem: -1} // who may not open mem
				h.cue()
				h.expect("ready")
				if err := blind.Current(); (file == "other") != errors.Is(err, ErrProgramChanged) {
					t.Errorf("by the file alone: got %v", err)
				}
				if err := c.Check(); !errors.Is(err, ErrProgramChanged) {
					t.Errorf("after: got %v, want ErrProgramChanged", err)
				}
				now, err := c.Process().Program()
				if err != nil || now == c.Program() {
					t.Fatalf("Program: got %p, %v, want another than %p", now, err, c.Program())
				}
				if err := now.Current(); err != nil {
					t.Errorf("its new program: %v", err)
				}
				if err := c.Check(); !errors.Is(err, ErrProgramChanged) {
					t.Errorf("after the new program was seen: got %v, want ErrProgramChanged", err)
				}
			})
		})
	}
}

func TestUserNamespaceOfThePeerIsForeign(t *testing.T) {
	h := play(t, "wait", func(cmd *exec.Cmd) {
		cmd.SysProcAttr = &syscall.SysProcAttr{
			Cloneflags:  syscall.CLONE_NEWUSER,
			UidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getuid(), Size: 1}},
			GidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getgid(), Size: 1}},
		}
	})
	h.expect("ready")
	p := open(t, openTable(t, features{}), h.pid())
	if foreign, err := p.ForeignUserNamespace(); !foreign || err != nil {
		t.Errorf("got %v, %v, want true", foreign, err)
	}
}

func TestTableSharesAProcess(t *testing.T) {
	kernels(t, func(t *testing.T, kernel features) {
		table := openTable(t, kernel)
		self := int32(os.Getpid())
		a, b := open(t, table, self), open(t, table, self)
		if a != b {
			t.Error("the same process was opened twice")
		}
		h := play(t, "wait", nil)
		h.expect("ready")
		if c := open(t, table, h.pid()); c == a || c.ID() == a.ID() {
			t.Error("two processes are one")
		}
	})
}

func TestTableKeepsProcessesThatNobodyHolds(t *testing.T) {
	kernels(t, func(t *testing.T, kernel features) {
		table := openTable(t, kernel)
		table.idleMost = 1
		h := play(t, "wait", nil)
		h.expect("ready")
		first, err := table.Open(int32(os.Getpid()))
		if err != nil {
			t.Fatal(err)
		}
		first.Close()
		if again := open(t, table, int32(os.Getpid())); again != first {
			t.Error("it was not kept")
		} else {
			again.Close()
		}
		other, err := table.Open(h.pid())
		if err != nil {
			t.Fatal(err)
		}
		if _, err := other.Program(); err != nil {
			t.Fatal(err)
		}
		other.Close() // one too many: the longest idle goes
		<-first.Done()
		if _, err := first.ReadFile("stat"); !errors.Is(err, ErrGone) {
			t.Errorf("let go: got %v, want ErrGone", err)
		}
		if err := first.Close(); err == nil {
			t.Error("closed once too often: no error")
		}
		h.kill()
		<-other.Done()
		table.mu.Lock()
		defer table.mu.Unlock()
		if len(table.byID)+len(table.numbers)+table.idle.Len() != 0 {
			t.Errorf("table still holds %d processes, %d numbers", len(table.byID), len(table.numbers))
		}
	})
}

func TestTableLetsIdleProcessesGo(t *testing.T) {
	table := openTable(t, features{}) // outside of the bubble: its goroutine waits for the kernel
	bubble.Test(t, func(t *testing.T) {
		p, err := table.Open(int32(os.Getpid()))
		if err != nil {
			t.Fatal(err)
		}
		start := time.Now()
		p.Close()
		<-p.Done()
		if got := time.Since(start); got != idleTime {
			t.Errorf("let go after %v, want %v", got, idleTime)
		}
	})
}

func TestTableInAnotherPIDNamespace(t *testing.T) {
	needRoot(t)
	ns := func(cmd *exec.Cmd) {
		cmd.SysProcAttr = &syscall.SysProcAttr{
			Cloneflags:   syscall.CLONE_NEWPID | syscall.CLONE_NEWNS,
			Unshareflags: syscall.CLONE_NEWNS, // makes the mounts private
		}
	}
	path := t.TempDir() + "/s"
	play(t, "daemon", ns, path).expect("/proc belongs to another PID namespace")

	h := play(t, "daemon", ns, path, "with a proc of its own")
	h.expect("ready")
	play(t, "client", nil, path).expect("sent away: " + ErrNoPID.Error())
}
