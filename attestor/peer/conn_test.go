package peer

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/sys/unix"
)

// challenged accepts a connection and runs the challenge on it.
func challenged(t *testing.T, l *Listener) (*Conn, error) {
	t.Helper()
	c := accept(t, l)
	return c, c.Challenge(t.Context())
}

func TestConnIsOfWhoConnected(t *testing.T) {
	kernels(t, func(t *testing.T, kernel features) {
		l := listen(t, openTable(t, kernel), Options{})
		h := play(t, "client", nil, l.Addr().String())
		c, err := challenged(t, l)
		if err != nil {
			t.Fatal(err)
		}
		if c.Process().PID() != h.pid() {
			t.Errorf("got PID %d, want %d", c.Process().PID(), h.pid())
		}
		if err := c.Check(); err != nil {
			t.Errorf("Check: %v", err)
		}
		h.kill()
		<-c.Process().Done()
		if err := c.Check(); !errors.Is(err, ErrGone) {
			t.Errorf("Check after its end: got %v, want ErrGone", err)
		}
	})
}

func TestMessageOfAChildClosesTheConnection(t *testing.T) {
	kernels(t, func(t *testing.T, kernel features) {
		l := listen(t, openTable(t, kernel), Options{})
		h := play(t, "inherit", nil, l.Addr().String())
		c, err := challenged(t, l)
		if err != nil {
			t.Fatal(err)
		}
		h.expect("answered")
		h.cue()
		got, err := io.ReadAll(c)
		if !errors.Is(err, ErrForeignMessage) {
			t.Errorf("got %v, want ErrForeignMessage", err)
		}
		if want := preface(t); !bytes.Equal(got, want) {
			t.Errorf("read %q, want %q alone", got, want)
		}
		if _, err := c.Write([]byte{0}); !errors.Is(err, net.ErrClosed) {
			t.Errorf("Write after it: got %v, want a closed connection", err)
		}
	})
}

// preface is what the client of answer sends, without its answer.
func preface(t *testing.T) []byte {
	t.Helper()
	var b bytes.Buffer
	b.WriteString(http2.ClientPreface)
	f := http2.NewFramer(&b, nil)
	if err := errors.Join(f.WriteSettings(), f.WriteSettingsAck()); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func TestMessageWithDescriptorsIsRefused(t *testing.T) {
	l := listen(t, openTable(t, features{}), Options{}) // where SO_PASSRIGHTS is not known
	client := dial(t, l)
	c := accept(t, l)
	if _, _, err := client.WriteMsgUnix([]byte("x"), unix.UnixRights(0), nil); err != nil {
		t.Fatal(err)
	}
	before := countFDs(t)
	if _, err := c.Read(make([]byte, 1)); !errors.Is(err, ErrForeignMessage) {
		t.Errorf("got %v, want ErrForeignMessage", err)
	}
	if after := countFDs(t); after > before {
		t.Errorf("%d descriptors open, want no more than %d", after, before)
	}
}

func TestDescriptorsCannotBeSent(t *testing.T) {
	kernel, _, err := probe()
	if err != nil {
		t.Fatal(err)
	}
	if !kernel.passRights {
		t.Skip("SKIPPED: kernel has no SO_PASSRIGHTS")
	}
	l := listen(t, openTable(t, kernel), Options{})
	client := dial(t, l)
	accept(t, l)
	if _, _, err := client.WriteMsgUnix([]byte("x"), unix.UnixRights(0), nil); !errors.Is(err, unix.EPERM) {
		t.Errorf("got %v, want EPERM", err)
	}
}

func countFDs(t *testing.T) int {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(entries)
}

// What is queued when the connection is accepted has a sender, too.
func TestMessageSentBeforeAcceptHasASender(t *testing.T) {
	l := listen(t, openTable(t, features{}), Options{})
	client := dial(t, l)
	if _, err := client.Write([]byte("early")); err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 10)
	n, err := accept(t, l).Read(b)
	if err != nil || string(b[:n]) != "early" {
		t.Errorf("got %q, %v, want what was sent", b[:n], err)
	}
}

func TestReadHonoursItsDeadline(t *testing.T) {
	l := listen(t, openTable(t, features{}), Options{})
	dial(t, l)
	c := accept(t, l)
	if err := c.SetDeadline(time.Now().Add(10 * time.Millisecond)); err != nil {
		t.Fatal(err)
	}
	_, err := c.Read(make([]byte, 1))
	if timeout, ok := errors.AsType[net.Error](err); !ok || !timeout.Timeout() {
		t.Errorf("got %v, want a timeout", err)
	}
}

