package peer

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// partingTime bounds what is spent on telling a peer why it is sent away.
const partingTime = time.Second

// A Conn is a connection of one pinned process. Its Read takes messages from
// that process alone; one from another closes the connection.
type Conn struct {
	socket  *net.UnixConn
	raw     syscall.RawConn // of socket
	process *Process
	program *Program
	creds   Credentials
	partings
	release func() // what Admit gave; called once

	closing sync.Once
	closed  error // of Close, under closing

	readMu   sync.Mutex
	incoming message               // the one being received
	receive  func(fd uintptr) bool // incoming.receive, made once
	rest     []byte                // read during the challenge, for the next Reads
	buffer   *[]byte               // rest is part of; nil or from buffers

	writeMu sync.Mutex
	frames  frameTracker
	parting string      // the reason of GoAway, once leaving
	leaving atomic.Bool // nothing but the GOAWAY is written any more
}

// message is one recvmsg: what is received, and from whom. It is part of the
// Conn, and spelt out, since the library's recvmsg allocates at each call.
type message struct {
	header  unix.Msghdr
	vector  unix.Iovec
	control [controlLen]byte
	n       int
	err     error
}

// ucredLen is the size of struct ucred; controlLen has room for it and for
// nothing else, so that a descriptor that is sent along is never installed.
const (
	ucredLen   = 12
	controlLen = 32 // unix.CmsgSpace(ucredLen) on 64-bit
)

func newConn(socket *net.UnixConn, raw syscall.RawConn, p *Process) *Conn {
	c := &Conn{socket: socket, raw: raw, process: p}
	c.receive = c.incoming.receive
	return c
}

// Process is the process that connected. The Conn holds it until Close.
func (c *Conn) Process() *Process { return c.process }

// Program is what that process ran when it connected.
func (c *Conn) Program() *Program { return c.program }

// Credentials are those that the process had when it connected.
func (c *Conn) Credentials() Credentials { return c.creds }

// Check returns nil while the process lives and runs the program, under the
// credentials, that opened the connection; else ErrGone, ErrProgramChanged or
// ErrCredentialsChanged. It costs a handful of system calls.
func (c *Conn) Check() error {
	if err := c.program.Current(); err != nil {
		return err
	}
	info, err := c.process.Info()
	if err != nil {
		return err
	}
	if info.Credentials != c.creds {
		return ErrCredentialsChanged
	}
	return nil
}

// Read reads what the process sent. Any other sender's message, and one that
// brings descriptors, closes the connection with ErrForeignMessage.
func (c *Conn) Read(b []byte) (int, error) {
	if len(b) == 0 {
		return 0, nil
	}
	c.readMu.Lock()
	defer c.readMu.Unlock()
	if c.rest != nil {
		n := copy(b, c.rest)
		if c.rest = c.rest[n:]; len(c.rest) == 0 {
			c.rest = nil
			putBuffer(c.buffer)
			c.buffer = nil
		}
		return n, nil
	}
	n, err := c.readMessage(b)
	switch {
	case errors.Is(err, ErrForeignMessage):
		c.Close()
	case errors.Is(err, ErrCredentialsChanged):
		// Dropping privileges is legitimate: the client is told to come again, and
		// what it says until it goes is heard by nobody.
		c.GoAway(err.Error())
		for err := error(nil); err == nil; {
			_, err = c.readMessage(b)
			if errors.Is(err, ErrCredentialsChanged) {
				err = nil
			}
		}
		c.Close()
	}
	return n, err
}

// readMessage reads from the socket. The caller has readMu.
func (c *Conn) readMessage(b []byte) (int, error) {
	m := &c.incoming
	m.vector.Base = &b[0]
	m.vector.SetLen(len(b))
	err := c.raw.Read(c.receive)
	m.vector.Base = nil
	switch {
	case err != nil:
		return 0, err
	case m.err != nil:
		return 0, &net.OpError{Op: "read", Net: "unix", Source: c.LocalAddr(), Addr: c.RemoteAddr(), Err: m.err}
	case m.n == 0:
		return 0, io.EOF
	}
	if err := c.sentByPeer(m); err != nil {
		return 0, err
	}
	return m.n, nil
}

// receive is called by the poller whenever there may be something to read.
func (m *message) receive(fd uintptr) bool {
	for {
		m.header = unix.Msghdr{Iov: &m.vector, Control: &m.control[0]}
		m.header.SetIovlen(1)
		m.header.SetControllen(controlLen)
		n, _, errno := unix.Syscall(unix.SYS_RECVMSG, fd, uintptr(unsafe.Pointer(&m.header)), unix.MSG_CMSG_CLOEXEC|unix.MSG_DONTWAIT)
		switch errno {
		case 0:
			m.n, m.err = int(n), nil
			return true
		case unix.EINTR:
		case unix.EAGAIN:
			return false
		default:
			m.n, m.err = 0, errno
			return true
		}
	}
}

// sentByPeer fails closed on whatever is not one ucred of the pinned process.
// A sender may name any of its own real, effective and saved IDs in it; the
// kernel sees to the PID.
func (c *Conn) sentByPeer(m *message) error {
	if m.header.Flags&unix.MSG_CTRUNC != 0 {
		return fmt.Errorf("%w: it brings more than credentials", ErrForeignMessage)
	}
	pid, uid, gid, err := parseUcred(m.control[:m.header.Controllen])
	if err != nil {
		return err
	}
	if pid != c.process.pid {
		return fmt.Errorf("%w: sent by %d over the connection of %d", ErrForeignMessage, pid, c.process.pid)
	}
	if uid != c.creds.UID && uid != c.creds.EUID && uid != c.creds.SUID ||
		gid != c.creds.GID && gid != c.creds.EGID && gid != c.creds.SGID {
		return ErrCredentialsChanged
	}
	return nil
}

