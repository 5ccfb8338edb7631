package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"os/signal"
	"runtime"
	"strings"
	"syscall"

	"github.com/spf13/cobra"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"golang.org/x/sys/unix"

	adminv1 "github.com/deputy-id/deputy/proto/deputy/admin/v1"
)

// Exit statuses of exec for failures of its own, as env(1) has them.
const (
	execFailed      = 125
	execNotRunnable = 126
	execNotFound    = 127
)

// An execError is a failure to start the command.
type execError struct {
	status int
	err    error
}

func (e *execError) Error() string { return e.err.Error() }
func (e *execError) Unwrap() error { return e.err }

// execStatus is the exit status for an error of exec, which leaves those
// below 125 to the command.
func execStatus(err error) int {
	var failed *execError
	var silent silentError
	switch {
	case errors.As(err, &silent):
		return int(silent)
	case errors.As(err, &failed):
		return failed.status
	}
	return execFailed
}

func newExec() *cobra.Command {
	var e endpoints
	var name, account, entry string
	cmd := &cobra.Command{
		Use:   "exec [--name N] [--user U] [--entry PATH] -- COMMAND [ARG...]",
		Short: "Run a command that finds the Workload API",
		Long: `Runs a command with SPIFFE_ENDPOINT_SOCKET set, passes signals on to it and ends
with its exit status, 128+n if signal n ended it. Failures of deputy itself are
125, a command that cannot be executed 126, one that is not found 127.

With --name, which root alone may use, the daemon registers the command before
it starts: the process has the selectors process:exec:N and process:leader:true
for as long as both live. A daemon that was restarted does not know the name: start
the command again, or give what is to stay a systemd unit. --user drops to another
user before the command starts, and --entry makes an entry for the name that ends
with the process. A deputy exec that is killed takes the command with it.`,
		Example: `  deputy exec -- python3 agent.py
  sudo deputy exec --name researcher --user alice --entry /agent/researcher -- python3 agent.py`,
		Args: cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			// An empty user would be root, an empty name nobody.
			if err := named(cmd, "name", "user", "entry"); err != nil {
				return err
			}
			c := &command{endpoints: &e, name: name, entry: entry, args: args, env: os.Environ()}
			return c.run(cmd.Context(), account)
		},
	}
	e.flags(cmd)
	cmd.Flags().StringVar(&name, "name", "", "register the command under this `name`")
	cmd.Flags().StringVar(&account, "user", "", "run as this `user`, by name or UID")
	cmd.Flags().StringVar(&entry, "entry", "", "make an entry with this `path` for the name")
	cmd.Flags().SetInterspersed(false) // the first word that is no flag is the command
	return cmd
}

// A command is what exec runs.
type command struct {
	endpoints   *endpoints
	name, entry string
	args, env   []string
}

func (c *command) run(ctx context.Context, account string) error {
	switch {
	case c.entry != "" && c.name == "":
		return usage(errors.New("--entry needs a --name"))
	case (c.name != "" || account != "") && os.Geteuid() != 0:
		return errors.New("--name and --user need root")
	}
	socket, err := workloadPlace.find(c.endpoints.socket)
	if err != nil {
		return err
	}
	c.setenv("SPIFFE_ENDPOINT_SOCKET", "unix://"+socket)

	var who *credential
	if account != "" {
		if who, err = lookup(account); err != nil {
			return err
		}
		c.setenv("HOME", who.Home)
		c.setenv("USER", who.Name)
		c.setenv("LOGNAME", who.Name)
	}
	path, err := exec.LookPath(c.args[0])
	if err != nil && !errors.Is(err, exec.ErrDot) {
		return cannotStart(c.args[0], err)
	}

	signals := forward()
	tty := controlling()
	child, release, err := c.start(order{Path: path, Args: c.args, Env: c.env, As: who})
	if err != nil {
		return err
	}
	if c.name != "" {
		err = c.register(ctx, child.Pid)
	}
	// Without an order the child ends.
	if err := errors.Join(err, release(err == nil)); err != nil {
		if state, waited := child.Wait(); waited == nil && state.Sys().(syscall.WaitStatus).Signaled() {
			return ended(state) // interrupted while it waited
		}
		return err
	}
	return wait(child, signals, tty)
}

func (c *command) setenv(key, value string) {
	kept := c.env[:0:0]
	for _, kv := range c.env {
		if !strings.HasPrefix(kv, key+"=") {
			kept = append(kept, kv)
		}
	}
	c.env = append(kept, key+"="+value)
}

