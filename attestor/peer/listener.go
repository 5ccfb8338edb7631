package peer

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"sync"
	"syscall"
	"time"

	"github.com/hashicorp/go-hclog"
	"golang.org/x/sys/unix"
	"golang.org/x/time/rate"
)

// maxPath is what sockaddr_un has room for, the closing zero taken off.
const maxPath = 107

// A Listener accepts connections on a Unix socket and pins the process behind each.
type Listener struct {
	socket   *net.UnixListener
	table    *Table
	admit    func(uid uint32) (release func(), err error)
	log      hclog.Logger
	loud     *rate.Limiter // of lines about refused peers
	path     string
	file     FileID // the socket file
	partings partings
	closing  sync.Once
	closed   chan struct{}
}

// Options of a Listener.
type Options struct {
	Mode  os.FileMode // of the socket file
	Group int         // GID of the socket file, -1 for the daemon's
	// Admit is asked, in Accept, whether a connection more of a UID is
	// accepted; an error refuses it with that reason. Release is called once,
	// when the connection ends. It must not block. Nil accepts all.
	Admit func(uid uint32) (release func(), err error)
	// Log hears of refused peers and of accepting that fails for a while. Nil
	// is silence.
	Log hclog.Logger
}

// Listen binds the socket. A stale socket file is replaced; a live one, a file
// that is no socket, and a path longer than 107 bytes are errors.
func Listen(path string, table *Table, o Options) (*Listener, error) {
	switch {
	case path == "" || path[0] == '@':
		return nil, fmt.Errorf("listen on %q: not the path of a file", path)
	case len(path) > maxPath:
		return nil, fmt.Errorf("listen on %s: path is %d bytes long, a socket's may have %d", path, len(path), maxPath)
	}
	if o.Log == nil {
		o.Log = hclog.NewNullLogger()
	}
	fd, file, err := bind(path, table.kernel, o)
	if err != nil {
		return nil, fmt.Errorf("listen on %s: %w", path, err)
	}
	f := os.NewFile(uintptr(fd), path)
	defer f.Close() // FileListener has its own copy
	l, err := net.FileListener(f)
	if err != nil {
		os.Remove(path)
		return nil, fmt.Errorf("listen on %s: %w", path, err)
	}
	return &Listener{
		socket:   l.(*net.UnixListener),
		table:    table,
		admit:    o.Admit,
		log:      o.Log,
		loud:     rate.NewLimiter(1, 10),
		path:     path,
		file:     file,
		partings: make(partings, maxPartings),
		closed:   make(chan struct{}),
	}, nil
}

// bind returns the listening socket and names its file.
func bind(path string, kernel features, o Options) (int, FileID, error) {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return -1, FileID{}, err
	}
	file, err := bindTo(fd, path, kernel, o)
	if err != nil {
		unix.Close(fd)
		return -1, FileID{}, err
	}
	return fd, file, nil
}

func bindTo(fd int, path string, kernel features, o Options) (FileID, error) {
	// Accepted sockets inherit it. Set on them instead, it would come too late
	// for what is queued already, which then has no credentials for ever.
	if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_PASSCRED, 1); err != nil {
		return FileID{}, fmt.Errorf("set SO_PASSCRED: %w", err)
	}
	if kernel.passRights {
		if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_PASSRIGHTS, 0); err != nil {
			return FileID{}, fmt.Errorf("clear SO_PASSRIGHTS: %w", err)
		}
	}
	addr := &unix.SockaddrUnix{Name: path}
	err := unix.Bind(fd, addr)
	if errors.Is(err, unix.EADDRINUSE) {
		if err := removeStale(path); err != nil {
			return FileID{}, err
		}
		err = unix.Bind(fd, addr)
	}
	if err != nil {
		return FileID{}, fmt.Errorf("bind: %w", err)
	}
	file, err := expose(fd, path, o)
	if err != nil {
		os.Remove(path)
		return FileID{}, err
	}
	return file, nil
}

// expose gives the file its owner and mode, whatever the umask, before anybody
// can connect: that takes listen.
func expose(fd int, path string, o Options) (FileID, error) {
	if err := os.Lchown(path, -1, o.Group); err != nil {
		return FileID{}, err
	}
	if err := os.Chmod(path, o.Mode); err != nil {
		return FileID{}, err
	}
	file, err := statSocket(path)
	if err != nil {
		return FileID{}, err
	}
	if err := unix.Listen(fd, unix.SOMAXCONN); err != nil {
		return FileID{}, fmt.Errorf("listen: %w", err)
	}
	return file, nil
}

// removeStale removes a socket that nobody listens on.
func removeStale(path string) error {
	if _, err := statSocket(path); err != nil {
		return err
	}
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	err = unix.Connect(fd, &unix.SockaddrUnix{Name: path})
	switch {
	case err == nil, errors.Is(err, unix.EAGAIN): // EAGAIN: its backlog is full
		return errors.New("another process listens on it")
	case errors.Is(err, unix.ECONNREFUSED):
	default:
		return fmt.Errorf("find out whether the socket is in use: %w", err)
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove stale socket: %w", err)
	}
	return nil
}

