package peer

import (
	"bufio"
	"bytes"
	"fmt"
	"net"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/net/http2"
	"golang.org/x/sys/unix"
)

// The tests need processes that misbehave. This binary plays them: started
// with a role in its environment it takes that instead of running tests.
const roleVar = "PEER_TEST_ROLE"

// Descriptors of a role.
const (
	cueFD    = 3 // a byte lets it go on
	reportFD = 4 // a line each
	connFD   = 5 // kept across execve
)

var roles = map[string]func(args []string) error{
	"wait":          playWait,
	"client":        playClient,
	"inherit":       playInherit,
	"intruder":      playIntruder,
	"exec":          playExec,
	"late answer":   playLateAnswer,
	"answer":        playAnswer,
	"child answers": playChildAnswers,
	"cat":           playCat,
	"stdin":         playStdin,
	"leader exits":  playLeaderExits,
	"setuid":        playSetuid,
	"thread setuid": playThreadSetuid,
	"daemon":        playDaemon,
}

func TestMain(m *testing.M) {
	role := os.Getenv(roleVar)
	if role == "" {
		os.Exit(m.Run())
	}
	if err := roles[role](os.Args[1:]); err != nil {
		report("error: " + err.Error())
		os.Exit(1)
	}
}

func report(line string) { unix.Write(reportFD, []byte(line+"\n")) }

// cue waits until the test lets the role go on; at the end of the test it exits.
func cue() {
	var b [1]byte
	for {
		n, err := unix.Read(cueFD, b[:])
		if err == unix.EINTR {
			continue
		}
		if n != 1 {
			os.Exit(0)
		}
		return
	}
}

// connectFD connects to the socket under a number that execve keeps.
func connectFD(path string, fd int) error {
	s, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM, 0)
	if err != nil {
		return err
	}
	if err := unix.Connect(s, &unix.SockaddrUnix{Name: path}); err != nil {
		return err
	}
	if s == fd {
		return nil
	}
	defer unix.Close(s)
	return unix.Dup3(s, fd, 0)
}

func dialFD(path string, fd int) (net.Conn, error) {
	if err := connectFD(path, fd); err != nil {
		return nil, err
	}
	return fdConn(fd)
}

// fdConn wraps a copy of the descriptor, which stays open itself.
func fdConn(fd int) (net.Conn, error) {
	dup, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 10)
	if err != nil {
		return nil, err
	}
	f := os.NewFile(uintptr(dup), "conn")
	defer f.Close()
	return net.FileConn(f)
}

func becomeRole(role string, args ...string) error {
	os.Setenv(roleVar, role)
	return unix.Exec("/proc/self/exe", append([]string{"peer.test"}, args...), os.Environ())
}

func playWait([]string) error {
	report("ready")
	cue()
	return nil
}

// playClient answers the challenge and says how it went.
func playClient(args []string) error {
	c, err := net.Dial("unix", args[0])
	if err != nil {
		return err
	}
	if err := answer(c); err != nil {
		return err
	}
	report("answered")
	cue()
	return nil
}

// playInherit answers, and then lets a child write into the connection.
func playInherit(args []string) error {
	c, err := dialFD(args[0], connFD)
	if err != nil {
		return err
	}
	if err := answer(c); err != nil {
		return err
	}
	report("answered")
	cue()
	child := exec.Command("/proc/self/exe")
	child.Env = append(os.Environ(), roleVar+"=intruder")
	child.ExtraFiles = []*os.File{os.NewFile(cueFD, "cue"), os.NewFile(reportFD, "report"), os.NewFile(connFD, "conn")}
	return child.Run()
}

func playIntruder([]string) error {
	return http2.NewFramer(os.NewFile(connFD, "conn"), nil).WritePing(false, [8]byte{})
}

// playExec answers, and then executes this same file or another.
func playExec(args []string) error {
	c, err := dialFD(args[0], connFD)
	if err != nil {
		return err
	}
	if err := answer(c); err != nil {
		return err
	}
	report("answered")
	cue()
	if args[1] == "same" {
		return becomeRole("wait")
	}
	return unix.Exec("/bin/sh", []string{"sh", "-c", "echo ready >&4; read x <&3"}, os.Environ())
}

// playLateAnswer sends a request and lets the next program answer.
func playLateAnswer(args []string) error {
	if _, err := dialFD(args[0], connFD); err != nil {
		return err
	}
	report("connected")
	cue()
	return becomeRole("answer")
}

func playAnswer([]string) error {
	c, err := fdConn(connFD)
	if err != nil {
		return err
	}
	err = answer(c)
	report(fmt.Sprint("answered: ", err))
	cue()
	return err
}

// playChildAnswers sends the preface itself, leaves the connection to a child,
// and executes another program.
func playChildAnswers(args []string) error {
	c, err := dialFD(args[0], connFD)
	if err != nil {
		return err
	}
	if _, err := c.Write([]byte(http2.ClientPreface)); err != nil {
		return err
	}
	if err := http2.NewFramer(c, nil).WriteSettings(); err != nil {
		return err
	}
	report("connected")
	cue()
	child := exec.Command("/proc/self/exe")
	child.Env = append(os.Environ(), roleVar+"=answer")
	child.ExtraFiles = []*os.File{os.NewFile(cueFD, "cue"), os.NewFile(reportFD, "report"), os.NewFile(connFD, "conn")}
	if err := child.Start(); err != nil {
		return err
	}
	return unix.Exec("/bin/sleep", []string{"sleep", "600"}, nil)
}

