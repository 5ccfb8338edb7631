package peer

import (
	"context"
	"net"
	"os"
)

// A Listener accepts connections on a Unix socket and pins the process behind each.
type Listener struct{}

// Options of a Listener.
type Options struct {
	Mode  os.FileMode // of the socket file
	Group int         // GID of the socket file, -1 for the daemon's
	// Refuse is asked, in Accept, whether a connection more is one too many
	// for its UID; a reason refuses it. It must not block. Nil accepts all.
	Admit func(uid uint32) (release func(), err error)
}

// Listen binds the socket. A stale socket file is replaced; a live one, a file
// that is no socket, and a path longer than 107 bytes are errors.
func Listen(path string, table *Table, o Options) (*Listener, error) { panic("unbuilt") }

// Accept returns the next connection, as a *Conn. It only pins and counts: a
// peer that is refused is told why (SETTINGS and GOAWAY), in a goroutine of
// its own, and does not come out here.
func (l *Listener) Accept() (net.Conn, error) { panic("unbuilt") }

// Close stops accepting and removes the socket file if it is still this listener's.
func (l *Listener) Close() error { panic("unbuilt") }

// Addr is the address of the socket.
func (l *Listener) Addr() net.Addr { panic("unbuilt") }

// A Conn is a connection of one pinned process. Its Read takes messages from
// that process alone; one from another closes the connection.
type Conn struct {
	net.Conn
}

// Process is the process that connected. The Conn holds it until Close.
func (c *Conn) Process() *Process { panic("unbuilt") }

// Program is what that process ran when it connected.
func (c *Conn) Program() *Program { panic("unbuilt") }

// Check returns nil while the process lives and runs the program, under the
// credentials, that opened the connection; else ErrGone, ErrProgramChanged or
// ErrCredentialsChanged. It costs a handful of system calls.
func (c *Conn) Check() error { panic("unbuilt") }

// Challenge opens HTTP/2 and returns once the recorded program has answered a
// PING with random content; what it sent meanwhile is given to the next Read.
// After an error the peer has been told the reason and the Conn is closed.
func (c *Conn) Challenge(ctx context.Context) error { panic("unbuilt") }

// GoAway tells the client to open another connection (GOAWAY with the reason
// as debug data, where the stream of frames allows it) and closes this one.
func (c *Conn) GoAway(reason string) { panic("unbuilt") }

// Close closes the connection and gives up the hold on the process.
func (c *Conn) Close() error { panic("unbuilt") }