func TestReadDoesNotAllocate(t *testing.T) {
	l := listen(t, openTable(t, features{}), Options{})
	client := dial(t, l)
	c := accept(t, l)
	b := make([]byte, 16)
	if n := testing.AllocsPerRun(100, func() {
		if _, err := client.Write(b[:1]); err != nil {
			t.Fatal(err)
		}
		if _, err := c.Read(b); err != nil {
			t.Fatal(err)
		}
	}); n != 0 {
		t.Errorf("got %v allocations, want none", n)
	}
}

func TestExecBeforeTheAnswerFailsTheChallenge(t *testing.T) {
	needRoot(t)
	kernels(t, func(t *testing.T, kernel features) {
		l := listen(t, openTable(t, kernel), Options{})
		h := play(t, "late answer", nil, l.Addr().String())
		h.expect("connected")
		c := accept(t, l)
		h.cue()
		if err := c.Challenge(t.Context()); !errors.Is(err, ErrProgramChanged) {
			t.Errorf("got %v, want ErrProgramChanged", err)
		}
	})
}

func TestChildCannotAnswerTheChallenge(t *testing.T) {
	kernels(t, func(t *testing.T, kernel features) {
		l := listen(t, openTable(t, kernel), Options{})
		h := play(t, "child answers", nil, l.Addr().String())
		h.expect("connected")
		c := accept(t, l)
		h.cue()
		if err := c.Challenge(t.Context()); !errors.Is(err, ErrForeignMessage) {
			t.Errorf("got %v, want ErrForeignMessage", err)
		}
	})
}

func TestProgramThatCopiesItsInputFailsTheChallenge(t *testing.T) {
	for name, args := range map[string][]string{"bare": nil, "after a preface": {"preface"}} {
		t.Run(name, func(t *testing.T) {
			l := listen(t, openTable(t, features{}), Options{})
			h := play(t, "cat", nil, append([]string{l.Addr().String()}, args...)...)
			h.expect("connected")
			if _, err := challenged(t, l); !errors.Is(err, errEcho) {
				t.Errorf("got %v, want %v", err, errEcho)
			}
		})
	}
}

func TestConnectionAsStandardInputFailsTheChallenge(t *testing.T) {
	kernels(t, func(t *testing.T, kernel features) {
		l := listen(t, openTable(t, kernel), Options{})
		play(t, "stdin", nil, l.Addr().String())
		if _, err := challenged(t, l); !errors.Is(err, errStdio) {
			t.Errorf("got %v, want %v", err, errStdio)
		}
	})
}

func TestOtherSocketsAsStandardInputAreFine(t *testing.T) {
	flags := map[string]uintptr{"our network": 0}
	if os.Geteuid() == 0 {
		flags["a network of its own"] = syscall.CLONE_NEWNET
	}
	for name, flag := range flags {
		t.Run(name, func(t *testing.T) {
			pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
			if err != nil {
				t.Fatal(err)
			}
			stdin := os.NewFile(uintptr(pair[0]), "stdin")
			defer stdin.Close()
			defer unix.Close(pair[1])
			l := listen(t, openTable(t, features{}), Options{})
			play(t, "client", func(cmd *exec.Cmd) {
				cmd.Stdin, cmd.Stdout = stdin, stdin
				cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: flag}
			}, l.Addr().String())
			if _, err := challenged(t, l); err != nil {
				t.Error(err)
			}
		})
	}
}

func TestPeerInodeIsThatOfTheClientsEnd(t *testing.T) {
	l := listen(t, openTable(t, features{}), Options{})
	client := dial(t, l)
	c := accept(t, l)
	f, err := client.File()
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		t.Fatal(err)
	}
	if got, err := c.peerInode(); err != nil || uint64(got) != st.Ino {
		t.Errorf("got %d, %v, want %d", got, err, st.Ino)
	}
}

func TestExitedMainThreadIsRefused(t *testing.T) {
	kernels(t, func(t *testing.T, kernel features) {
		table := openTable(t, kernel)
		l := listen(t, table, Options{})
		go l.Accept() // nothing comes out of it
		h := play(t, "leader exits", nil, l.Addr().String())
		h.expect("ready")
		waitForState(t, h.pid(), 'Z')
		h.cue()
		h.expect("sent away: main thread of")
	})
}