// playCat leaves the connection to a program that sends back what it reads,
// after an opening of its own.
func playCat(args []string) error {
	if err := connectFD(args[0], 0); err != nil {
		return err
	}
	if err := unix.Dup3(0, 1, 0); err != nil {
		return err
	}
	if len(args) > 1 {
		var opening bytes.Buffer
		opening.WriteString(http2.ClientPreface)
		http2.NewFramer(&opening, nil).WriteSettings()
		if _, err := unix.Write(0, opening.Bytes()); err != nil {
			return err
		}
	}
	report("connected")
	return unix.Exec("/bin/cat", []string{"cat"}, nil)
}

// playStdin answers over its standard input.
func playStdin(args []string) error {
	c, err := dialFD(args[0], 0)
	if err != nil {
		return err
	}
	err = answer(c)
	report(fmt.Sprint("answered: ", err))
	cue()
	return nil
}

// playLeaderExits connects from a thread that outlives the main one.
func playLeaderExits(args []string) error {
	go func() {
		cue()
		conn, err := net.Dial("unix", args[0])
		if err == nil {
			err = answer(conn)
		}
		report(fmt.Sprint("answered: ", err))
		cue()
	}()
	report("ready")
	syscall.Syscall(syscall.SYS_EXIT, 0, 0, 0)
	return nil
}

func init() {
	if os.Getenv(roleVar) != "" {
		runtime.LockOSThread() // main runs on the main thread, and nothing else does
	}
}

// playSetuid answers as root, then drops privileges, then sends a message.
func playSetuid(args []string) error {
	c, err := net.Dial("unix", args[0])
	if err != nil {
		return err
	}
	if err := answer(c); err != nil {
		return err
	}
	report("answered")
	cue()
	drop := map[string]func(int) error{"uid": syscall.Setuid, "gid": syscall.Setgid}
	if err := drop[args[1]](1234); err != nil {
		return err
	}
	report("dropped")
	cue()
	f := http2.NewFramer(c, c)
	if err := f.WritePing(false, [8]byte{}); err != nil {
		return err
	}
	for {
		frame, err := f.ReadFrame()
		if err != nil {
			return err
		}
		if g, ok := frame.(*http2.GoAwayFrame); ok {
			return goneAway{string(g.DebugData()), g.ErrCode}
		}
	}
}

// playThreadSetuid connects from a thread with credentials of its own.
func playThreadSetuid(args []string) error {
	failed := make(chan error)
	go func() {
		runtime.LockOSThread()
		if _, _, errno := syscall.RawSyscall(syscall.SYS_SETUID, 1234, 0, 0); errno != 0 {
			failed <- errno
			return
		}
		c, err := dialFD(args[0], connFD)
		if err == nil {
			err = answer(c)
		}
		failed <- err
	}()
	return <-failed
}

// playDaemon listens inside a PID namespace of its own.
func playDaemon(args []string) error {
	if len(args) > 1 {
		if err := unix.Mount("proc", "/proc", "proc", 0, ""); err != nil {
			return err
		}
	}
	table, _, err := NewTable()
	if err != nil {
		return err
	}
	l, err := Listen(args[0], table, Options{Mode: 0o666, Group: -1})
	if err != nil {
		return err
	}
	report("ready")
	_, err = l.Accept()
	return err
}

// A player is a process with a role.
type player struct {
	t      *testing.T
	cmd    *exec.Cmd
	cues   *os.File
	lines  *bufio.Scanner
	waited bool
}

// play starts a process with a role; it ends with the test.
func play(t *testing.T, role string, change func(*exec.Cmd), args ...string) *player {
	t.Helper()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cueR, cueW, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	reportR, reportW, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(exe, args...)
	cmd.Env = append(os.Environ(), roleVar+"="+role)
	cmd.ExtraFiles = []*os.File{cueR, reportW}
	cmd.Stderr = os.Stderr
	if change != nil {
		change(cmd)
	}
	if err := cmd.Start(); err != nil {
		t.Fatalf("start %s: %v", role, err)
	}
	cueR.Close()
	reportW.Close()
	p := &player{t: t, cmd: cmd, cues: cueW, lines: bufio.NewScanner(reportR)}
	t.Cleanup(func() {
		cueW.Close()
		p.kill()
		reportR.Close()
	})
	return p
}

func (p *player) kill() {
	if !p.waited {
		p.waited = true
		p.cmd.Process.Kill()
		p.cmd.Wait()
	}
}

func (p *player) pid() int32 { return int32(p.cmd.Process.Pid) }

func (p *player) cue() {
	p.t.Helper()
	if _, err := p.cues.Write([]byte{1}); err != nil {
		p.t.Fatal(err)
	}
}

// line returns the next report.
func (p *player) line() string {
	p.lines.Scan()
	return p.lines.Text()
}

func (p *player) expect(want string) {
	p.t.Helper()
	if got := p.line(); !strings.Contains(got, want) {
		p.t.Fatalf("process reports %q, want %q", got, want)
	}
}

func needRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("SKIPPED: needs root, runs as " + strconv.Itoa(os.Geteuid()))
	}
}
