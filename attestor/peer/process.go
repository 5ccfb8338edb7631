package peer

import (
	"errors"
	"io/fs"
	"os"
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
type Process struct{}

// ID names the process for the life of the system: no other process ever has
// the same one. It is the inode of its pidfd (Linux 6.9 and later), before
// that a number of the Table's own.
func (p *Process) ID() uint64 { panic("unbuilt") }

// PID is the number of the process in the PID namespace of the daemon. Nothing
// may be looked up by it.
func (p *Process) PID() int32 { panic("unbuilt") }

// StartTime is field 22 of /proc/PID/stat, in clock ticks since boot.
func (p *Process) StartTime() uint64 { panic("unbuilt") }

// Done is closed when the process has exited, or when nobody holds it any
// more and the Table has let go of it. For a holder it is the former.
func (p *Process) Done() <-chan struct{} { panic("unbuilt") }

// Alive returns ErrGone once the process has exited. Zombies have exited.
func (p *Process) Alive() error { panic("unbuilt") }

// Info looks at the process: one system call from Linux 6.13 on.
func (p *Process) Info() (Info, error) { panic("unbuilt") }

// Pidfd lends f the pidfd. It is valid until f returns.
func (p *Process) Pidfd(f func(fd int) error) error { panic("unbuilt") }

// ReadFile reads a file below the process's /proc directory ("cgroup",
// "task/17/status") through the handle that is held open.
func (p *Process) ReadFile(name string) ([]byte, error) { panic("unbuilt") }

// Open opens a file below the process's /proc directory for reading. Magic
// links such as "exe" are followed.
func (p *Process) Open(name string) (*os.File, error) { panic("unbuilt") }

// Readlink reads a link below the process's /proc directory ("exe", "ns/user").
func (p *Process) Readlink(name string) (string, error) { panic("unbuilt") }

// ReadDir lists a directory below the process's /proc directory ("task"), unsorted.
func (p *Process) ReadDir(name string) ([]fs.DirEntry, error) { panic("unbuilt") }

// Namespace names a namespace of the process: the device and inode behind
// /proc/PID/ns/<kind>. Two processes are in the same one if the values are equal.
func (p *Process) Namespace(kind string) (FileID, error) { panic("unbuilt") }

// ForeignUserNamespace reports whether the process is in another user
// namespace than the daemon: whoever owns that can forge the credentials in
// its messages, trace what is in it and replace its libraries.
func (p *Process) ForeignUserNamespace() (bool, error) { panic("unbuilt") }

// Program returns the program that the process runs now.
func (p *Process) Program() (*Program, error) { panic("unbuilt") }

// Hold adds a holder; each holder closes the Process once.
func (p *Process) Hold() *Process { panic("unbuilt") }

// Close gives up one hold.
func (p *Process) Close() error { panic("unbuilt") }

// FileID names a file: device and inode.
type FileID struct{ Dev, Ino uint64 }

// A Program is one run of an executable by a process, from one execve to the
// next. Executing the same file again is another Program.
type Program struct{}

// Executable names the file that is run.
func (g *Program) Executable() FileID { panic("unbuilt") }

// Current returns nil while the process still runs this program,
// ErrProgramChanged after it executed another one, ErrGone after its exit.
func (g *Program) Current() error { panic("unbuilt") }
