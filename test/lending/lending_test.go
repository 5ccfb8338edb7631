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
	"github.com/deputy-id/deputy/test/kubelet"
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

// blocks returns the fenced blocks of a language below a heading of the page.
func blocks(t *testing.T, heading, language string) []string {
	t.Helper()
	text, err := os.ReadFile("../../docs/mesh.md")
	if err != nil {
		t.Fatal(err)
	}
	_, section, ok := strings.Cut(string(text), "\n"+heading+"\n")
	if !ok {
		t.Fatalf("the page has no %q", heading)
	}
	section, _, _ = strings.Cut(section, "\n#")
	var all []string
	for _, part := range strings.Split(section, "\n```"+language+"\n")[1:] {
		block, _, ok := strings.Cut(part, "\n```")
		if !ok {
			t.Fatalf("a block of %s does not end", language)
		}
		all = append(all, block+"\n")
	}
	if len(all) == 0 {
		t.Fatalf("%q has no block of %s", heading, language)
	}
	return all
}

type daemon struct {
	dir string
	log *bytes.Buffer
}

func (d *daemon) path(name string) string { return filepath.Join(d.dir, name) }

// start runs the daemon on a configuration of the page, with its paths below a
// directory of the test's.
func start(t *testing.T, config string, replace ...string) *daemon {
	t.Helper()
	if os.Getuid() != 0 {
		if os.Getenv("CI") != "" {
			t.Fatal("processes of other users need root")
		}
		t.Skip("SKIPPED: processes of other users need root")
	}
	dir, err := os.MkdirTemp("", "ln")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	d := &daemon{dir, &bytes.Buffer{}}
	for i := 0; i < len(replace); i += 2 {
		if !strings.Contains(config, replace[i]) {
			t.Fatalf("%s is not in\n%s", replace[i], config)
		}
	}
	config = strings.NewReplacer(append(replace, "/run/deputy", dir)...).Replace(config)
	config += fmt.Sprintf("data_dir = %q\nworkload_socket { path = %q }\nadmin_socket { path = %q }\n",
		d.path("data"), d.path("public/workload.sock"), d.path("private/admin.sock"))
	file := d.path("deputy.hcl")
	if err := os.WriteFile(file, []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	deputy := binary.Deputy(t)
	cmd := exec.Command(deputy, "run", "--config", file)
	cmd.Stderr = d.log
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cmd.Process.Signal(syscall.SIGTERM)
		if err := cmd.Wait(); err != nil {
			t.Errorf("deputy run: %v", err)
		}
		for _, secret := range []string{"unix:uid", "mutual-auth", kubelet.Token} {
			if strings.Contains(d.log.String(), secret) {
				t.Errorf("%s is in the log", secret)
			}
		}
		if t.Failed() {
			t.Logf("log of the daemon:\n%s", d.log)
		}
	})
	for end := time.Now().Add(20 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		if exec.Command(deputy, "health", "--socket", d.path("public/workload.sock")).Run() == nil {
			return d
		}
		if time.Now().After(end) {
			t.Fatalf("deputy did not become healthy:\n%s", d.log)
		}
	}
}

// as makes the command run as this user.
func as(uid uint32, cmd *exec.Cmd) *exec.Cmd {
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: uid}}
	return cmd
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
	cmd := as(uid, exec.Command("sleep", "600"))
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
	return cmd
}

// broker builds the page's program.
func broker(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "br")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	source := filepath.Join(dir, "main.go")
	if err := os.WriteFile(source, []byte(blocks(t, "## Brokers", "go")[0]), 0o600); err != nil {
		t.Fatal(err)
	}
	program := filepath.Join(dir, "broker")
	if err := binary.Build(program, source); err != nil {
		t.Fatal(err)
	}
	return program
}

func (d *daemon) broker(t *testing.T, program string, uid uint32, name string) *player {
	t.Helper()
	cmd := as(uid, exec.Command(program, name))
	cmd.Env = []string{
		"SPIFFE_ENDPOINT_SOCKET=unix://" + d.path("public/workload.sock"),
		"SPIFFE_BROKER_SOCKET=unix://" + d.path("broker/broker.sock"),
	}
	return play(t, cmd)
}

func TestBrokerOfThePage(t *testing.T) {
	d := start(t, blocks(t, "## Brokers", "hcl")[0])
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
	d := start(t, blocks(t, "### Pods", "hcl")[0],
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
	dir, err := os.MkdirTemp("", "dl")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	self, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	program := filepath.Join(dir, "proxy")
	if err := os.WriteFile(program, self, 0o755); err != nil {
		t.Fatal(err)
	}
	d := start(t, blocks(t, "## Delegated identity", "hcl")[0], `"unix:uid:990"`, fmt.Sprintf(`"unix:uid:990", "unix:path:%s"`, program))
	honest := d.delegateAt(t, proxyUID, program, "mesh:a")
	honest.says(t, "")
	attacker := d.delegateAt(t, proxyUID, program, "exec:mesh:a")
	attacker.says(t, "")
	attacker.says(t, "executed")
	if out, err := exec.Command(binary.Deputy(t), "entry", "create", "/secret", "--selector", "mesh:a", "--admin-socket", d.path("private/admin.sock")).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
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

func (d *daemon) delegate(t *testing.T, uid uint32, what string) *player {
	t.Helper()
	return d.delegateAt(t, uid, "/proc/self/exe", what)
}

func (d *daemon) delegateAt(t *testing.T, uid uint32, program, what string) *player {
	t.Helper()
	cmd := as(uid, exec.Command(program, what))
	cmd.Env = []string{"LENDING_DELEGATE=" + d.path("delegated/delegated.sock"), "GORACE=atexit_sleep_ms=0"}
	return play(t, cmd)
}

func TestDelegateOfThePage(t *testing.T) {
	d := start(t, blocks(t, "## Delegated identity", "hcl")[0])
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
	line := strings.TrimSpace(blocks(t, "## Delegated identity", "sh")[0])
	args := strings.Fields(strings.Replace(line, "sudo deputy ", "", 1))
	if out, err := exec.Command(binary.Deputy(t), append(args, "--admin-socket", d.path("private/admin.sock"))...).CombinedOutput(); err != nil {
		t.Fatalf("%s: %v: %s", line, err, out)
	}
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
