package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"

	"github.com/deputy-id/deputy/internal/durable"
	"github.com/deputy-id/deputy/internal/owned"
)

// groupFile is the mode of a key that a group may read.
const groupFile = 0o640

// A setWriter keeps the files of watch --write, and tells a program of each
// change.
type setWriter struct {
	out     *output
	notes   io.Writer
	command string        // after a change; "" for none
	timeout time.Duration // of the command
	target  *target       // of signals; nil for none

	dir     string // absolute
	gid     int    // of the keys; -1 as it comes
	set     *durable.Set
	updates int

	next chan *workload.X509SVIDResponse // the latest that waits
}

// open checks what can be checked before there is an identity.
func (w *setWriter) open(dir, group, signalled string) (err error) {
	w.gid = -1
	if group != "" {
		if w.gid, err = groupID(group); errors.As(err, new(user.UnknownGroupError)) || errors.As(err, new(user.UnknownGroupIdError)) {
			return usage(fmt.Errorf("--group %q: there is no such group", group))
		} else if err != nil {
			return err
		}
	}
	if signalled != "" {
		if w.target, err = parseTarget(signalled); err != nil {
			return usage(err)
		}
	}
	if w.dir, err = filepath.Abs(dir); err != nil {
		return err
	}
	if err := w.openSet(); err != nil {
		return err
	}
	if err := w.target.pin(); err != nil {
		w.close()
		return err
	}
	w.next = make(chan *workload.X509SVIDResponse, 1)
	return nil
}

func (w *setWriter) close() {
	if w.set != nil {
		w.set.Close()
		w.set = nil
	}
	w.target.close()
}

// watch follows the updates and writes them, which may take long: a disk is
// full, a command runs. An update that another one overtakes is not written.
func (w *setWriter) watch(ctx context.Context, e *endpoints, want *choice) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	ended := make(chan error, 1)
	go func() {
		ended <- w.run()
		cancel()
	}()
	err := watch(ctx, w.notes, e, want, func(resp *workload.X509SVIDResponse) error {
		select {
		case <-w.next:
		default:
		}
		w.next <- resp // by nobody else, so there is room
		return nil
	})
	close(w.next)
	if failed := <-ended; failed != nil {
		return failed
	}
	return err
}

// run writes updates until there are no more. One that cannot be written is
// tried again, if there are files of before; else a supervisor is to know.
func (w *setWriter) run() error {
	var resp *workload.X509SVIDResponse
	var retry <-chan time.Time
	pause := firstPause
	for {
		select {
		case <-w.target.ended():
			return fmt.Errorf("process %d, which was to be signalled, has ended", w.target.pid)
		case update, more := <-w.next:
			if !more {
				return nil
			}
			resp, pause = update, firstPause
		case <-retry:
		}
		names, changed, err := w.replace(resp)
		if err != nil {
			if w.updates == 0 {
				return err
			}
			fmt.Fprintf(w.notes, "deputy: %s; trying again in %s\n", err, pause)
			retry = time.After(pause)
			pause = min(2*pause, lastPause)
			continue
		}
		retry = nil
		w.updates++
		if err := w.tell(resp, names, changed); err != nil {
			return err
		}
	}
}

// replace makes the files those of the answer, and reports whether they were
// others before.
func (w *setWriter) replace(resp *workload.X509SVIDResponse) (names []string, changed bool, err error) {
	files, err := x509Files(resp)
	if err != nil {
		return nil, false, err
	}
	var set []durable.SetFile
	for _, f := range files {
		to := durable.SetFile{Name: f.name, Data: f.data, Mode: f.mode, GID: -1}
		if f.mode == secretFile && w.gid >= 0 {
			to.Mode, to.GID = groupFile, w.gid
		}
		set = append(set, to)
		names = append(names, filepath.Join(w.dir, f.name))
	}
	if err := w.openSet(); err != nil {
		return nil, false, err
	}
	changed, err = w.set.Replace(set)
	return names, changed, err
}

// openSet makes sure that the directory is there, is the one that we locked,
// and is nobody else's to write to: who could would give a program its key.
func (w *setWriter) openSet() error {
	if _, err := os.Stat(w.dir); errors.Is(err, fs.ErrNotExist) {
		if err := createDir(w.dir, 0o755, -1); err != nil {
			return err
		}
	}
	if err := owned.Dir(w.dir); err != nil {
		return fmt.Errorf("write to %s: %w", w.dir, err)
	}
	if w.set != nil && w.set.At(w.dir) {
		return nil
	}
	set, err := durable.OpenSet(w.dir)
	if err != nil {
		return err
	}
	if w.set != nil {
		w.set.Close()
	}
	w.set = set
	return nil
}

// tell says that the update is written: to the terminal, the service manager
// and, if the files changed, to the program.
func (w *setWriter) tell(resp *workload.X509SVIDResponse, names []string, changed bool) error {
	if err := w.print(resp, names); err != nil {
		return err
	}
	if w.updates == 1 {
		if err := notify("READY=1"); err != nil {
			fmt.Fprintf(w.notes, "deputy: tell the service manager: %s\n", err)
		}
	}
	if !changed {
		return nil
	}
	if err := w.target.send(); err != nil {
		fmt.Fprintf(w.notes, "deputy: %s\n", err)
	}
	if err := w.exec(); err != nil {
		fmt.Fprintf(w.notes, "deputy: %s\n", err)
	}
	return nil
}

// print prints an update; without its keys, which are in the files.
func (w *setWriter) print(resp *workload.X509SVIDResponse, names []string) error {
	if w.out.json() {
		return w.out.valueLine(map[string][]string{"written": names})
	}
	return printUpdate(w.out, w.updates, resp)
}

// exec runs the command to its end, in a process group of its own, so that all
// of it can be killed. The end of the watch waits for it: it may be in the
// middle of something.
func (w *setWriter) exec() error {
	if w.command == "" {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.Background(), w.timeout)
	defer cancel()
	cmd := exec.CommandContext(ctx, "/bin/sh", "-c", w.command)
	for _, kv := range os.Environ() {
		if !strings.HasPrefix(kv, "NOTIFY_SOCKET=") { // it is not the service
			cmd.Env = append(cmd.Env, kv)
		}
	}
	cmd.Env = append(cmd.Env, "DEPUTY_DIR="+w.dir)
	cmd.Stdout, cmd.Stderr = os.Stderr, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	err := cmd.Run()
	switch {
	case ctx.Err() != nil && err != nil:
		return fmt.Errorf("--exec was killed after %s", w.timeout)
	case err != nil:
		return fmt.Errorf("--exec: %w", err)
	}
	return nil
}
