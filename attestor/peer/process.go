package peer

import (
	"container/list"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// What a caller may branch on.
var (
	// ErrGone says that the process has exited.
	ErrGone = errors.New("process is gone")
	// ErrNoPID says that the peer has no PID here: it lives outside the PID
	// namespace of the daemon, which must run with the host's.
	ErrNoPID = errors.New("peer is outside this PID namespace; run deputy with the PID namespace of the host")
	// ErrProgramChanged says that the process executed another program since.
	ErrProgramChanged = errors.New("process executed another program")
	// ErrCredentialsChanged says that the process changed its UID or GID since.
	ErrCredentialsChanged = errors.New("process changed its credentials")
	// ErrForeignMessage says that a message came from another process, or from nobody.
	ErrForeignMessage = errors.New("message from another process")
)

// Credentials are the IDs of a process, from the kernel. Values compare with ==.
type Credentials struct {
	UID, EUID, SUID, FSUID uint32
	GID, EGID, SGID, FSGID uint32
}

// Info is what one look at a process gives: what can change while it lives,
// but for its program. Values compare with ==.
type Info struct {
	Credentials
	PPID     int32  // in the PID namespace of the daemon, 0 when the parent is outside it
	CgroupID uint64 // of the v2 hierarchy; 0 where the kernel (before 6.13) does not tell
}

// A Process is a process that was pinned: whatever is read through it is of
// this one process or fails, however PIDs are reused. It is shared between its
// connections and safe for concurrent use.
type Process struct {
	table *Table
	id    uint64
	pid   int32
	start uint64
	done  chan struct{}

	// Of the table, under its lock.
	holds     int
	exited    bool
	idle      *list.Element // in table.idle, nil while held
	idleSince time.Time

	once sync.Once // closes done

	// mu guards the descriptors against being closed while in use: a number
	// that the kernel gives to another file meanwhile would be read as ours.
	mu       sync.RWMutex
	pidfd    int
	dir      int // O_PATH, /proc/PID
	released bool

	programMu sync.Mutex
	program   *Program // the last one seen, nil before the first
}

// newProcess opens the /proc directory of the process that pidfd, which it
// takes over, refers to under the number pid.
func newProcess(t *Table, pidfd int, pid int32) (*Process, error) {
	dir, err := ignoringEINTR(func() (int, error) {
		return unix.Open(fmt.Sprintf("/proc/%d", pid), unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	})
	if err != nil {
		unix.Close(pidfd)
		if errors.Is(err, unix.ENOENT) {
			err = ErrGone
		}
		return nil, fmt.Errorf("open /proc/%d: %w", pid, err)
	}
	p := &Process{table: t, pid: pid, pidfd: pidfd, dir: dir, done: make(chan struct{})}
	// A PID is free for the next only after its owner was reaped. The process of
	// the pidfd is alive now, so the directory, opened before, is its own.
	if err = p.Alive(); err == nil {
		err = p.readStart()
	}
	if err != nil {
		p.release()
		return nil, err
	}
	return p, nil
}

func (p *Process) readStart() error {
	b, err := p.ReadFile("stat")
	if err != nil {
		return err
	}
	st, err := parseStat(b)
	if err != nil {
		return fmt.Errorf("read stat of %d: %w", p.pid, err)
	}
	if st.state == 'Z' || st.state == 'X' {
		// Its threads live on, but there is no program behind it that could be named.
		return fmt.Errorf("main thread of %d has exited: %w", p.pid, ErrGone)
	}
	p.start = st.start
	return nil
}

// ID names the process for the life of the system: no other process ever has
// the same one. It is the inode of its pidfd (Linux 6.9 and later), before
// that a number of the Table's own.
func (p *Process) ID() uint64 { return p.id }

// PID is the number of the process in the PID namespace of the daemon. Nothing
// may be looked up by it.
func (p *Process) PID() int32 { return p.pid }

// StartTime is field 22 of /proc/PID/stat, in clock ticks since boot.
func (p *Process) StartTime() uint64 { return p.start }

// Done is closed when the process has exited, or when nobody holds it any
// more and the Table has let go of it. For a holder it is the former.
func (p *Process) Done() <-chan struct{} { return p.done }

// Alive returns ErrGone once the process has exited. Zombies have exited.
func (p *Process) Alive() error {
	select {
	case <-p.done:
		return ErrGone
	default:
	}
	return p.use(func() error {
		fds := [1]unix.PollFd{{Fd: int32(p.pidfd), Events: unix.POLLIN}}
		n, err := ignoringEINTR(func() (int, error) { return unix.Poll(fds[:], 0) })
		switch {
		case err != nil:
			return fmt.Errorf("poll pidfd of %d: %w", p.pid, err)
		case n != 0:
			return ErrGone
		}
		return nil
	})
}

// Info looks at the process: one system call from Linux 6.13 on.
func (p *Process) Info() (Info, error) {
	if !p.table.kernel.pidfdInfo {
		return p.status()
	}
	raw := unix.PidfdInfo{Mask: infoMask}
	err := p.use(func() error { return unix.IoctlPidfdInfo(p.pidfd, &raw) })
	switch {
	case errors.Is(err, unix.ESRCH), errors.Is(err, ErrGone):
		return Info{}, ErrGone
	case err != nil:
		return Info{}, fmt.Errorf("ask for info of %d: %w", p.pid, err)
	case raw.Mask&unix.PIDFD_INFO_CREDS == 0:
		return Info{}, ErrGone // reaped: only the exit status is left
	}
	info := Info{
		Credentials: Credentials{
			UID: raw.Ruid, EUID: raw.Euid, SUID: raw.Suid, FSUID: raw.Fsuid,
			GID: raw.Rgid, EGID: raw.Egid, SGID: raw.Sgid, FSGID: raw.Fsgid,
		},
		PPID: int32(raw.Ppid),
	}
	if raw.Mask&unix.PIDFD_INFO_CGROUPID != 0 {
		info.CgroupID = raw.Cgroupid
	}
	return info, nil
}

// status is Info for kernels before 6.13.
func (p *Process) status() (Info, error) {
	b, err := p.ReadFile("status")
	if err != nil {
		return Info{}, err
	}
	info, err := parseStatus(b)
	if err != nil {
		return Info{}, fmt.Errorf("read status of %d: %w", p.pid, err)
	}
	return info, nil
}

// Pidfd lends f the pidfd. It is valid until f returns.
func (p *Process) Pidfd(f func(fd int) error) error {
	return p.use(func() error { return f(p.pidfd) })
}

// use runs f while the descriptors are open.
func (p *Process) use(f func() error) error {
	p.mu.RLock()
	defer p.mu.RUnlock()
	if p.released {
		return ErrGone
	}
	return f()
}

// maxFile bounds what ReadFile takes. The kernel's files about one process are
// a few KiB; those that a workload can grow are not for reading in one piece.
const maxFile = 1 << 20

// ReadFile reads a file below the process's /proc directory ("cgroup",
// "task/17/status") through the handle that is held open.
func (p *Process) ReadFile(name string) ([]byte, error) {
	fd, err := p.openat(name)
	if err != nil {
		return nil, err
	}
	defer unix.Close(fd)
	buf := make([]byte, 0, 4096)
	for {
		n, err := ignoringEINTR(func() (int, error) { return unix.Read(fd, buf[len(buf):cap(buf)]) })
		if err != nil {
			return nil, p.fail("read", name, err)
		}
		if n == 0 {
			return buf, nil
		}
		buf = buf[:len(buf)+n]
		if len(buf) == cap(buf) {
			if len(buf) >= maxFile {
				return nil, fmt.Errorf("read %s of %d: longer than %d bytes", name, p.pid, maxFile)
			}
			buf = append(buf, make([]byte, len(buf))...)[:len(buf)]
		}
	}
}

// Open opens a file below the process's /proc directory for reading. Magic
// links such as "exe" are followed.
func (p *Process) Open(name string) (*os.File, error) {
	fd, err := p.openat(name)
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(fd), fmt.Sprintf("/proc/%d/%s", p.pid, name)), nil
}

// openat opens a file below the directory. It does not wait for the writer of a FIFO.
func (p *Process) openat(name string) (int, error) {
	return p.at("open", name, func() (int, error) {
		return unix.Openat(p.dir, name, unix.O_RDONLY|unix.O_CLOEXEC|unix.O_NOCTTY|unix.O_NONBLOCK, 0)
	})
}

// at makes a system call that takes a name below the directory.
func (p *Process) at(act, name string, call func() (int, error)) (int, error) {
	if !filepath.IsLocal(name) {
		return -1, fmt.Errorf("%s %q of %d: not below the process's directory", act, name, p.pid)
	}
	n := -1
	err := p.use(func() (err error) {
		n, err = ignoringEINTR(call)
		return err
	})
	if err != nil {
		return -1, p.fail(act, name, err)
	}
	return n, nil
}

// fail words an error of the directory. What is missing there because the
// process ended is ErrGone.
func (p *Process) fail(act, name string, err error) error {
	if (errors.Is(err, unix.ESRCH) || errors.Is(err, unix.ENOENT)) && p.Alive() != nil {
		err = ErrGone
	}
	return fmt.Errorf("%s %s of %d: %w", act, name, p.pid, err)
}

// Readlink reads a link below the process's /proc directory ("exe", "ns/user").
func (p *Process) Readlink(name string) (string, error) {
	buf := make([]byte, unix.PathMax)
	n, err := p.at("read link", name, func() (int, error) { return unix.Readlinkat(p.dir, name, buf) })
	if err != nil {
		return "", err
	}
	if n == len(buf) {
		return "", fmt.Errorf("read link %s of %d: longer than %d bytes", name, p.pid, len(buf)-1)
	}
	return string(buf[:n]), nil
}

// ReadDir lists a directory below the process's /proc directory ("task"), unsorted.
func (p *Process) ReadDir(name string) ([]fs.DirEntry, error) {
	f, err := p.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	entries, err := f.ReadDir(-1)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, p.fail("list", name, err)
	}
	return entries, nil
}

