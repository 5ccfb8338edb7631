package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/deputy-id/deputy/internal/owned"
)

// A target is the process that watch --signal signals. A nil one is none.
type target struct {
	signal unix.Signal
	file   string // absolute; "" for a process that is pinned from the start

	pid   int
	pidfd *os.File
	raw   syscall.RawConn // of pidfd
	done  chan struct{}
}

// parseTarget reads PID or FILE, with :NAME for another signal than HUP.
func parseTarget(text string) (*target, error) {
	t := &target{signal: unix.SIGHUP}
	where := text
	if i := strings.LastIndexByte(text, ':'); i >= 0 && !strings.Contains(text[i:], "/") {
		where = text[:i]
		name := strings.TrimPrefix(text[i+1:], "SIG")
		if t.signal = unix.SignalNum("SIG" + name); t.signal == 0 {
			return nil, fmt.Errorf("--signal %q: no signal is called %q", text, text[i+1:])
		}
	}
	if where == "" {
		return nil, fmt.Errorf("--signal %q names no process", text)
	}
	if where[0] == '-' {
		return nil, fmt.Errorf("--signal %q: that is no PID; a file of such a name is written ./%s", text, where)
	}
	if strings.Trim(where, "0123456789") == "" {
		pid, err := parsePID([]byte(where))
		if err != nil {
			return nil, fmt.Errorf("--signal %q: %w", text, err)
		}
		t.pid = pid
		return t, nil
	}
	path, err := filepath.Abs(where)
	if err != nil {
		return nil, err
	}
	t.file = path
	return t, nil
}

// parsePID reads the number on the first line.
func parsePID(text []byte) (int, error) {
	line, _, _ := bytes.Cut(text, []byte("\n"))
	pid, err := strconv.ParseUint(string(bytes.TrimSpace(line)), 10, 31)
	if err != nil || pid == 0 {
		return 0, errors.New("that is no PID")
	}
	return int(pid), nil
}

// pin holds on to a process that was named by its PID: another one that gets
// the number later is not signalled.
func (t *target) pin() error {
	if t == nil || t.file != "" {
		return nil
	}
	fd, err := unix.PidfdOpen(t.pid, unix.PIDFD_NONBLOCK)
	if err != nil {
		return cannotSignal(t.pid, err)
	}
	t.pidfd = os.NewFile(uintptr(fd), "pidfd")
	if t.raw, err = t.pidfd.SyscallConn(); err != nil {
		return err
	}
	if err := t.pinned(0); err != nil { // may we?
		return err
	}
	t.done = make(chan struct{})
	go func() { // until the process ends, or close
		if t.raw.Read(func(fd uintptr) bool { return readable(int(fd)) }) == nil {
			close(t.done)
		}
	}()
	return nil
}

func readable(fd int) bool {
	fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
	n, err := unix.Poll(fds, 0)
	return err == nil && n > 0
}

// ended is closed when a pinned process ends.
func (t *target) ended() <-chan struct{} {
	if t == nil {
		return nil
	}
	return t.done
}

func (t *target) close() {
	if t != nil && t.pidfd != nil {
		t.pidfd.Close()
	}
}

func (t *target) send() error {
	switch {
	case t == nil:
		return nil
	case t.file != "":
		return t.sendByFile()
	}
	return t.pinned(t.signal)
}

func (t *target) pinned(s unix.Signal) error {
	var err error
	if bad := t.raw.Control(func(fd uintptr) { err = unix.PidfdSendSignal(int(fd), s, nil, 0) }); bad != nil {
		err = bad
	}
	if err != nil {
		return cannotSignal(t.pid, err)
	}
	return nil
}

// sendByFile signals the process that the PID file names now. Who can write
// the file chooses the process: where that is another user, it must be one of
// that user's, whom it could have signalled by itself.
func (t *target) sendByFile() error {
	pid, owner, err := readPIDFile(t.file)
	if err != nil {
		return fmt.Errorf("nobody signalled: read PID file: %w", err)
	}
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return cannotSignal(pid, err)
	}
	defer unix.Close(fd)
	if owner >= 0 {
		status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
		if err != nil {
			return cannotSignal(pid, unix.ESRCH)
		}
		if !belongs(status, owner) {
			return fmt.Errorf("signal process %d: %s belongs to UID %d, the process does not", pid, t.file, owner)
		}
	}
	// That it is alive says that /proc had it, and no later one, too.
	if err := unix.PidfdSendSignal(fd, t.signal, nil, 0); err != nil {
		return cannotSignal(pid, err)
	}
	return nil
}

// belongs reports whether a process with this status is one that the user may
// signal: its real or its saved UID is the user's (kill(2)).
func belongs(status []byte, uid int) bool {
	for line := range bytes.Lines(status) {
		if f := bytes.Fields(line); len(f) == 5 && string(f[0]) == "Uid:" {
			return string(f[1]) == strconv.Itoa(uid) || string(f[3]) == strconv.Itoa(uid)
		}
	}
	return false
}

// readPIDFile reads a PID. The owner is that of the file if it is neither root
// nor us; -1 else.
func readPIDFile(path string) (pid, owner int, err error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return 0, 0, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return 0, 0, err
	}
	if !info.Mode().IsRegular() {
		return 0, 0, fmt.Errorf("%s is no file", path)
	}
	if info.Mode().Perm()&0o002 != 0 {
		return 0, 0, fmt.Errorf("%s may be written by everybody", path)
	}
	uid := int(info.Sys().(*syscall.Stat_t).Uid)
	if owner = uid; uid == 0 || uid == os.Geteuid() {
		owner = -1
		err = owned.Way(path)
	} else {
		err = owned.WayOf(path, uid)
	}
	if err != nil {
		return 0, 0, err
	}
	// What was opened is what the way that was looked at leads to.
	if now, err := os.Stat(path); err != nil || !os.SameFile(info, now) {
		return 0, 0, fmt.Errorf("%s is being replaced", path)
	}
	text := make([]byte, 64)
	n, err := f.Read(text)
	if err != nil && err != io.EOF {
		return 0, 0, err
	}
	if pid, err = parsePID(text[:n]); err != nil {
		return 0, 0, fmt.Errorf("%s: %w", path, err)
	}
	return pid, owner, nil
}

func cannotSignal(pid int, err error) error {
	if errors.Is(err, unix.ESRCH) || errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("signal process %d: there is none", pid)
	}
	return fmt.Errorf("signal process %d: %w", pid, err)
}
