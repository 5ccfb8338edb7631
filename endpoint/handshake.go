package endpoint

import (
	"context"
	"errors"
	"fmt"
	"net"
	"sync"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/credentials"
	grpcpeer "google.golang.org/grpc/peer"

	"github.com/deputy-id/deputy/attestor/peer"
)

// challengeTime is how long a client has to show that it speaks HTTP/2.
const challengeTime = 5 * time.Second

// A link is one connection as the handlers see it: its process, the session
// that all connections of the process share, and its place in the budget.
type link struct {
	*peer.Conn
	session *session
	uid     uint32 // effective, when the connection was accepted
	seat    *seat
	refused error // on the admin socket: why this peer may not use it
	left    sync.Once
}

// AuthType makes a link the credentials.AuthInfo of its connection.
func (l *link) AuthType() string { return "pidfd" }

// Close closes the connection and leaves the session.
func (l *link) Close() error {
	l.leave()
	return l.Conn.Close()
}

func (l *link) leave() {
	l.left.Do(func() {
		l.session.leave(l)
		l.seat.leave()
	})
}

func linkOf(ctx context.Context) *link {
	p, ok := grpcpeer.FromContext(ctx)
	if !ok {
		return nil
	}
	l, _ := p.AuthInfo.(*link)
	return l
}

// handshaker is the transport credentials of a socket: nothing is encrypted,
// and the peer is known from the kernel instead of from what it says.
type handshaker struct {
	s       *Server
	accept  func(*link) error
	counted bool // against the budget of connections: not those of administrators, who come to mend what used it up
}

var errServerOnly = errors.New("credentials are for servers")

func (h *handshaker) ClientHandshake(context.Context, string, net.Conn) (net.Conn, credentials.AuthInfo, error) {
	return nil, nil, errServerOnly
}

// ServerHandshake runs in a goroutine of the connection and may wait.
func (h *handshaker) ServerHandshake(raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	c, ok := raw.(*peer.Conn)
	if !ok {
		return nil, nil, fmt.Errorf("connection is a %T, not pinned", raw)
	}
	uid := c.Credentials().EUID
	l := &link{Conn: c, uid: uid, seat: h.s.budget.seat(uid)}
	l.session = h.s.join(l)
	if err := h.greet(l); err != nil {
		l.leave()
		h.s.logDenial(l, "connect", err)
		// The peer is told why, and the Conn closes when it has read that: gRPC
		// must not close it before.
		return nil, nil, credentials.ErrConnDispatched
	}
	return l, l, nil
}

// greet finds the connection a place in the budget and challenges it. After
// an error the peer has been told.
func (h *handshaker) greet(l *link) error {
	if h.counted {
		if err := l.seat.move(l.session.place()); err != nil {
			l.turnAway(err)
			return err
		}
	}
	turn := l.seat.account().challenge
	serving, stop := h.s.serving()
	defer stop()
	if err := enter(serving, turn); err != nil {
		l.turnAway(err)
		return err
	}
	defer func() { <-turn }()
	ctx, cancel := context.WithTimeout(serving, challengeTime)
	defer cancel()
	if err := l.Challenge(ctx); err != nil {
		return err
	}
	return h.accept(l)
}

// serving returns a context that ends when the server stops: gRPC waits for
// handshakes then.
func (s *Server) serving() (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancel(context.Background())
	go func() {
		select {
		case <-s.stopping:
			cancel()
		case <-ctx.Done():
		}
	}()
	return ctx, cancel
}

// settings is an empty SETTINGS frame, the first that a client expects
// (RFC 9113 §3.4).
var settings = []byte{0, 0, 0, 4, 0, 0, 0, 0, 0}

// turnAway ends a connection that was not challenged yet, with the reason.
func (l *link) turnAway(err error) {
	l.Write(settings)
	l.GoAway(err.Error())
}

func (h *handshaker) Info() credentials.ProtocolInfo {
	return credentials.ProtocolInfo{SecurityProtocol: "pidfd"}
}

func (h *handshaker) Clone() credentials.TransportCredentials { return h }

func (h *handshaker) OverrideServerName(string) error { return errServerOnly }

func acceptAny(*link) error { return nil }

// ownNamespace names a namespace of the daemon as peer.Process.Namespace does.
func ownNamespace(kind string) (peer.FileID, error) {
	var st unix.Stat_t
	if err := unix.Stat("/proc/self/ns/"+kind, &st); err != nil {
		return peer.FileID{}, fmt.Errorf("stat own %s namespace: %w", kind, err)
	}
	return peer.FileID{Dev: st.Dev, Ino: st.Ino}, nil
}
