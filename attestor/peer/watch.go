package peer

import (
	"errors"
	"fmt"
	"os"
	"syscall"

	"golang.org/x/sys/unix"
)

// exitWatch tells when processes exit. One epoll instance holds all pidfds,
// and is itself waited for through Go's poller: one goroutine, no thread.
type exitWatch struct {
	epoll *os.File
	conn  syscall.RawConn
	done  chan struct{} // closed when the goroutine has ended
}

// newExitWatch starts the goroutine that calls exited with the ID of each
// process that ends. It stops at close.
func newExitWatch(exited func(id uint64)) (*exitWatch, error) {
	fd, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("create epoll: %w", err)
	}
	if err := unix.SetNonblock(fd, true); err != nil { // only so does os.NewFile hand it to the poller
		unix.Close(fd)
		return nil, fmt.Errorf("prepare epoll: %w", err)
	}
	w := &exitWatch{epoll: os.NewFile(uintptr(fd), "epoll"), done: make(chan struct{})}
	if w.conn, err = w.epoll.SyscallConn(); err != nil {
		w.epoll.Close()
		return nil, fmt.Errorf("prepare epoll: %w", err)
	}
	go w.run(exited)
	return w, nil
}

func (w *exitWatch) run(exited func(id uint64)) {
	defer close(w.done)
	events := make([]unix.EpollEvent, 64)
	for {
		n := 0
		err := w.conn.Read(func(fd uintptr) bool {
			var err error
			n, err = unix.EpollWait(int(fd), events, 0)
			if err != nil {
				n = 0 // EINTR: ask again
				return true
			}
			return n > 0
		})
		if err != nil {
			return // closed
		}
		for _, e := range events[:n] {
			exited(uint64(uint32(e.Fd)) | uint64(uint32(e.Pad))<<32)
		}
	}
}

// add has the exit of the pidfd's process told once, under this ID. Closing
// the pidfd ends that: nothing but the Process holds it.
func (w *exitWatch) add(pidfd int, id uint64) error {
	event := unix.EpollEvent{Events: unix.EPOLLIN | unix.EPOLLONESHOT, Fd: int32(uint32(id)), Pad: int32(uint32(id >> 32))}
	var err error
	if ctl := w.conn.Control(func(fd uintptr) {
		err = unix.EpollCtl(int(fd), unix.EPOLL_CTL_ADD, pidfd, &event)
	}); ctl != nil {
		return errors.New("table is closed")
	}
	return err
}

func (w *exitWatch) close() error {
	err := w.epoll.Close()
	<-w.done
	return err
}
