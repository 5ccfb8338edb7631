package peer

import (
	"context"
	"net"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/net/http2"
	"google.golang.org/grpc/credentials"
)

// kernels are the ways in which the package works, each tried by most tests.
func kernels(t *testing.T, f func(*testing.T, features)) {
	newest, legacy, err := probe()
	if err != nil {
		t.Fatal(err)
	}
	if len(legacy) == 0 {
		t.Run("this kernel", func(t *testing.T) { f(t, newest) })
	}
	t.Run("kernel before 6.5", func(t *testing.T) { f(t, features{}) })
}

func openTable(t testing.TB, kernel features) *Table {
	t.Helper()
	table, err := newTable(kernel)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := table.Close(); err != nil {
			t.Error(err)
		}
	})
	return table
}

// listen opens a listener in a directory of the test's.
func listen(t testing.TB, table *Table, o Options) *Listener {
	t.Helper()
	if o.Mode == 0 {
		o.Mode, o.Group = 0o666, -1
	}
	dir, err := os.MkdirTemp("", "peer") // t.TempDir may be too long for a socket
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	l, err := Listen(filepath.Join(dir, "s"), table, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l
}

func accept(t testing.TB, l *Listener) *Conn {
	t.Helper()
	c, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c.(*Conn)
}

func dial(t testing.TB, l *Listener) *net.UnixConn {
	t.Helper()
	c, err := net.DialUnix("unix", nil, l.Addr().(*net.UnixAddr))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

// answer speaks as an HTTP/2 client does, until the PING is acknowledged.
func answer(c net.Conn) error {
	if _, err := c.Write([]byte(http2.ClientPreface)); err != nil {
		return err
	}
	f := http2.NewFramer(c, c)
	if err := f.WriteSettings(); err != nil {
		return err
	}
	for {
		frame, err := f.ReadFrame()
		if err != nil {
			return err
		}
		switch frame := frame.(type) {
		case *http2.SettingsFrame:
			err = f.WriteSettingsAck()
		case *http2.PingFrame:
			return f.WritePing(true, frame.Data)
		case *http2.GoAwayFrame:
			return goneAway{string(frame.DebugData()), frame.ErrCode}
		}
		if err != nil {
			return err
		}
	}
}

// goneAway is a GOAWAY that a client received.
type goneAway struct {
	reason string
	code   http2.ErrCode
}

func (g goneAway) Error() string { return "sent away: " + g.reason }

// transport is what the daemon's credentials do with a Conn.
type transport struct {
	credentials.TransportCredentials
	accepted func(*Conn)
}

func (tr transport) ServerHandshake(c net.Conn) (net.Conn, credentials.AuthInfo, error) {
	conn := c.(*Conn)
	if err := conn.Challenge(context.Background()); err != nil {
		return nil, nil, err
	}
	if tr.accepted != nil {
		tr.accepted(conn)
	}
	return conn, authInfo{conn: conn}, nil
}

type authInfo struct {
	credentials.CommonAuthInfo
	conn *Conn
}

func (authInfo) AuthType() string { return "peer" }