// parseUcred reads a control buffer that must hold SCM_CREDENTIALS alone.
func parseUcred(b []byte) (pid int32, uid, gid uint32, err error) {
	if len(b) == 0 {
		return 0, 0, 0, fmt.Errorf("%w: it has no sender", ErrForeignMessage)
	}
	h, data, rest, err := unix.ParseOneSocketControlMessage(b)
	if err != nil || len(rest) != 0 || len(data) != ucredLen ||
		h.Level != unix.SOL_SOCKET || h.Type != unix.SCM_CREDENTIALS {
		return 0, 0, 0, fmt.Errorf("%w: its credentials are not readable", ErrForeignMessage)
	}
	order := binary.NativeEndian
	return int32(order.Uint32(data)), order.Uint32(data[4:]), order.Uint32(data[8:]), nil
}

// Write writes to the process. It is for HTTP/2 frames alone.
func (c *Conn) Write(b []byte) (int, error) {
	c.writeMu.Lock()
	defer c.writeMu.Unlock()
	if c.leaving.Load() {
		return c.writeLast(b)
	}
	n, err := c.socket.Write(b)
	c.frames.advance(b[:n])
	return n, err
}

// writeLast finishes the frame that is under way, for the GOAWAY to follow it.
func (c *Conn) writeLast(b []byte) (int, error) {
	if c.frames.boundary() {
		return 0, net.ErrClosed
	}
	n, err := c.socket.Write(b[:c.ahead(b)])
	c.frames.advance(b[:n])
	if err == nil && c.frames.boundary() {
		c.sayGoAway()
	}
	if err == nil && n < len(b) {
		err = net.ErrClosed
	}
	return n, err
}

// ahead is how much of b belongs to the frame that is under way.
func (c *Conn) ahead(b []byte) int {
	f := c.frames
	return f.toBoundary(b)
}

// GoAway tells the client to open another connection (GOAWAY with the reason
// as debug data, where the stream of frames allows it) and closes this one.
// It does not wait for the client.
func (c *Conn) GoAway(reason string) {
	if c.leaving.Load() {
		return
	}
	// Also for a Write that waits for the client to read: it holds writeMu.
	c.socket.SetWriteDeadline(time.Now().Add(partingTime))
	go func() {
		c.writeMu.Lock()
		defer c.writeMu.Unlock()
		if c.leaving.Swap(true) {
			return
		}
		c.parting = reason
		if c.frames.boundary() {
			c.sayGoAway()
			return
		}
		time.AfterFunc(partingTime, func() { c.Close() }) // if the rest of the frame never comes
	}()
}

// sayGoAway writes the GOAWAY and leaves. The caller has writeMu.
func (c *Conn) sayGoAway() {
	c.socket.Write(appendGoAway(make([]byte, 0, maxGoAwaySize), codeNone, c.parting))
	c.part()
}

// part ends our side of the connection, waits elsewhere for the client to end
// its own, and closes. A client that still writes while we close would meet an
// error before it read the reason.
func (c *Conn) part() {
	c.partings.see(c.socket, nil, func() { c.Close() })
}

// Close closes the connection and gives up the hold on the process.
func (c *Conn) Close() error {
	c.closing.Do(func() {
		c.leaving.Store(true)
		c.closed = c.socket.Close()
		if err := c.process.Close(); err != nil {
			c.closed = errors.Join(c.closed, err)
		}
		if c.release != nil {
			c.release()
		}
	})
	return c.closed
}

// LocalAddr is the address of the socket.
func (c *Conn) LocalAddr() net.Addr { return c.socket.LocalAddr() }

// RemoteAddr is the address that the client bound its end to, usually empty.
func (c *Conn) RemoteAddr() net.Addr { return c.socket.RemoteAddr() }

// SetDeadline sets the time after which Read and Write fail.
func (c *Conn) SetDeadline(t time.Time) error {
	return errors.Join(c.SetReadDeadline(t), c.SetWriteDeadline(t))
}

// SetReadDeadline sets the time after which Read fails.
func (c *Conn) SetReadDeadline(t time.Time) error { return c.socket.SetReadDeadline(t) }

// SetWriteDeadline sets the time after which Write fails.
func (c *Conn) SetWriteDeadline(t time.Time) error {
	if c.leaving.Load() {
		return nil // GoAway has set its own
	}
	return c.socket.SetWriteDeadline(t)
}

// partings bounds how many clients are waited for at a time after they were
// told why they are sent away. The rest may miss the reason.
type partings chan struct{}

const maxPartings = 64

// see, in a goroutine, sends the last words, ends our side of the socket,
// discards what the client still sends until it ends its own or partingTime is
// over, and calls done.
func (p partings) see(socket *net.UnixConn, last []byte, done func()) {
	select {
	case p <- struct{}{}:
	default:
		done()
		return
	}
	go func() {
		defer func() { <-p }()
		socket.SetDeadline(time.Now().Add(partingTime))
		if len(last) > 0 {
			socket.Write(last)
		}
		socket.CloseWrite()
		io.Copy(io.Discard, onlyReader{socket})
		done()
	}()
}

// onlyReader hides splice from io.Copy.
type onlyReader struct{ io.Reader }
