package hardship

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
)

// pidfdGetInfo is the type and number of that ioctl; its size grows with kernels.
const pidfdGetInfo = 0xff0b

// olderKernel is a role: it executes a command, and everything that comes of
// it, on a kernel that seems to know neither SO_PEERPIDFD (before Linux 6.5) nor
// PIDFD_GET_INFO (before 6.13).
func olderKernel(args []string) error {
	const (
		nr, arg1, arg2 = 0, 24, 32 // offsets in struct seccomp_data, little-endian
		load           = unix.BPF_LD | unix.BPF_W | unix.BPF_ABS
		equal          = unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K
		and            = unix.BPF_ALU | unix.BPF_AND | unix.BPF_K
		ret            = unix.BPF_RET | unix.BPF_K
	)
	filter := []unix.SockFilter{
		{Code: load, K: nr},
		{Code: equal, K: unix.SYS_GETSOCKOPT, Jf: 3},
		{Code: load, K: arg2},
		{Code: equal, K: unix.SO_PEERPIDFD, Jf: 6},
		{Code: ret, K: unix.SECCOMP_RET_ERRNO | uint32(unix.ENOPROTOOPT)},
		{Code: equal, K: unix.SYS_IOCTL, Jf: 4},
		{Code: load, K: arg1},
		{Code: and, K: 0xffff},
		{Code: equal, K: pidfdGetInfo, Jf: 1},
		{Code: ret, K: unix.SECCOMP_RET_ERRNO | uint32(unix.ENOTTY)},
		{Code: ret, K: unix.SECCOMP_RET_ALLOW},
	}
	runtime.LockOSThread() // the filter is the thread's, which then executes
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return err
	}
	program := unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]}
	if err := unix.Prctl(unix.PR_SET_SECCOMP, unix.SECCOMP_MODE_FILTER, uintptr(unsafe.Pointer(&program)), 0, 0); err != nil {
		return err
	}
	return syscall.Exec(args[0], args, os.Environ())
}

func TestOlderKernel(t *testing.T) {
	t.Parallel()
	p := newPlace(t, mine())
	d := p.begin(t, as("older-kernel", p.command().Args...))
	d.logged(t, `kernel is older than it could be: instead="kernel has no SO_PEERPIDFD`)
	d.logged(t, `kernel is older than it could be: instead="kernel has no PIDFD_GET_INFO`)
	d.fetches(t, "/agent/me")
	if out := d.run(t, "fetch", "jwt", "--audience", "a"); out == "" {
		t.Error("got no token")
	}
	if out := d.run(t, "attest", fmt.Sprint(os.Getpid())); !strings.Contains(out, fmt.Sprintf("unix:uid:%d\n", os.Getuid())) {
		t.Errorf("got %q, want our selectors", out)
	}
	out, err := d.cli("exec", "--", d.deputy, "fetch", "x509").CombinedOutput()
	if err != nil || !strings.Contains(string(out), "/agent/me") {
		t.Errorf("under deputy exec: %v\n%s", err, out)
	}
}

// A peer that has no PID here is refused, with what to do about it.
func TestPeerOutsideOfThePIDNamespace(t *testing.T) {
	needRoot(t)
	t.Parallel()
	p := newPlace(t, mine())
	inside := exec.Command("unshare", append([]string{"--pid", "--fork", "--kill-child", "--mount-proc"}, p.command().Args...)...)
	log := new(transcript)
	inside.Stderr = log
	inside.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := inside.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		inside.Process.Kill()
		inside.Wait()
		if t.Failed() {
			t.Logf("log of the daemon:\n%s", log)
		}
	})
	eventually(t, func() error {
		if !strings.Contains(log.String(), "started") {
			return errors.New("not started")
		}
		return nil
	})
	for _, args := range [][]string{{"fetch", "x509"}, {"fetch", "jwt", "--audience", "a"}, {"entry", "list"}} {
		// A call that the client had put on the connection before it read why that
		// ends says only that it ended.
		eventually(t, func() error {
			out, err := p.cli(args...).CombinedOutput()
			var exit *exec.ExitError
			if !errors.As(err, &exit) || exit.ExitCode() == 0 {
				t.Fatalf("%v: got %v, want it refused", args, err)
			}
			if !strings.Contains(string(out), "PID namespace") {
				return fmt.Errorf("%v: got %q, want the PID namespace named", args, out)
			}
			return nil
		})
	}
	// Who is inside is served.
	init := firstChild(t, inside.Process.Pid)
	out, err := exec.Command("nsenter", "--pid", "--mount", "-t", init, p.deputy, "fetch", "x509", "--socket", p.workload).CombinedOutput()
	if err != nil || !strings.Contains(string(out), "/agent/me") {
		t.Errorf("inside: %v\n%s", err, out)
	}
}