// register names the child to the daemon, which pins it. The child is root's
// and waits, so nobody else has touched it.
func (c *command) register(ctx context.Context, pid int) error {
	req := &adminv1.RegisterExecRequest{Pid: int32(pid), Name: c.name}
	var id *types.SPIFFEID
	if c.entry != "" {
		var err error
		if id, err = parseID(c.entry); err != nil {
			return err
		}
		req.Entry = &adminv1.Entry{Entry: &types.Entry{
			SpiffeId:  id,
			Selectors: []*types.Selector{{Type: "process", Value: "exec:" + c.name}},
		}}
	}
	err := c.endpoints.withAdmin(ctx, func(ctx context.Context, client adminClient) error {
		if id != nil {
			if err := client.complete(ctx, id); err != nil {
				return err
			}
		}
		_, err := client.RegisterExec(ctx, req)
		return err
	})
	if err != nil {
		return fmt.Errorf("register %s: %w", c.name, err)
	}
	return nil
}

// start starts the child: this binary, which waits for its order. release
// gives the order, or takes it back.
func (c *command) start(o order) (*os.Process, func(bool) error, error) {
	text, err := json.Marshal(o)
	if err != nil {
		return nil, nil, err
	}
	r, w, err := os.Pipe()
	if err != nil {
		return nil, nil, err
	}
	defer r.Close()
	// The kernel tells the child of the end of this thread, not of the process.
	runtime.LockOSThread()
	child, err := os.StartProcess("/proc/self/exe", []string{"deputy", childCommand}, &os.ProcAttr{
		Env:   []string{},
		Files: []*os.File{os.Stdin, os.Stdout, os.Stderr, r},
		Sys:   &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL},
	})
	if err != nil {
		w.Close()
		return nil, nil, fmt.Errorf("start child: %w", err)
	}
	return child, func(tell bool) error {
		defer w.Close()
		if !tell {
			return nil
		}
		if _, err := w.Write(text); err != nil {
			return fmt.Errorf("tell child: %w", err)
		}
		return nil
	}, nil
}

// forwarded are the signals that are passed on. Those of job control are the
// terminal's and the shell's business: they go to the whole process group.
var forwarded = []os.Signal{
	unix.SIGHUP, unix.SIGINT, unix.SIGQUIT, unix.SIGTERM, unix.SIGUSR1, unix.SIGUSR2,
}

// forward starts to collect the signals that are to be passed on. What was
// ignored (nohup) stays so, here and in the child.
func forward() <-chan os.Signal {
	signals := make(chan os.Signal, 16)
	for _, s := range forwarded {
		if !signal.Ignored(s) {
			signal.Notify(signals, s)
		}
	}
	return signals
}

// wait passes signals on until the child has ended, and returns its status.
func wait(child *os.Process, signals <-chan os.Signal, tty terminal) error {
	type end struct {
		state *os.ProcessState
		err   error
	}
	ends := make(chan end, 1)
	go func() {
		state, err := child.Wait()
		ends <- end{state, err}
	}()
	for {
		select {
		case s := <-signals:
			if !tty.sent(s) {
				child.Signal(s) // it may have ended: the next turn sees that
			}
		case e := <-ends:
			if e.err != nil {
				return fmt.Errorf("wait for child: %w", e.err)
			}
			return ended(e.state)
		}
	}
}

// ended is the status of a child that has ended, as a shell has it.
func ended(state *os.ProcessState) error {
	status := state.Sys().(syscall.WaitStatus)
	switch {
	case status.Signaled():
		return silentError(128 + int(status.Signal()))
	case status.ExitStatus() != 0:
		return silentError(status.ExitStatus())
	}
	return nil
}

// A terminal is the controlling terminal, or that there is none.
type terminal struct{ there bool }

func controlling() terminal {
	tty, err := openTerminal()
	if err != nil {
		return terminal{}
	}
	tty.Close()
	return terminal{there: true}
}

func openTerminal() (*os.File, error) {
	return os.OpenFile("/dev/tty", os.O_RDONLY|unix.O_NOCTTY, 0)
}

// sent reports whether the signal is one that the terminal sends to everybody
// in its foreground, or that its end brings: the child, of the same process
// group, has got it too, and must not get it twice. (One of that kind from
// kill(1) is then not passed on; there is no telling them apart.)
func (t terminal) sent(s os.Signal) bool {
	if !t.there || s != unix.SIGINT && s != unix.SIGQUIT && s != unix.SIGHUP {
		return false
	}
	tty, err := openTerminal()
	if err != nil {
		return s == unix.SIGHUP // it is gone
	}
	defer tty.Close()
	foreground, err := unix.IoctlGetInt(int(tty.Fd()), unix.TIOCGPGRP)
	return err == nil && s != unix.SIGHUP && foreground == unix.Getpgrp()
}

// cannotStart words why a command does not run, with the status for it.
func cannotStart(name string, err error) error {
	status := execNotRunnable
	if errors.Is(err, exec.ErrNotFound) || errors.Is(err, fs.ErrNotExist) {
		status = execNotFound
	}
	var inner *exec.Error
	if errors.As(err, &inner) {
		err = inner.Err
	}
	var path *fs.PathError
	if errors.As(err, &path) {
		err = path.Err
	}
	return &execError{status, fmt.Errorf("exec %s: %w", name, err)}
}