// Namespace names a namespace of the process: the device and inode behind
// /proc/PID/ns/<kind>. Two processes are in the same one if the values are equal.
func (p *Process) Namespace(kind string) (FileID, error) {
	return p.fileID("ns/" + kind)
}

// fileID names the file behind a link of the directory. It does not ask a
// remote or FUSE server, which could let us wait.
func (p *Process) fileID(name string) (FileID, error) {
	var st unix.Statx_t
	_, err := p.at("stat", name, func() (int, error) {
		return 0, unix.Statx(p.dir, name, unix.AT_NO_AUTOMOUNT|unix.AT_STATX_DONT_SYNC, unix.STATX_INO, &st)
	})
	if err != nil {
		return FileID{}, err
	}
	return FileID{Dev: unix.Mkdev(st.Dev_major, st.Dev_minor), Ino: st.Ino}, nil
}

// ForeignUserNamespace reports whether the process is in another user
// namespace than the daemon: whoever owns that can forge the credentials in
// its messages, trace what is in it and replace its libraries.
func (p *Process) ForeignUserNamespace() (bool, error) {
	id, err := p.Namespace("user")
	if err != nil {
		return true, err
	}
	return id != p.table.userNS, nil
}

// Hold adds a holder; each holder closes the Process once.
func (p *Process) Hold() *Process {
	p.table.hold(p)
	return p
}

// Close gives up one hold.
func (p *Process) Close() error { return p.table.drop(p) }

// finish closes Done.
func (p *Process) finish() { p.once.Do(func() { close(p.done) }) }

// release closes the descriptors. The process is in no table any more.
func (p *Process) release() {
	p.finish()
	p.mu.Lock()
	if !p.released {
		p.released = true
		unix.Close(p.pidfd)
		unix.Close(p.dir)
	}
	p.mu.Unlock()

	p.programMu.Lock()
	defer p.programMu.Unlock()
	if p.program != nil {
		p.program.forget()
	}
}
