// Package crowd keeps a listener that anybody can reach from being taken by a
// few.
//
// It defends against a host that holds many connections, whether it says nothing
// on them or just enough to keep them. What is beyond the bounds is closed as
// soon as it comes: whoever holds many must not make others wait. How long one
// connection may last is the server's to bound.
package crowd

import (
	"net"
	"net/netip"
	"sync"
)

// A Bounds says how many connections there may be at once.
type Bounds struct {
	All  int
	Host int // of one address, behind which there may be many
}

// Limit returns the listener with these bounds.
func Limit(l net.Listener, b Bounds) net.Listener {
	return &limited{Listener: l, bounds: b, hosts: make(map[netip.Addr]int)}
}

type limited struct {
	net.Listener
	bounds Bounds

	mu    sync.Mutex // guards what follows
	all   int
	hosts map[netip.Addr]int
}

func (l *limited) Accept() (net.Conn, error) {
	for {
		c, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		host := address(c)
		if !l.take(host) {
			c.Close()
			continue
		}
		return &counted{Conn: c, free: sync.OnceFunc(func() { l.free(host) })}, nil
	}
}

func (l *limited) take(host netip.Addr) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.all >= l.bounds.All || l.hosts[host] >= l.bounds.Host {
		return false
	}
	l.all++
	l.hosts[host]++
	return true
}

func (l *limited) free(host netip.Addr) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.all--
	if l.hosts[host]--; l.hosts[host] == 0 {
		delete(l.hosts, host)
	}
}

// address is the peer's, or its network's: of IPv6 a host has a whole /64.
func address(c net.Conn) netip.Addr {
	at, ok := c.RemoteAddr().(*net.TCPAddr)
	if !ok {
		return netip.Addr{}
	}
	a := at.AddrPort().Addr().Unmap().WithZone("")
	if a.Is6() {
		p, err := a.Prefix(64)
		if err == nil {
			return p.Addr()
		}
	}
	return a
}

// counted gives its place back when it is closed.
type counted struct {
	net.Conn
	free func()
}

func (c *counted) Close() error {
	c.free()
	return c.Conn.Close()
}
