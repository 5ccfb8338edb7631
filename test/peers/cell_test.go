package peers

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"sync"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// A cell is PID and mount namespaces for programs that would else leave much
// behind: when the test ends, or is killed, the kernel ends whatever was started
// there and drops its mounts. /run, /var/lib and /var/log are the cell's own.
type cell struct {
	pid int // of its first process, this test binary in another role
	dir string

	mu  sync.Mutex // guards what follows
	in  *json.Encoder
	out *json.Decoder
}

// An order is what the first process is told: to start a program, to send it a
// signal, or, where the signal is to end it, to wait for that.
type order struct {
	Name   string
	Args   []string
	Signal syscall.Signal
}

// cellRole is set to the cell's directory for the first process.
const cellRole = "DEPUTY_PEERS_CELL"

// newCell makes a cell. The files that masks names are, inside, files with this
// content. Logs are in the directory, which is not below the cell's own ones.
func newCell(t *testing.T, dir string, masks map[string]string) *cell {
	t.Helper()
	text, err := json.Marshal(masks)
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), cellRole+"="+dir, "TMPDIR="+dir)
	cmd.Stderr = os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNS | unix.CLONE_NEWPID}
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		in.Close() // ends it
		if err := cmd.Wait(); err != nil {
			t.Errorf("end the cell: %v", err)
		}
	})
	c := &cell{pid: cmd.Process.Pid, dir: dir, in: json.NewEncoder(in), out: json.NewDecoder(out)}
	c.tell(t, json.RawMessage(text))
	return c
}

func (c *cell) start(t *testing.T, name string, args ...string) {
	t.Helper()
	c.tell(t, order{Name: name, Args: args})
}

// signal sends a signal, and waits for the end if it is SIGTERM or SIGKILL.
func (c *cell) signal(t *testing.T, name string, s syscall.Signal) {
	t.Helper()
	c.tell(t, order{Name: name, Signal: s})
}

func (c *cell) tell(t *testing.T, what any) {
	t.Helper()
	c.mu.Lock()
	defer c.mu.Unlock()
	if err := c.in.Encode(what); err != nil {
		t.Fatal(err)
	}
	var problem string
	if err := c.out.Decode(&problem); err != nil {
		t.Fatalf("the cell does not answer: %v", err)
	}
	if problem != "" {
		t.Fatal(problem)
	}
}

func (c *cell) log(name string) string { return filepath.Join(c.dir, name+".log") }

// runCell is the first process of a cell. It returns when its input ends.
func runCell(dir string) error {
	os.Unsetenv(cellRole)
	in, out := json.NewDecoder(os.Stdin), json.NewEncoder(os.Stdout)
	var masks map[string]string
	if err := in.Decode(&masks); err != nil {
		return err
	}
	if err := furnish(dir, masks); err != nil {
		out.Encode(err.Error())
		return err
	}
	out.Encode("")
	i := &inmates{dir: dir, started: make(map[string]*inmate)}
	child := make(chan os.Signal, 1)
	signal.Notify(child, unix.SIGCHLD)
	go func() {
		for range child {
			i.reap()
		}
	}()
	for {
		var o order
		if err := in.Decode(&o); errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return err
		}
		problem := ""
		if err := i.do(o); err != nil {
			problem = err.Error()
		}
		if err := out.Encode(problem); err != nil {
			return err
		}
	}
}

// furnish makes the mounts.
func furnish(dir string, masks map[string]string) error {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("keep the mounts to ourselves: %w", err)
	}
	if err := unix.Mount("proc", "/proc", "proc", 0, ""); err != nil {
		return fmt.Errorf("mount /proc: %w", err)
	}
	for _, own := range []string{"/run", "/var/lib", "/var/log"} {
		if err := unix.Mount("tmpfs", own, "tmpfs", 0, "mode=755"); err != nil {
			return fmt.Errorf("mount %s: %w", own, err)
		}
	}
	if _, err := os.Stat(dir); err != nil {
		return fmt.Errorf("TMPDIR must not be below /run, /var/lib or /var/log: %w", err)
	}
	for path, content := range masks {
		mask, err := os.CreateTemp(dir, "mask-")
		if err != nil {
			return err
		}
		if _, err := mask.WriteString(content); err != nil {
			return err
		}
		mask.Close()
		if err := unix.Mount(mask.Name(), path, "", unix.MS_BIND, ""); err != nil {
			return fmt.Errorf("mask %s: %w", path, err)
		}
	}
	return nil
}

// inmates are what the first process started.
type inmates struct {
	dir string

	mu      sync.Mutex // guards what follows
	started map[string]*inmate
}

type inmate struct {
	process *os.Process
	done    chan struct{} // closed when it has ended
}

func (i *inmates) do(o order) error {
	if o.Signal == 0 {
		return i.start(o.Name, o.Args)
	}
	i.mu.Lock()
	one := i.started[o.Name]
	i.mu.Unlock()
	if one == nil {
		return fmt.Errorf("%s does not run", o.Name)
	}
	if err := one.process.Signal(o.Signal); err != nil {
		return fmt.Errorf("%s to %s: %w", o.Signal, o.Name, err)
	}
	if o.Signal == unix.SIGTERM || o.Signal == unix.SIGKILL {
		<-one.done
	}
	return nil
}

func (i *inmates) start(name string, args []string) error {
	path, err := exec.LookPath(args[0])
	if err != nil {
		return err
	}
	null, err := os.Open(os.DevNull)
	if err != nil {
		return err
	}
	defer null.Close()
	log, err := os.OpenFile(filepath.Join(i.dir, name+".log"), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return err
	}
	defer log.Close()
	i.mu.Lock() // so that it is not reaped before it is known
	defer i.mu.Unlock()
	p, err := os.StartProcess(path, args, &os.ProcAttr{Dir: i.dir, Files: []*os.File{null, log, log}})
	if err != nil {
		return err
	}
	i.started[name] = &inmate{p, make(chan struct{})}
	return nil
}

// reap takes leave of what has ended: what was started, and what comes to the
// first process because its parent has ended.
func (i *inmates) reap() {
	i.mu.Lock()
	defer i.mu.Unlock()
	for {
		pid, err := unix.Wait4(-1, nil, unix.WNOHANG, nil)
		if pid <= 0 && err != unix.EINTR {
			return
		}
		for name, one := range i.started {
			if one.process.Pid == pid {
				close(one.done)
				delete(i.started, name)
			}
		}
	}
}
