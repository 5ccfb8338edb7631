package peer

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"sync"
	"time"
)

const (
	// challengeTime is how long a peer may take to answer.
	challengeTime = 5 * time.Second
	// maxAhead is how much a peer may send before its answer: Envoy describes
	// itself first, in up to 64 KiB.
	maxAhead = 128 << 10
	// usualAhead has room for what other clients send.
	usualAhead = 4 << 10
)

var buffers = sync.Pool{New: func() any { b := make([]byte, usualAhead); return &b }}

// putBuffer gives a buffer back, unless it was grown for a peer that is not usual.
func putBuffer(b *[]byte) {
	if b != nil && len(*b) == usualAhead {
		buffers.Put(b)
	}
}

// errNoAnswer says that the time was up.
var errNoAnswer = errors.New("peer did not answer the PING in time")

// Challenge opens HTTP/2 and returns once the recorded program has answered a
// PING with random content; what it sent meanwhile is given to the next Read.
// After an error the peer has been told the reason and the Conn is closed.
//
// A message proves who sent it, not who reads the answer: a program may send
// its request, execute a privileged program and leave the reading to a child.
// The PING's content is known only to who reads, and the answer is taken only
// from the process while it runs the program that was recorded.
func (c *Conn) Challenge(ctx context.Context) error {
	err := c.challenge(ctx)
	if err == nil {
		return nil
	}
	err = fmt.Errorf("challenge process %d: %w", c.process.pid, err)
	c.turnAway(err)
	return err
}

// turnAway ends a connection that gRPC has not seen.
func (c *Conn) turnAway(why error) {
	var code uint32 = codeNone
	if errors.Is(why, errHTTP1) || errors.Is(why, errNoHTTP2) || errors.Is(why, errTooMuch) {
		code = codeProtocol
	}
	c.socket.SetWriteDeadline(time.Now().Add(partingTime))
	c.writeMu.Lock()
	defer c.writeMu.Unlock()
	if c.leaving.Swap(true) {
		return // closed already
	}
	c.socket.Write(appendGoAway(make([]byte, 0, maxGoAwaySize), code, why.Error()))
	c.part()
}

func (c *Conn) challenge(ctx context.Context) error {
	deadline := time.Now().Add(challengeTime)
	if d, ok := ctx.Deadline(); ok && d.Before(deadline) {
		deadline = d
	}
	if err := c.socket.SetDeadline(deadline); err != nil {
		return err
	}
	stopped := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(stopped)
		c.socket.SetDeadline(time.Unix(1, 0))
	})
	err := c.answer()
	if !stop() {
		<-stopped // it would cut off what is written next
	}
	switch {
	case err == nil:
	case errors.Is(err, os.ErrDeadlineExceeded) && ctx.Err() != nil && !errors.Is(ctx.Err(), context.DeadlineExceeded):
		return ctx.Err()
	case errors.Is(err, os.ErrDeadlineExceeded):
		return errNoAnswer
	default:
		return err
	}
	if err := c.notOnStdio(); err != nil {
		return err
	}
	if err := c.Check(); err != nil {
		return err
	}
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return c.socket.SetDeadline(time.Time{})
}

// answer sends the greeting and reads up to the answer. The rest of what was
// read, without the answer, which gRPC has not asked for, is kept for Read.
func (c *Conn) answer() error {
	var o opening
	rand.Read(o.ping[:])
	if _, err := c.socket.Write(appendGreeting(make([]byte, 0, greetingLen), o.ping)); err != nil {
		return err
	}
	c.readMu.Lock()
	defer c.readMu.Unlock()
	buffer := buffers.Get().(*[]byte)
	for n := 0; ; {
		if n == len(*buffer) {
			if n >= maxAhead {
				return errTooMuch
			}
			larger := make([]byte, 2*n)
			copy(larger, *buffer)
			putBuffer(buffer)
			buffer = &larger
		}
		got, err := c.readMessage((*buffer)[n:])
		n += got
		if errors.Is(err, io.EOF) {
			err = errors.New("peer closed the connection before it answered")
		}
		at := -1
		if err == nil {
			at, err = o.scan((*buffer)[:n])
		}
		if err != nil {
			putBuffer(buffer)
			return err
		}
		if at < 0 {
			continue
		}
		const answer = headerLen + pingLen
		n = at + copy((*buffer)[at:], (*buffer)[at+answer:n])
		c.rest, c.buffer = (*buffer)[:n], buffer
		return nil
	}
}

// errStdio is what a program hears whose standard input or output leads here.
var errStdio = errors.New("peer's standard input, output or error is a connection to this socket")

// notOnStdio refuses a program that was started with this connection as
// descriptor 0, 1 or 2. Such a program need not know what it is: one that
// copies its input to its output, perhaps with changes that its caller chose,
// could be made to answer. What cannot be found out is refused.
func (c *Conn) notOnStdio() error {
	for fd := range 3 {
		link, err := c.process.Readlink(stdio[fd])
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		if err != nil {
			return err
		}
		if !strings.HasPrefix(link, "socket:[") {
			continue
		}
		ours, err := c.leadsHere(fd, link)
		if err != nil {
			return fmt.Errorf("find out where descriptor %d of the peer leads: %w", fd, err)
		}
		if ours {
			return errStdio
		}
	}
	return nil
}

var stdio = [...]string{"fd/0", "fd/1", "fd/2"}
