package peer

import (
	"errors"
	"fmt"
	"os"
	"strconv"

	"golang.org/x/sys/unix"
)

// features is what this kernel, under the seccomp filter that we may run
// with, can do. Each is tried, not concluded from a version.
type features struct {
	peerPidfd  bool // SO_PEERPIDFD, Linux 6.5
	pidfdInode bool // an inode of a pidfd names one process for ever, Linux 6.9
	pidfdInfo  bool // PIDFD_GET_INFO, Linux 6.13
	passRights bool // SO_PASSRIGHTS, Linux 6.16
}

// infoMask is what Info wants of PIDFD_GET_INFO.
const infoMask = unix.PIDFD_INFO_PID | unix.PIDFD_INFO_CREDS | unix.PIDFD_INFO_CGROUPID

const pidfsMagic = 0x50494446

// probe tries the kernel on the daemon itself.
func probe() (features, []string, error) {
	var f features
	if err := ownProc(); err != nil {
		return f, nil, err
	}
	self, err := unix.PidfdOpen(os.Getpid(), 0)
	if err != nil {
		return f, nil, fmt.Errorf("open pidfd (needs Linux 5.3): %w", err)
	}
	defer unix.Close(self)
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return f, nil, fmt.Errorf("make socket pair: %w", err)
	}
	defer unix.Close(pair[0])
	defer unix.Close(pair[1])

	if fd, err := unix.GetsockoptInt(pair[0], unix.SOL_SOCKET, unix.SO_PEERPIDFD); err == nil {
		unix.Close(fd)
		f.peerPidfd = true
	}
	var fs unix.Statfs_t
	if err := unix.Fstatfs(self, &fs); err == nil {
		f.pidfdInode = fs.Type == pidfsMagic
	}
	info := unix.PidfdInfo{Mask: infoMask}
	if err := unix.IoctlPidfdInfo(self, &info); err == nil {
		// The cgroup is not asked of the probe: without cgroups mounted it is absent.
		f.pidfdInfo = info.Mask&unix.PIDFD_INFO_CREDS != 0 && int(info.Tgid) == os.Getpid()
	}
	f.passRights = unix.SetsockoptInt(pair[0], unix.SOL_SOCKET, unix.SO_PASSRIGHTS, 0) == nil

	return f, f.missing(), nil
}

// missing says for the log what stands in for what the kernel lacks.
// SO_PASSRIGHTS is not named: descriptors that arrive are closed in any case.
func (f features) missing() []string {
	var out []string
	if !f.peerPidfd {
		out = append(out, "kernel has no SO_PEERPIDFD (Linux 6.5): peers are pinned by pidfd_open and their start time, and the challenge rules out a reused PID")
	}
	if !f.pidfdInode {
		out = append(out, "kernel does not number pidfds (Linux 6.9): processes are told apart by PID and start time")
	}
	if !f.pidfdInfo {
		out = append(out, "kernel has no PIDFD_GET_INFO (Linux 6.13): credentials are read from /proc/PID/status, and a move between cgroups is seen only when evidence is gathered")
	}
	return out
}

// ownProc makes sure that /proc is a procfs of our own PID namespace: in
// another's, the directory of a PID belongs to somebody else.
func ownProc() error {
	var fs unix.Statfs_t
	if err := unix.Statfs("/proc", &fs); err != nil {
		return fmt.Errorf("stat /proc: %w", err)
	}
	if fs.Type != unix.PROC_SUPER_MAGIC {
		return errors.New("/proc is not a procfs")
	}
	self, err := os.Readlink("/proc/self")
	if err != nil {
		return fmt.Errorf("read /proc/self: %w", err)
	}
	if self != strconv.Itoa(os.Getpid()) {
		return fmt.Errorf("/proc belongs to another PID namespace: it says we are %s, the kernel says %d", self, os.Getpid())
	}
	return nil
}

// ignoringEINTR repeats a call that a signal of the Go runtime interrupted.
func ignoringEINTR[T any](call func() (T, error)) (T, error) {
	for {
		v, err := call()
		if err != unix.EINTR {
			return v, err
		}
	}
}