func statSocket(path string) (FileID, error) {
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil {
		return FileID{}, fmt.Errorf("stat: %w", err)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFSOCK {
		return FileID{}, errors.New("a file is there that is not a socket")
	}
	return FileID{Dev: st.Dev, Ino: st.Ino}, nil
}

// Accept returns the next connection, as a *Conn. It only pins and counts: a
// peer that is refused is told why (SETTINGS and GOAWAY), in a goroutine of
// its own, and does not come out here.
func (l *Listener) Accept() (net.Conn, error) {
	const shortest, longest = 5 * time.Millisecond, time.Second
	wait := shortest
	for {
		socket, err := l.socket.AcceptUnix()
		if err == nil {
			wait = shortest
			if c := l.receive(socket); c != nil {
				return c, nil
			}
			continue
		}
		if !passes(err) {
			return nil, err
		}
		l.log.Warn("accepting connections fails for now", "error", err, "retry_in", wait)
		timer := time.NewTimer(wait)
		select {
		case <-timer.C:
		case <-l.closed:
			timer.Stop()
			return nil, net.ErrClosed
		}
		wait = min(2*wait, longest)
	}
}

// passes reports whether accept fails for want of something that others give
// back.
func passes(err error) bool {
	for _, e := range []error{unix.EMFILE, unix.ENFILE, unix.ENOBUFS, unix.ENOMEM, unix.ECONNABORTED, unix.EPERM, unix.EPROTO} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}

// receive pins the peer of a new connection, or refuses it.
func (l *Listener) receive(socket *net.UnixConn) *Conn {
	c, code, err := l.pin(socket)
	if err == nil {
		return c
	}
	l.logRefusal(socket, err)
	hello := appendHeader(make([]byte, 0, headerLen+maxGoAwaySize), frameHeader{typ: frameSettings})
	l.partings.see(socket, appendGoAway(hello, code, err.Error()), func() { socket.Close() })
	return nil
}

// logRefusal writes one line, rarely enough that a client that tries in a loop
// does not fill the log.
func (l *Listener) logRefusal(socket *net.UnixConn, reason error) {
	if !l.loud.Allow() {
		return
	}
	var pid, uid any = "unknown", "unknown"
	if raw, err := socket.SyscallConn(); err == nil {
		if cred, err := peerCred(raw); err == nil {
			pid, uid = cred.Pid, cred.Uid
		}
	}
	l.log.Info("connection refused", "pid", pid, "uid", uid, "reason", reason)
}

// pin finds out who is at the other end. The code is for the GOAWAY.
func (l *Listener) pin(socket *net.UnixConn) (*Conn, uint32, error) {
	raw, err := socket.SyscallConn()
	if err != nil {
		return nil, codeNone, err
	}
	cred, err := peerCred(raw)
	if err != nil {
		return nil, codeNone, err
	}
	if cred.Pid <= 0 {
		return nil, codeNone, ErrNoPID
	}
	var release func()
	if l.admit != nil {
		if release, err = l.admit(cred.Uid); err != nil {
			return nil, codeEnhance, err
		}
	}
	c, err := l.identify(socket, raw, cred)
	if err != nil {
		if release != nil {
			release()
		}
		return nil, codeNone, err
	}
	c.release = release
	c.partings = l.partings
	return c, codeNone, nil
}

func (l *Listener) identify(socket *net.UnixConn, raw syscall.RawConn, cred *unix.Ucred) (*Conn, error) {
	pidfd, err := peerPidfd(raw, cred.Pid, l.table.kernel)
	if err != nil {
		return nil, err
	}
	p, err := l.table.intern(pidfd, cred.Pid)
	if err != nil {
		return nil, err
	}
	c := newConn(socket, raw, p)
	if err := c.record(cred); err != nil {
		p.Close()
		return nil, err
	}
	return c, nil
}

// record notes program and credentials of the process as they are now. The
// thread that connected must have had the same: credentials belong to
// threads, and it is the process that is attested.
func (c *Conn) record(cred *unix.Ucred) error {
	program, err := c.process.Program()
	if err != nil {
		return err
	}
	info, err := c.process.Info()
	if err != nil {
		return err
	}
	if info.EUID != cred.Uid || info.EGID != cred.Gid {
		return fmt.Errorf("connected as %d:%d, runs as %d:%d: %w", cred.Uid, cred.Gid, info.EUID, info.EGID, ErrCredentialsChanged)
	}
	c.program, c.creds = program, info.Credentials
	return nil
}

func peerCred(raw syscall.RawConn) (cred *unix.Ucred, err error) {
	if ctl := raw.Control(func(fd uintptr) {
		cred, err = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	}); ctl != nil {
		return nil, ctl
	}
	if err != nil {
		return nil, fmt.Errorf("ask for the peer's credentials: %w", err)
	}
	return cred, nil
}

// peerPidfd returns a pidfd of the process that connected, or, from a kernel
// before 6.5, of the one that has its PID now. That may be another, if it
// exited and its PID was given again since; but then its answer to the
// challenge would have to come over a connection that it does not have.
func peerPidfd(raw syscall.RawConn, pid int32, kernel features) (fd int, err error) {
	if !kernel.peerPidfd {
		fd, err = unix.PidfdOpen(int(pid), 0)
	} else if ctl := raw.Control(func(socket uintptr) {
		fd, err = unix.GetsockoptInt(int(socket), unix.SOL_SOCKET, unix.SO_PEERPIDFD)
	}); ctl != nil {
		return -1, ctl
	}
	switch {
	case errors.Is(err, unix.ESRCH), errors.Is(err, unix.EINVAL), errors.Is(err, unix.ENODATA):
		return -1, ErrGone
	case err != nil:
		return -1, fmt.Errorf("open pidfd of peer %d: %w", pid, err)
	}
	return fd, nil
}

// Close stops accepting and removes the socket file if it is still this listener's.
func (l *Listener) Close() error {
	var err error
	l.closing.Do(func() {
		close(l.closed)
		if file, statErr := statSocket(l.path); statErr == nil && file == l.file {
			err = os.Remove(l.path)
		}
		err = errors.Join(err, l.socket.Close())
	})
	return err
}

// Addr is the address of the socket.
func (l *Listener) Addr() net.Addr { return l.socket.Addr() }
