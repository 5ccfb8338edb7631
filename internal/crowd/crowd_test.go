package crowd

import (
	"errors"
	"io"
	"net"
	"testing"
	"time"
)

// A door is a listener whose callers are made up.
type door struct {
	net.Listener
	callers chan net.Conn
}

func (d *door) Accept() (net.Conn, error) {
	c, ok := <-d.callers
	if !ok {
		return nil, net.ErrClosed
	}
	return c, nil
}

// call comes from an address and returns the other end of the connection.
func (d *door) call(t *testing.T, from string) net.Conn {
	t.Helper()
	at, err := net.ResolveTCPAddr("tcp", from)
	if err != nil {
		t.Fatal(err)
	}
	here, there := net.Pipe()
	d.callers <- peerAt{there, at}
	return here
}

type peerAt struct {
	net.Conn
	addr net.Addr
}

func (p peerAt) RemoteAddr() net.Addr { return p.addr }

func TestBounds(t *testing.T) {
	d := &door{callers: make(chan net.Conn, 10)}
	l := Limit(d, Bounds{All: 3, Host: 2})
	accept := func() net.Conn {
		t.Helper()
		c, err := l.Accept()
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	closed := func(c net.Conn) bool {
		c.SetReadDeadline(time.Now().Add(time.Minute))
		_, err := c.Read(make([]byte, 1))
		return errors.Is(err, io.EOF)
	}
	d.call(t, "192.0.2.1:1")
	d.call(t, "192.0.2.1:2")
	first, second := accept(), accept()

	over := d.call(t, "192.0.2.1:3")
	d.call(t, "192.0.2.2:1")
	if got := accept().RemoteAddr().String(); got != "192.0.2.2:1" || !closed(over) {
		t.Errorf("got %s, want another host, and one more of the first closed", got)
	}
	full := d.call(t, "192.0.2.3:1")
	close(d.callers)
	if _, err := l.Accept(); !errors.Is(err, net.ErrClosed) || !closed(full) {
		t.Errorf("got %v, want the listener's error, and who came when all was taken closed", err)
	}

	// Closed twice it gives back one place.
	first.Close()
	first.Close()
	d.callers = make(chan net.Conn, 10)
	d.call(t, "192.0.2.1:4")
	d.call(t, "192.0.2.1:5")
	close(d.callers)
	if got := accept().RemoteAddr().String(); got != "192.0.2.1:4" {
		t.Errorf("got %s", got)
	}
	if c, err := l.Accept(); err == nil {
		t.Errorf("got %s beyond the bounds", c.RemoteAddr())
	}
	second.Close()
}

func TestAddressIsANetwork(t *testing.T) {
	for _, c := range []struct{ addr, want string }{
		{"192.0.2.7:1", "192.0.2.7"},
		{"[::ffff:192.0.2.7]:1", "192.0.2.7"},
		{"[2001:db8:1:2:3:4:5:6]:1", "2001:db8:1:2::"},
	} {
		at, err := net.ResolveTCPAddr("tcp", c.addr)
		if err != nil {
			t.Fatal(err)
		}
		if got := address(peerAt{addr: at}).String(); got != c.want {
			t.Errorf("%s: got %s, want %s", c.addr, got, c.want)
		}
	}
}
