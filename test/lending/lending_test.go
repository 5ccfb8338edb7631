// Package lending runs what docs/mesh.md shows of brokers and delegates, with a
// real daemon and processes of different users.
package lending

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	delegatedv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/agent/delegatedidentity/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"github.com/deputy-id/deputy/test/binary"
	"github.com/deputy-id/deputy/test/daemon"
	"github.com/deputy-id/deputy/test/kubelet"
	"github.com/deputy-id/deputy/test/need"
	"github.com/deputy-id/deputy/test/page"
	"github.com/deputy-id/deputy/test/process"
	"github.com/deputy-id/deputy/test/scratch"
)

// The users of the page's entries, and one that is in none.
const proxyUID, agentUID, strangerUID = 990, 991, 992

func TestMain(m *testing.M) {
	if socket := os.Getenv("LENDING_DELEGATE"); socket != "" {
		os.Exit(delegate(socket, os.Args[1]))
	}
	code := m.Run()
	binary.Remove()
	os.Exit(code)
}

// section is one of the page.
func section(t *testing.T, heading string) page.Page {
	t.Helper()
	return page.Open(t, "../../docs/mesh.md").Section(t, heading)
}

// A host is where the daemon runs.
type host struct{ *daemon.Daemon }

// start runs the daemon on the configuration of a section, with changes.
func start(t *testing.T, heading string, changes ...string) *host {
	t.Helper()
	need.Root(t, "processes of other users")
	config := page.Change(t, section(t, heading).Blocks(t, "hcl")[0], changes...)
	d := daemon.New(t, "", config)
	t.Cleanup(func() { // when it has ended
		for _, secret := range []string{"unix:uid", "mutual-auth", kubelet.Token} {
			if strings.Contains(d.Log(), secret) {
				t.Errorf("%s is in the log", secret)
			}
		}
	})
	d.Start(t)
	return &host{d}
}

// A player is a process whose lines the test reads.
type player struct {
	*exec.Cmd
	lines *bufio.Scanner
	err   bytes.Buffer
}

func play(t *testing.T, cmd *exec.Cmd) *player {
	t.Helper()
	p := &player{Cmd: cmd}
	cmd.Stderr = &p.err
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
	p.lines = bufio.NewScanner(out)
	p.lines.Split(func(data []byte, end bool) (int, []byte, error) {
		if bytes.IndexByte(data, 0) >= 0 {
			return len(data), data, nil // frames, which have no lines to wait for
		}
		return bufio.ScanLines(data, end)
	})
	return p
}

// soon kills the process if it goes on for longer than anything here takes.
func (p *player) soon() *time.Timer {
	return time.AfterFunc(20*time.Second, func() { p.Process.Kill() })
}

func (p *player) says(t *testing.T, want string) {
	t.Helper()
	if !p.lines.Scan() {
		p.Wait()
		t.Fatalf("it ended, want %s: %s", want, &p.err)
	}
	if got := p.lines.Text(); got != want {
		t.Fatalf("got %q, want %q", got, want)
	}
}

// ends waits for the process's end, and wants this in its complaint.
func (p *player) ends(t *testing.T, want string) {
	t.Helper()
	late := p.soon()
	for p.lines.Scan() {
		t.Errorf("got %q, want its end", p.lines.Text())
	}
	late.Stop()
	p.Wait()
	if got := p.err.String(); !strings.Contains(got, want) {
		t.Errorf("it ended with %q, want %q in it", got, want)
	}
}

// workload starts a process of this user that only waits.
func workload(t *testing.T, uid uint32) *exec.Cmd {
	t.Helper()
	cmd := process.As(uid, exec.Command("sleep", "600"))
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
	return cmd
}

// broker builds the page's program.
func broker(t *testing.T) string {
	t.Helper()
	dir := scratch.Dir(t)
	source := scratch.Write(t, filepath.Join(dir, "main.go"), section(t, "Brokers").Blocks(t, "go")[0])
	program := filepath.Join(dir, "broker")
	if err := binary.Build(program, source); err != nil {
		t.Fatal(err)
	}
	return program
}

func (d *host) broker(t *testing.T, program string, uid uint32, name string) *player {
	t.Helper()
	cmd := process.As(uid, exec.Command(program, name))
	cmd.Env = append(d.Env(), "SPIFFE_BROKER_SOCKET=unix://"+filepath.Join(d.Dir, "broker/broker.sock"))
	return play(t, cmd)
}

func TestBrokerOfThePage(t *testing.T) {
	d := start(t, "Brokers")
	program := broker(t)
	w := workload(t, agentUID)
	b := d.broker(t, program, proxyUID, strconv.Itoa(w.Process.Pid))
	b.says(t, "spiffe://example.org/agent/writer")
	w.Process.Kill()
	w.Wait()
	b.ends(t, "NotFound")

	w = workload(t, agentUID)
	d.broker(t, program, proxyUID, strconv.Itoa(workload(t, strangerUID).Process.Pid)).ends(t, "PermissionDenied")
	d.broker(t, program, proxyUID, "default/demo").ends(t, "PermissionDenied")
	d.broker(t, program, agentUID, strconv.Itoa(w.Process.Pid)).ends(t, "PermissionDenied") // has an SVID, and is on no list
}

