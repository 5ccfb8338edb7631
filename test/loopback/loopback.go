// Package loopback finds TCP ports for servers that cannot be given a socket.
package loopback

import (
	"fmt"
	"net"
	"testing"
)

// Find returns a port that was free a moment ago.
func Find() (port int, err error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return 0, err
	}
	defer l.Close()
	return l.Addr().(*net.TCPAddr).Port, nil
}

// Port is Find for tests.
func Port(tb testing.TB) int {
	tb.Helper()
	port, err := Find()
	if err != nil {
		tb.Fatal(err)
	}
	return port
}

// Address is a Port with the address before it.
func Address(tb testing.TB) string {
	tb.Helper()
	return fmt.Sprintf("127.0.0.1:%d", Port(tb))
}