func waitForState(t *testing.T, pid int32, state byte) {
	t.Helper()
	deadline := time.Now().Add(10 * time.Second)
	for time.Now().Before(deadline) {
		b, err := os.ReadFile("/proc/" + itoa(pid) + "/stat")
		if err != nil {
			t.Fatal(err)
		}
		st, err := parseStat(b)
		if err != nil {
			t.Fatal(err)
		}
		if st.state == state {
			return
		}
	}
	t.Fatalf("process %d never came to state %c", pid, state)
}

func TestThreadWithOtherCredentialsIsRefused(t *testing.T) {
	needRoot(t)
	kernels(t, func(t *testing.T, kernel features) {
		l := listen(t, openTable(t, kernel), Options{})
		go l.Accept()
		play(t, "thread setuid", nil, l.Addr().String()).expect("sent away: connected as 1234:0, runs as 0:0")
	})
}

func TestDroppingPrivilegesEndsTheConnection(t *testing.T) {
	needRoot(t)
	for _, id := range []string{"uid", "gid"} {
		t.Run(id, func(t *testing.T) {
			kernels(t, func(t *testing.T, kernel features) {
				l := listen(t, openTable(t, kernel), Options{})
				h := play(t, "setuid", nil, l.Addr().String(), id)
				c, err := challenged(t, l)
				if err != nil {
					t.Fatal(err)
				}
				h.expect("answered")
				h.cue()
				h.expect("dropped")
				if err := c.Check(); !errors.Is(err, ErrCredentialsChanged) {
					t.Errorf("Check: got %v, want ErrCredentialsChanged", err)
				}
				h.cue()
				if _, err := io.ReadAll(c); !errors.Is(err, ErrCredentialsChanged) {
					t.Errorf("Read: got %v, want ErrCredentialsChanged", err)
				}
				h.expect("sent away: " + ErrCredentialsChanged.Error())
			})
		})
	}
}

func TestChallengeOfOddPeers(t *testing.T) {
	var tooMuch bytes.Buffer
	tooMuch.WriteString(http2.ClientPreface)
	f := http2.NewFramer(&tooMuch, nil)
	f.WriteSettings()
	for tooMuch.Len() <= maxAhead {
		f.WriteRawFrame(http2.FrameData, 0, 1, make([]byte, 16000))
	}
	tests := map[string]struct {
		send []byte
		hang bool
		want error
		code http2.ErrCode
	}{
		"garbage":           {send: []byte("\x16\x03\x01\x02\x00"), want: errNoHTTP2, code: http2.ErrCodeProtocol},
		"HTTP/1.1":          {send: []byte("GET / HTTP/1.1\r\n\r\n"), want: errHTTP1, code: http2.ErrCodeProtocol},
		"no settings":       {send: []byte(http2.ClientPreface + "\x00\x00\x00\x00\x00\x00\x00\x00\x01"), want: errNoHTTP2, code: http2.ErrCodeProtocol},
		"too much":          {send: tooMuch.Bytes(), want: errTooMuch, code: http2.ErrCodeProtocol},
		"nothing":           {hang: true, want: errNoAnswer},
		"half a preface":    {send: []byte(http2.ClientPreface[:10]), hang: true, want: errNoAnswer},
		"an answer guessed": {send: []byte(http2.ClientPreface + "\x00\x00\x00\x04\x00\x00\x00\x00\x00" + "\x00\x00\x08\x06\x01\x00\x00\x00\x00guessed!"), want: errWrongPing},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			l := listen(t, openTable(t, features{}), Options{})
			client := dial(t, l)
			c := accept(t, l)
			heard := make(chan error, 1)
			go func() {
				if _, err := client.Write(tt.send); err != nil {
					t.Error(err)
				}
				f := http2.NewFramer(nil, client)
				for {
					frame, err := f.ReadFrame()
					if err != nil {
						heard <- err
						return
					}
					if g, ok := frame.(*http2.GoAwayFrame); ok {
						heard <- goneAway{string(g.DebugData()), g.ErrCode}
						client.Close()
						return
					}
				}
			}()
			ctx := t.Context()
			if tt.hang {
				var cancel context.CancelFunc
				ctx, cancel = context.WithTimeout(ctx, 20*time.Millisecond)
				defer cancel()
			}
			if err := c.Challenge(ctx); !errors.Is(err, tt.want) {
				t.Errorf("got %v, want %v", err, tt.want)
			}
			gone, ok := errors.AsType[goneAway](<-heard)
			if !ok || !strings.Contains(gone.reason, tt.want.Error()) || gone.code != tt.code {
				t.Errorf("client heard %+v, want code %v and reason %q", gone, tt.code, tt.want)
			}
		})
	}
}

