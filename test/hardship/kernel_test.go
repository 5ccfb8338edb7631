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

	"github.com/deputy-id/deputy/test/need"
	"github.com/deputy-id/deputy/test/process"
	"github.com/deputy-id/deputy/test/wait"
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
	d := newHost(t, mine())
	d.StartBy(t, as("older-kernel", d.Args()...))
	d.Says(t, `kernel is older than it could be: instead="kernel has no SO_PEERPIDFD`)
	d.Says(t, `kernel is older than it could be: instead="kernel has no PIDFD_GET_INFO`)
	d.fetches(t, "/agent/me")
	if out := d.Run(t, "fetch", "jwt", "--audience", "a"); out == "" {
		t.Error("got no token")
	}
	if out := d.Run(t, "attest", fmt.Sprint(os.Getpid())); !strings.Contains(out, fmt.Sprintf("unix:uid:%d\n", os.Getuid())) {
		t.Errorf("got %q, want our selectors", out)
	}
	out, err := d.Command("exec", "--", d.Binary, "fetch", "x509").CombinedOutput()
	if err != nil || !strings.Contains(string(out), "/agent/me") {
		t.Errorf("under deputy exec: %v\n%s", err, out)
	}
}

// A peer that has no PID here is refused, with what to do about it.
func TestPeerOutsideOfThePIDNamespace(t *testing.T) {
	need.Root(t, "a PID namespace")
	t.Parallel()
	d := newHost(t, mine())
	cmd := exec.Command("unshare", append([]string{"--pid", "--fork", "--kill-child", "--mount-proc"}, d.Args()...)...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	inside := process.Start(t, cmd)
	t.Cleanup(func() {
		inside.Signal(t, syscall.SIGKILL) // it does not hear another
		inside.Wait(t)
	})
	inside.Says(t, "started")
	for _, args := range [][]string{{"fetch", "x509"}, {"fetch", "jwt", "--audience", "a"}, {"entry", "list"}} {
		// A call that the client had put on the connection before it read why that
		// ends says only that it ended.
		wait.UntilNil(t, func() error {
			out, err := d.Command(args...).CombinedOutput()
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
	init := firstChild(t, inside.PID())
	out, err := exec.Command("nsenter", "--pid", "--mount", "-t", init, d.Binary, "fetch", "x509", "--socket", d.Workload).CombinedOutput()
	if err != nil || !strings.Contains(string(out), "/agent/me") {
		t.Errorf("inside: %v\n%s", err, out)
	}
}
