package attestor

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"syscall"
	"time"

	"github.com/godbus/dbus/v5"
	"golang.org/x/sys/unix"
)

// dialTime bounds connecting to the bus.
const dialTime = 3 * time.Second

// dialBus connects to the bus behind a socket that is root's: anybody else's
// would say what that user likes.
func dialBus(ctx context.Context, socket string) (*bus, error) {
	ctx, cancel := context.WithTimeout(ctx, dialTime)
	defer cancel()
	if err := rootListens(socket); err != nil {
		return nil, err
	}
	c, err := new(net.Dialer).DialContext(ctx, "unix", socket)
	if err != nil {
		return nil, err
	}
	conn, err := greetBus(ctx, c.(*net.UnixConn))
	if err != nil {
		c.Close()
		return nil, err
	}
	b := &bus{conn: conn, mains: make(map[*mainWatch]struct{})}
	go b.hear() // until the connection ends
	return b, nil
}

// greetBus makes sure that root listens there, and says hello.
func greetBus(ctx context.Context, c *net.UnixConn) (*dbus.Conn, error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return nil, err
	}
	var cred *unix.Ucred
	var credErr error
	if err := raw.Control(func(fd uintptr) {
		cred, credErr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	}); err != nil {
		return nil, err
	}
	if credErr != nil {
		return nil, fmt.Errorf("read credentials of the listener: %w", credErr)
	}
	if cred.Uid != 0 {
		return nil, fmt.Errorf("listener is user %d, not root", cred.Uid)
	}
	deadline, _ := ctx.Deadline()
	if err := c.SetDeadline(deadline); err != nil {
		return nil, err
	}
	conn, err := dbus.DialUnix(c)
	if err != nil {
		return nil, err
	}
	if err := conn.Auth(nil); err != nil {
		return nil, errors.Join(fmt.Errorf("authenticate: %w", err), conn.Close())
	}
	if err := conn.Hello(); err != nil {
		return nil, errors.Join(fmt.Errorf("say hello: %w", err), conn.Close())
	}
	if err := c.SetDeadline(time.Time{}); err != nil {
		return nil, errors.Join(err, conn.Close())
	}
	return conn, nil
}

// rootListens refuses what is no socket of root.
func rootListens(socket string) error {
	info, err := os.Stat(socket)
	if err != nil {
		return err
	}
	st, ok := info.Sys().(*syscall.Stat_t)
	if info.Mode()&fs.ModeSocket == 0 || !ok || st.Uid != 0 {
		return fmt.Errorf("%s is not a socket of root", socket)
	}
	return nil
}
