package peer

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/hashicorp/go-hclog"
	"golang.org/x/net/http2"
	"golang.org/x/sys/unix"
)

func itoa(n int32) string { return strconv.Itoa(int(n)) }

func TestSocketFile(t *testing.T) {
	table := openTable(t, features{})
	at := func(path string) (*Listener, error) { return Listen(path, table, Options{Mode: 0o600, Group: -1}) }

	t.Run("has its mode whatever the umask", func(t *testing.T) {
		old := unix.Umask(0o777)
		l := listen(t, table, Options{Mode: 0o666, Group: os.Getegid()})
		unix.Umask(old)
		st, err := os.Stat(l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		if st.Mode() != os.ModeSocket|0o666 {
			t.Errorf("got %v, want a socket with 0666", st.Mode())
		}
	})
	t.Run("is replaced when stale", func(t *testing.T) {
		path := filepath.Join(t.TempDir(), "s")
		stale, err := net.Listen("unix", path)
		if err != nil {
			t.Fatal(err)
		}
		stale.(*net.UnixListener).SetUnlinkOnClose(false)
		stale.Close()
		l, err := at(path)
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		dial(t, l)
	})
	t.Run("is left alone while another listens", func(t *testing.T) {
		path := filepath.Join(t.TempDir(), "s")
		live, err := net.Listen("unix", path)
		if err != nil {
			t.Fatal(err)
		}
		defer live.Close()
		if _, err := at(path); err == nil || !strings.Contains(err.Error(), "another process listens") {
			t.Errorf("got %v, want that another process listens", err)
		}
		if c, err := net.Dial("unix", path); err != nil {
			t.Errorf("the other cannot be reached any more: %v", err)
		} else {
			c.Close()
		}
	})
	t.Run("is left alone when it is no socket", func(t *testing.T) {
		path := filepath.Join(t.TempDir(), "s")
		if err := os.WriteFile(path, []byte("precious"), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := at(path); err == nil || !strings.Contains(err.Error(), "not a socket") {
			t.Errorf("got %v, want that it is not a socket", err)
		}
		if b, err := os.ReadFile(path); string(b) != "precious" {
			t.Errorf("the file: got %q, %v", b, err)
		}
	})
	t.Run("has a path that fits", func(t *testing.T) {
		dir, err := os.MkdirTemp("", "p")
		if err != nil {
			t.Fatal(err)
		}
		defer os.RemoveAll(dir)
		path := filepath.Join(dir, strings.Repeat("x", maxPath-len(dir)-1))
		l, err := at(path)
		if err != nil {
			t.Fatalf("%d bytes: %v", len(path), err)
		}
		l.Close()
		if _, err := at(path + "x"); err == nil || !strings.Contains(err.Error(), "107") {
			t.Errorf("%d bytes: got %v, want an error that names the limit", len(path)+1, err)
		}
		for _, bad := range []string{"", "@abstract"} {
			if _, err := at(bad); err == nil {
				t.Errorf("path %q: no error", bad)
			}
		}
	})
	t.Run("goes with the listener", func(t *testing.T) {
		path := filepath.Join(t.TempDir(), "s")
		l, err := at(path)
		if err != nil {
			t.Fatal(err)
		}
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
		if _, err := os.Lstat(path); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("got %v, want that it is gone", err)
		}
		if _, err := l.Accept(); !errors.Is(err, net.ErrClosed) {
			t.Errorf("Accept: got %v, want net.ErrClosed", err)
		}
	})
	t.Run("stays if it became another's", func(t *testing.T) {
		path := filepath.Join(t.TempDir(), "s")
		l, err := at(path)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(path, path+".old"); err != nil {
			t.Fatal(err)
		}
		other, err := at(path)
		if err != nil {
			t.Fatal(err)
		}
		defer other.Close()
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
		dial(t, other)
	})
}

func TestAcceptedSocketsPassCredentials(t *testing.T) {
	l := listen(t, openTable(t, features{}), Options{})
	dial(t, l)
	c := accept(t, l)
	var on int
	var err error
	c.raw.Control(func(fd uintptr) { on, err = unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_PASSCRED) })
	if on != 1 || err != nil {
		t.Errorf("SO_PASSCRED: got %d, %v, want 1", on, err)
	}
}

// Whoever is refused tries again and again; the log keeps room for others.
func TestRefusalsAreLoggedAndNotEachTime(t *testing.T) {
	var log bytes.Buffer
	l := listen(t, openTable(t, features{}), Options{Mode: 0o666, Group: -1,
		Admit: func(uint32) (func(), error) { return nil, errFull },
		Log:   hclog.New(&hclog.LoggerOptions{Output: &log, Level: hclog.Info}),
	})
	done := make(chan struct{})
	go func() { defer close(done); l.Accept() }()
	for range 50 {
		answer(dial(t, l))
	}
	l.Close()
	<-done
	line := fmt.Sprintf("connection refused: pid=%d uid=%d reason=%q", os.Getpid(), os.Geteuid(), errFull)
	if n := strings.Count(log.String(), line); n < 1 || n > 20 {
		t.Errorf("got %d lines for 50 refusals, want a few:\n%.500s", n, &log)
	}
}

func TestAdmitCountsConnections(t *testing.T) {
	var open atomic.Int32
	l := listen(t, openTable(t, features{}), Options{Mode: 0o666, Group: -1, Admit: func(uid uint32) (func(), error) {
		if uid != uint32(os.Geteuid()) {
			t.Errorf("asked for UID %d, want %d", uid, os.Geteuid())
		}
		if open.Load() == 1 {
			return nil, errFull
		}
		open.Add(1)
		return func() { open.Add(-1) }, nil
	}})
	dial(t, l)
	first := accept(t, l)
	next := make(chan net.Conn, 1)
	go func() { c, _ := l.Accept(); next <- c }()
	gone, ok := errors.AsType[goneAway](answer(dial(t, l)))
	if !ok || gone.reason != errFull.Error() || gone.code != http2.ErrCodeEnhanceYourCalm {
		t.Errorf("refused client heard %+v, want %q", gone, errFull)
	}
	first.Close()
	first.Close() // releases once
	if n := open.Load(); n != 0 {
		t.Errorf("%d connections are counted, want none", n)
	}
	dial(t, l)
	second := <-next
	if second == nil {
		t.Fatal("the next one was not accepted")
	}
	if n := open.Load(); n != 1 {
		t.Errorf("%d connections are counted, want 1", n)
	}
	second.Close()
	if n := open.Load(); n != 0 {
		t.Errorf("%d connections are counted, want none", n)
	}
}

func TestAcceptSurvivesWantOfDescriptors(t *testing.T) {
	l := listen(t, openTable(t, features{}), Options{})
	warned := make(chan struct{}, 100)
	l.log = warnings{l.log, warned}
	dial(t, l)
	var old unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &old); err != nil {
		t.Fatal(err)
	}
	// No number below the limit is free, whatever others close meanwhile.
	low := old
	low.Cur = 3
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &low); err != nil {
		t.Fatal(err)
	}
	defer unix.Setrlimit(unix.RLIMIT_NOFILE, &old)
	accepted := make(chan error, 1)
	go func() {
		c, err := l.Accept()
		if err == nil {
			c.Close()
		}
		accepted <- err
	}()
	<-warned
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &old); err != nil {
		t.Fatal(err)
	}
	if err := <-accepted; err != nil {
		t.Errorf("got %v, want the connection once there are descriptors again", err)
	}
}