func TestChallengeEndsWithItsContext(t *testing.T) {
	l := listen(t, openTable(t, features{}), Options{})
	dial(t, l)
	c := accept(t, l)
	ctx, cancel := context.WithCancel(t.Context())
	go cancel()
	if err := c.Challenge(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v, want that the context was cancelled", err)
	}
}

// Some clients wait for the server's SETTINGS, others do not; what they send
// may come in any pieces.
func TestChallengeTakesTheOpeningInPieces(t *testing.T) {
	l := listen(t, openTable(t, features{}), Options{})
	client := dial(t, l)
	c := accept(t, l)
	failed := make(chan error, 1)
	go func() { failed <- c.Challenge(t.Context()) }()
	f := http2.NewFramer(nil, client)
	var ping *http2.PingFrame
	for ping == nil {
		frame, err := f.ReadFrame()
		if err != nil {
			t.Fatal(err)
		}
		ping, _ = frame.(*http2.PingFrame)
	}
	var opening, rest bytes.Buffer
	opening.Write(preface(t))
	large := make([]byte, 10000) // more than the usual buffer
	f = http2.NewFramer(&opening, nil)
	f.WriteRawFrame(http2.FrameData, 0, 1, large)
	before := opening.Len()
	f.WritePing(true, ping.Data)
	after := opening.Len()
	f.WriteWindowUpdate(0, 7)
	sent := bytes.Clone(opening.Bytes())
	rest.Write(sent[:before])
	rest.Write(sent[after:])
	for i := 0; i < len(sent); {
		n := min(1+i/8, len(sent)-i)
		if _, err := client.Write(sent[i : i+n]); err != nil {
			t.Fatal(err)
		}
		i += n
	}
	client.CloseWrite()
	if err := <-failed; err != nil {
		t.Fatal(err)
	}
	got, err := io.ReadAll(c)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, rest.Bytes()) {
		t.Errorf("read %d bytes, want the %d that were sent without the answer", len(got), rest.Len())
	}
}

// The GOAWAY stands between two frames, wherever a Write ended.
func TestGoAwayRespectsFrames(t *testing.T) {
	var frames bytes.Buffer
	f := http2.NewFramer(&frames, nil)
	f.WriteData(1, false, []byte("one"))
	f.WriteData(1, false, []byte("two"))
	all := frames.Bytes()
	for cut := 0; cut <= len(all); cut++ {
		l := listen(t, openTable(t, features{}), Options{})
		client := dial(t, l)
		c := accept(t, l)
		if _, err := c.Write(all[:cut]); err != nil {
			t.Fatal(err)
		}
		c.GoAway("enough")
		for !c.leaving.Load() {
			runtime.Gosched()
		}
		c.Write(all[cut:])
		var got []string
		f := http2.NewFramer(nil, client)
		for {
			frame, err := f.ReadFrame()
			if err != nil {
				if !errors.Is(err, io.EOF) {
					t.Errorf("cut at %d: %v", cut, err)
				}
				break
			}
			switch frame := frame.(type) {
			case *http2.DataFrame:
				got = append(got, string(frame.Data()))
			case *http2.GoAwayFrame:
				got = append(got, "goaway "+string(frame.DebugData()))
			}
		}
		if len(got) == 0 || got[len(got)-1] != "goaway enough" {
			t.Errorf("cut at %d: got %q, want whole frames and a GOAWAY last", cut, got)
		}
	}
}

// A client that still writes does not meet an error before it read the reason.
func TestGoAwayWaitsForTheClientToLeave(t *testing.T) {
	l := listen(t, openTable(t, features{}), Options{})
	client := dial(t, l)
	c := accept(t, l)
	c.GoAway("enough")
	if b, err := io.ReadAll(client); err != nil || !bytes.Contains(b, []byte("enough")) {
		t.Fatalf("got %q, %v, want the reason and the end", b, err)
	}
	if _, err := client.Write([]byte("still writing")); err != nil {
		t.Error(err)
	}
}

func TestChallengeLeavesNoDeadline(t *testing.T) {
	l := listen(t, openTable(t, features{}), Options{})
	client := dial(t, l)
	c := accept(t, l)
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	answered := make(chan error, 1)
	go func() { answered <- answer(client) }()
	if err := errors.Join(c.Challenge(ctx), <-answered); err != nil {
		t.Fatal(err)
	}
	<-ctx.Done()
	client.CloseWrite()
	if _, err := io.ReadAll(c); err != nil {
		t.Errorf("after the challenge's time: %v", err)
	}
}