func TestPodsOfThePage(t *testing.T) {
	pods, err := os.ReadFile("../../attestor/kubernetes/testdata/kubernetes-1.34-containerd-1.6-pods.json")
	if err != nil {
		t.Fatal(err)
	}
	k := kubelet.Start(t, pods)
	d := start(t, "Pods",
		"https://node-1:10250", k.URL, "/etc/deputy/kubelet.token", k.TokenFile, "/var/lib/kubelet/pki/kubelet.crt", k.CAFile)
	program := broker(t)
	b := d.broker(t, program, proxyUID, "default/demo")
	b.says(t, "spiffe://example.org/ns/default/sa/workload")
	k.Pods(kubelet.Without(t, pods, "demo"))
	b.ends(t, "NotFound")
	d.broker(t, program, proxyUID, strconv.Itoa(workload(t, agentUID).Process.Pid)).ends(t, "PermissionDenied")
}

// The connection outlives the program that was attested as a delegate; what
// comes over it does not.
func TestProgramThatADelegateExecutesGetsNothing(t *testing.T) {
	program := scratch.Program(t, filepath.Join(scratch.Dir(t), "proxy"), "/proc/self/exe")
	d := start(t, "Delegated identity", `"unix:uid:990"`, fmt.Sprintf(`"unix:uid:990", "unix:path:%s"`, program))
	honest := d.delegateAt(t, proxyUID, program, "mesh:a")
	honest.says(t, "")
	attacker := d.delegateAt(t, proxyUID, program, "exec:mesh:a")
	attacker.says(t, "")
	attacker.says(t, "executed")
	d.Run(t, "entry", "create", "/secret", "--selector", "mesh:a")
	honest.says(t, "/secret")
	stays := attacker.soon()
	for attacker.lines.Scan() {
		if strings.Contains(attacker.lines.Text(), "secret") {
			t.Fatalf("got %q over the connection of the program before", attacker.lines.Text())
		}
	}
	if !stays.Stop() {
		t.Error("the connection of the program before stays open")
	}
	d.delegate(t, proxyUID, "mesh:a").ends(t, "no identity issued") // another program of the same user
}

func (d *host) delegate(t *testing.T, uid uint32, what string) *player {
	t.Helper()
	return d.delegateAt(t, uid, "/proc/self/exe", what)
}

func (d *host) delegateAt(t *testing.T, uid uint32, program, what string) *player {
	t.Helper()
	cmd := process.As(uid, exec.Command(program, what))
	cmd.Env = []string{"LENDING_DELEGATE=" + filepath.Join(d.Dir, "delegated/delegated.sock"), "GORACE=atexit_sleep_ms=0"}
	return play(t, cmd)
}

func TestDelegateOfThePage(t *testing.T) {
	d := start(t, "Delegated identity")
	w := workload(t, agentUID)
	p := d.delegate(t, proxyUID, strconv.Itoa(w.Process.Pid))
	p.says(t, "/agent/writer")
	w.Process.Kill()
	w.Wait()
	p.ends(t, "NotFound")

	told := d.delegate(t, proxyUID, "unix:uid:991")
	told.says(t, "/agent/writer")
	d.delegate(t, agentUID, "unix:uid:991").ends(t, "caller not configured as an authorized delegate")
	d.delegate(t, strangerUID, "unix:uid:991").ends(t, "no identity issued")

	mesh := d.delegate(t, proxyUID, "cilium:mutual-auth")
	mesh.says(t, "")
	line := section(t, "Delegated identity").Blocks(t, "sh")[0]
	d.Run(t, strings.Fields(page.Change(t, line, "sudo deputy ", ""))...)
	mesh.says(t, "/identity/1234")
}

// delegate subscribes, by PID or by a selector, and prints a line with the
// paths of each message. After exec: it executes a program that reads on where
// it left off.
func delegate(socket, what string) int {
	what, executes := strings.CutPrefix(what, "exec:")
	var kept uintptr
	in := &delegatedv1.SubscribeToX509SVIDsRequest{}
	if pid, err := strconv.Atoi(what); err == nil {
		in.Pid = int32(pid)
	} else {
		typ, value, _ := strings.Cut(what, ":")
		in.Selectors = []*types.Selector{{Type: typ, Value: value}}
	}
	c, err := grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(context.Context, string) (net.Conn, error) {
			conn, err := net.Dial("unix", socket)
			if err == nil && executes {
				if raw, err := conn.(*net.UnixConn).SyscallConn(); err == nil {
					raw.Control(func(fd uintptr) {
						kept = fd
						unix.FcntlInt(fd, unix.F_SETFD, 0)
					})
				}
			}
			return conn, err
		}))
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	st, err := delegatedv1.NewDelegatedIdentityClient(c).SubscribeToX509SVIDs(context.Background(), in)
	for err == nil {
		var r *delegatedv1.SubscribeToX509SVIDsResponse
		if r, err = st.Recv(); err == nil {
			var paths []string
			for _, x := range r.X509Svids {
				paths = append(paths, x.X509Svid.Id.Path)
			}
			slices.Sort(paths)
			io.WriteString(os.Stdout, strings.Join(paths, " ")+"\n")
			if executes {
				unix.SetNonblock(int(kept), false) // cat waits
				err = syscall.Exec("/bin/sh", []string{"sh", "-c", fmt.Sprintf("echo executed; exec cat <&%d", kept)}, nil)
			}
		}
	}
	fmt.Fprintln(os.Stderr, status.Code(err), status.Convert(err).Message())
	return 1
}
