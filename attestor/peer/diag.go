package peer

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// leadsHere reports whether a socket among the peer's descriptors is a
// connection to this daemon; link is what /proc says of it. A copy of the
// descriptor tells it in any network namespace; where we may not take one (an
// ordinary user under Yama), the kernel's socket table tells whether it is the
// other end of this connection.
func (c *Conn) leadsHere(fd int, link string) (bool, error) {
	ours, err := c.process.connectedTo(fd, c.LocalAddr().String())
	if err == nil || errors.Is(err, ErrGone) {
		return ours, err
	}
	peer, diagErr := c.peerInode()
	if diagErr != nil {
		return true, errors.Join(err, diagErr)
	}
	return link == fmt.Sprintf("socket:[%d]", peer), nil
}

// connectedTo takes a copy of a descriptor of the process and asks whether we
// listened, at this address, at its other end.
func (p *Process) connectedTo(fd int, addr string) (bool, error) {
	var ours bool
	err := p.use(func() error {
		dup, err := unix.PidfdGetfd(p.pidfd, fd, 0)
		if errors.Is(err, unix.EBADF) {
			return nil // closed since
		}
		if err != nil {
			return fmt.Errorf("copy descriptor: %w", err)
		}
		defer unix.Close(dup)
		cred, err := unix.GetsockoptUcred(dup, unix.SOL_SOCKET, unix.SO_PEERCRED)
		if err != nil || int(cred.Pid) != os.Getpid() {
			return nil // of another family, or another's
		}
		peer, err := unix.Getpeername(dup)
		if errors.Is(err, unix.ENOTCONN) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("ask for peer's address: %w", err)
		}
		name, ok := peer.(*unix.SockaddrUnix)
		ours = ok && name.Name == addr
		return nil
	})
	return ours, err
}

// The unix_diag protocol, linux/unix_diag.h.
const (
	sockDiagByFamily = 20
	udiagShowPeer    = 0x4
	unixDiagPeer     = 2
	diagRequestLen   = unix.NLMSG_HDRLEN + 24
	diagReplyLen     = 16
)

// peerInode asks the kernel for the inode of the client's end.
func (c *Conn) peerInode() (uint32, error) {
	var st unix.Stat_t
	var err error
	if ctl := c.raw.Control(func(fd uintptr) { err = unix.Fstat(int(fd), &st) }); ctl != nil || err != nil {
		return 0, errors.Join(ctl, err)
	}
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_SOCK_DIAG)
	if err != nil {
		return 0, fmt.Errorf("open socket table: %w", err)
	}
	defer unix.Close(fd)
	if err := unix.Sendto(fd, diagRequest(uint32(st.Ino)), 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return 0, fmt.Errorf("ask socket table: %w", err)
	}
	buf := make([]byte, 4096)
	n, _, err := unix.Recvfrom(fd, buf, unix.MSG_DONTWAIT) // the kernel answered within Sendto
	if err != nil {
		return 0, fmt.Errorf("read socket table: %w", err)
	}
	return parseDiagReply(buf[:n])
}

// diagRequest asks for the peer of the Unix socket with this inode.
func diagRequest(inode uint32) []byte {
	order := binary.NativeEndian
	b := make([]byte, diagRequestLen)
	order.PutUint32(b[0:], diagRequestLen)
	order.PutUint16(b[4:], sockDiagByFamily)
	order.PutUint16(b[6:], unix.NLM_F_REQUEST)
	q := b[unix.NLMSG_HDRLEN:]
	q[0] = unix.AF_UNIX
	order.PutUint32(q[4:], ^uint32(0)) // states: all
	order.PutUint32(q[8:], inode)
	order.PutUint32(q[12:], udiagShowPeer)
	order.PutUint32(q[16:], ^uint32(0)) // cookie: none
	order.PutUint32(q[20:], ^uint32(0))
	return b
}

var errDiag = errors.New("socket table does not know the connection")

// parseDiagReply finds the peer's inode in the answer.
func parseDiagReply(b []byte) (uint32, error) {
	order := binary.NativeEndian
	if len(b) < unix.NLMSG_HDRLEN+diagReplyLen || order.Uint16(b[4:]) != sockDiagByFamily {
		return 0, errDiag
	}
	b = b[unix.NLMSG_HDRLEN+diagReplyLen:]
	for len(b) >= unix.SizeofRtAttr {
		length := int(order.Uint16(b))
		if length < unix.SizeofRtAttr || length > len(b) {
			return 0, errDiag
		}
		if order.Uint16(b[2:]) == unixDiagPeer && length == unix.SizeofRtAttr+4 {
			return order.Uint32(b[unix.SizeofRtAttr:]), nil
		}
		b = b[min(len(b), (length+3)&^3):]
	}
	return 0, errDiag
}
