package endpoint

import (
	"bufio"
	"bytes"
	"crypto/tls"
	"encoding/binary"
	"fmt"
	"net"
	"strconv"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/deputy-id/deputy/svid/registry"
)

// A wire is a client that speaks HTTP/2 frame by frame, within the windows that
// it is given, and what it likes in them.
type wire struct {
	t    testing.TB
	conn net.Conn

	writing sync.Mutex // guards the next three
	out     *bufio.Writer
	fr      *http2.Framer
	last    uint32

	mu    sync.Mutex // guards what follows
	news  *sync.Cond
	room  map[uint32]int // that there is for DATA; 0 is the connection
	ended map[uint32]*status.Status
	gone  error
}

func (w *world) wire(socket string) *wire {
	w.t.Helper()
	conn, err := net.Dial("unix", socket)
	if err != nil {
		w.t.Fatal(err)
	}
	return speak(w.t, conn)
}

// wire speaks as this broker.
func (b *brokers) wire(id spiffeid.ID) *wire {
	b.t.Helper()
	c := tlsconfig.MTLSClientConfig(b.svid(id, time.Hour), b.Brokering.Identity, tlsconfig.AuthorizeID(registry.NodeID(domain)))
	c.NextProtos = []string{"h2"}
	conn, err := net.Dial("unix", b.unix)
	if err != nil {
		b.t.Fatal(err)
	}
	return speak(b.t, tls.Client(conn, c))
}

func speak(t testing.TB, conn net.Conn) *wire {
	t.Helper()
	conn.SetDeadline(time.Now().Add(time.Minute)) // of all that is waited for
	out := bufio.NewWriterSize(conn, 64<<10)
	w := &wire{
		t: t, conn: conn, out: out, fr: http2.NewFramer(out, conn),
		room:  map[uint32]int{0: 65535},
		ended: make(map[uint32]*status.Status),
	}
	w.news = sync.NewCond(&w.mu)
	w.fr.ReadMetaHeaders = hpack.NewDecoder(4096, nil)
	out.WriteString(http2.ClientPreface)
	w.write(func() error { return w.fr.WriteSettings() })
	done := make(chan struct{})
	go func() {
		defer close(done)
		w.listen()
	}()
	t.Cleanup(func() {
		conn.Close()
		<-done
	})
	return w
}

func (w *wire) write(frames func() error) {
	w.writing.Lock()
	defer w.writing.Unlock()
	if frames() == nil { // an error is the listener's to find
		w.out.Flush()
	}
}

func (w *wire) listen() {
	for {
		frame, err := w.fr.ReadFrame()
		switch frame := frame.(type) { // while mu is free: who writes may want it
		case *http2.SettingsFrame:
			if !frame.IsAck() {
				w.write(w.fr.WriteSettingsAck)
			}
		case *http2.PingFrame:
			if !frame.IsAck() {
				w.write(func() error { return w.fr.WritePing(true, frame.Data) })
			}
		}
		w.mu.Lock()
		switch frame := frame.(type) {
		case nil:
			w.gone = err
		case *http2.WindowUpdateFrame:
			w.room[frame.StreamID] += int(frame.Increment)
		case *http2.MetaHeadersFrame:
			var code, message string
			for _, f := range frame.Fields {
				switch f.Name {
				case "grpc-status":
					code = f.Value
				case "grpc-message":
					message = f.Value
				}
			}
			if n, err := strconv.Atoi(code); err == nil {
				w.ended[frame.StreamID] = status.New(codes.Code(n), message)
			}
		case *http2.GoAwayFrame:
			w.gone = fmt.Errorf("sent away: %s", frame.DebugData())
		}
		w.news.Broadcast()
		w.mu.Unlock()
		if frame == nil {
			return
		}
	}
}

// open begins a call.
func (w *wire) open(method string, more ...string) uint32 {
	var b bytes.Buffer
	e := hpack.NewEncoder(&b)
	e.SetMaxDynamicTableSize(0)
	fields := append([]string{
		":method", "POST", ":scheme", "http", ":path", method, ":authority", "localhost",
		"content-type", "application/grpc", "te", "trailers", "workload.spiffe.io", "true", "broker.spiffe.io", "true",
	}, more...)
	for i := 0; i < len(fields); i += 2 {
		e.WriteField(hpack.HeaderField{Name: fields[i], Value: fields[i+1]})
	}
	var id uint32
	w.write(func() error {
		id = w.last + 1
		w.last += 2
		w.mu.Lock()
		w.room[id] = 65535
		w.mu.Unlock()
		return w.fr.WriteHeaders(http2.HeadersFrameParam{StreamID: id, BlockFragment: b.Bytes(), EndHeaders: true})
	})
	return id
}

// say sends in frames of this size. It reports whether all was sent before the
// call ended.
func (w *wire) say(id uint32, b []byte, frame int, end bool) bool {
	w.t.Helper()
	for len(b) > 0 || end {
		w.mu.Lock()
		for w.ended[id] == nil && w.gone == nil && len(b) > 0 && min(w.room[id], w.room[0]) <= 0 {
			w.news.Wait()
		}
		if w.gone != nil {
			w.mu.Unlock()
			w.t.Errorf("the connection ended: %v", w.gone)
			return false
		}
		if w.ended[id] != nil {
			w.mu.Unlock()
			return false
		}
		n := min(len(b), w.room[id], w.room[0])
		w.room[id] -= n
		w.room[0] -= n
		w.mu.Unlock()
		now, last := b[:n], end && n == len(b)
		b = b[n:]
		w.write(func() error {
			for len(now) > frame {
				if err := w.fr.WriteData(id, false, now[:frame]); err != nil {
					return err
				}
				now = now[frame:]
			}
			return w.fr.WriteData(id, last, now)
		})
		if last {
			break
		}
	}
	return true
}

// status waits for the end of a call.
func (w *wire) status(id uint32) *status.Status {
	w.t.Helper()
	w.mu.Lock()
	defer w.mu.Unlock()
	for w.ended[id] == nil {
		if w.gone != nil {
			w.t.Fatalf("the connection ended: %v", w.gone)
		}
		w.news.Wait()
	}
	return w.ended[id]
}

// ask is a call with nothing else in it, to its end.
func (w *wire) ask(method string, body []byte, header ...string) *status.Status {
	w.t.Helper()
	id := w.open(method, header...)
	w.say(id, body, 16<<10, true)
	return w.status(id)
}

// announce is the beginning of a message of this length.
func announce(length int, body ...byte) []byte {
	return append(binary.BigEndian.AppendUint32([]byte{0}, uint32(length)), body...)
}
