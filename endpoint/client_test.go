package endpoint

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"os"
	osexec "os/exec"
	"strings"
	"syscall"
	"testing"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	secretv3 "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	"github.com/deputy-id/deputy/attestor/peer"
	adminv1 "github.com/deputy-id/deputy/proto/deputy/admin/v1"
)

// client is the test binary as another process. Its environment says what to
// do until its standard input ends:
//
//	sleep          nothing
//	count:SOCKET   count entries, print the code
//	exec:SOCKET    hold a stream, and execute another program once it has an answer
//	later:SOCKET   the same, but when it is told to
//	sds:SOCKET     hold a stream of secrets, print the names of each response
//	sdsexec:SOCKET the same, and execute another program once it has one
//	pid:SOCKET     ask as a delegate for the process with its parent's number here, print the code
//	lent:SOCKET    hold a delegate's stream, execute another program when it is told to
//	half:SOCKET    begin to ask for an entry, and execute another program that ends the request and prints what it is told
//	SOCKET         hold a stream, print a line for each message
func client() int {
	what, socket, ok := strings.Cut(os.Getenv("ENDPOINT_TEST_CLIENT"), ":")
	if !ok {
		what, socket = "", what
	}
	if socket == "sleep" {
		io.Copy(io.Discard, os.Stdin)
		return 0
	}
	if what == "half" {
		fmt.Println(half(socket))
		return 1
	}
	c, err := grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(context.Context, string) (net.Conn, error) {
			conn, err := net.Dial("unix", socket)
			if err == nil && (strings.HasSuffix(what, "exec") || what == "lent") {
				keepAcrossExec(conn.(*net.UnixConn))
			}
			return conn, err
		}))
	if err != nil {
		fmt.Println("dial", err)
		return 1
	}
	if what == "count" {
		fmt.Println(status.Code(count(entryv1.NewEntryClient(c))))
		return 0
	}
	if what == "pid" || what == "lent" {
		return borrow(c, what)
	}
	if strings.HasPrefix(what, "sds") {
		return secretsClient(c, what)
	}
	ctx := metadata.AppendToOutgoingContext(context.Background(), "workload.spiffe.io", "true")
	st, err := workload.NewSpiffeWorkloadAPIClient(c).FetchX509SVID(ctx, &workload.X509SVIDRequest{})
	if err != nil {
		fmt.Println("open", err)
		return 1
	}
	if what != "later" {
		go func() {
			io.Copy(io.Discard, os.Stdin)
			os.Exit(0)
		}()
	}
	for {
		r, err := st.Recv()
		if err != nil {
			fmt.Println(status.Code(err))
			return 1
		}
		fmt.Println(ids(r))
		if what == "later" {
			os.Stdin.Read(make([]byte, 1))
		}
		if what == "exec" || what == "later" {
			return execute()
		}
	}
}

func execute() int {
	err := syscall.Exec("/bin/sh", []string{"sh", "-c", "echo executed; cat >/dev/null"}, nil)
	fmt.Println(err)
	return 1
}

// half does not return but for an error.
func half(socket string) error {
	conn, err := net.Dial("unix", socket)
	if err != nil {
		return err
	}
	entry, err := proto.Marshal(&adminv1.CreateEntryRequest{Entry: &adminv1.Entry{Entry: spire(func(*types.Entry) {})}})
	if err != nil {
		return err
	}
	// Before it stands so much that the daemon says when it has read that.
	said := protowire.AppendBytes(protowire.AppendTag(nil, 99, protowire.BytesType), make([]byte, streamWindow/2))
	said = append(said, entry...)
	last := len(said) - 1
	fr := http2.NewFramer(conn, conn)
	io.WriteString(conn, http2.ClientPreface)
	fr.WriteSettings()
	for heard := false; !heard; {
		frame, err := fr.ReadFrame()
		if err != nil {
			return err
		}
		switch f := frame.(type) {
		case *http2.PingFrame:
			if f.IsAck() {
				continue
			}
			fr.WritePing(true, f.Data)
			var b bytes.Buffer
			e := hpack.NewEncoder(&b)
			for _, f := range []hpack.HeaderField{
				{Name: ":method", Value: "POST"}, {Name: ":scheme", Value: "http"}, {Name: ":path", Value: "/deputy.admin.v1.Admin/CreateEntry"},
				{Name: ":authority", Value: "localhost"}, {Name: "content-type", Value: "application/grpc"}, {Name: "te", Value: "trailers"},
			} {
				e.WriteField(f)
			}
			fr.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: b.Bytes(), EndHeaders: true})
			for from := announce(len(said), said[:last]...); len(from) > 0; {
				n := min(len(from), 16<<10)
				fr.WriteData(1, false, from[:n])
				from = from[n:]
			}
		case *http2.WindowUpdateFrame:
			heard = f.StreamID == 1
		}
	}
	raw, err := conn.(*net.UnixConn).SyscallConn()
	if err != nil {
		return err
	}
	raw.Control(func(fd uintptr) { err = unix.Dup2(int(fd), 9) })
	if err == nil {
		err = unix.SetNonblock(9, false)
	}
	if err != nil {
		return err
	}
	var end bytes.Buffer
	http2.NewFramer(&end, nil).WriteData(1, true, said[last:])
	script := fmt.Sprintf(`printf '%s' >&9; grep -a -o -m 1 -e '%s' -e '%s' <&9 2>&1; echo over $?; cat >/dev/null`, octal(end.Bytes()), peer.ErrProgramChanged, domain)
	return syscall.Exec("/bin/sh", []string{"sh", "-c", script}, os.Environ())
}

func octal(b []byte) (s string) {
	for _, c := range b {
		s += fmt.Sprintf(`\%03o`, c)
	}
	return s
}

func secretsClient(c *grpc.ClientConn, what string) int {
	st, err := secretv3.NewSecretDiscoveryServiceClient(c).StreamSecrets(context.Background())
	if err == nil {
		err = st.Send(&discoveryv3.DiscoveryRequest{ResourceNames: []string{"default"}})
	}
	if err != nil {
		fmt.Println("open", err)
		return 1
	}
	go func() {
		io.Copy(io.Discard, os.Stdin)
		os.Exit(0)
	}()
	for {
		r, err := st.Recv()
		if err != nil {
			fmt.Println(status.Code(err))
			return 1
		}
		fmt.Println(len(r.Resources), "secrets")
		if what == "sdsexec" {
			return execute()
		}
	}
}

// keepAcrossExec lets the next program have the descriptor.
func keepAcrossExec(c *net.UnixConn) {
	raw, err := c.SyscallConn()
	if err == nil {
		raw.Control(func(fd uintptr) { unix.FcntlInt(fd, unix.F_SETFD, 0) })
	}
}

type process struct {
	*osexec.Cmd
	in  io.WriteCloser
	out *bufio.Scanner
}

// process starts a client.
func (w *world) process() *process { return w.run(w.socket) }

// sleeper starts a process that only waits for the end of its input.
func (w *world) sleeper() *process { return w.run("sleep") }

func (w *world) run(what string) *process { return w.runAs(nil, what) }

func (w *world) runAs(attr *syscall.SysProcAttr, what string) *process {
	w.t.Helper()
	cmd := osexec.Command("/proc/self/exe") // which other users can execute, wherever the test binary lies
	cmd.Env = append(os.Environ(), "ENDPOINT_TEST_CLIENT="+what)
	cmd.SysProcAttr = attr
	in, err := cmd.StdinPipe()
	if err != nil {
		w.t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		w.t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() {
		in.Close()
		cmd.Wait()
	})
	return &process{cmd, in, bufio.NewScanner(out)}
}

// execute tells the client to execute another program, which then waits for
// the end of its input. It may have been told already, and be gone.
func (p *process) execute() { p.in.Write([]byte("\n")) }

func (p *process) says(t testing.TB, want string) {
	t.Helper()
	if !p.out.Scan() {
		t.Fatalf("the client ended, want %q", want)
	}
	if got := p.out.Text(); got != want {
		t.Fatalf("the client got %q, want %q", got, want)
	}
}

func TestTwoProcessesShareNoKey(t *testing.T) {
	w := start(t)
	w.entry("/a", nil, mine)
	p := w.process()
	p.says(t, "[/a]")
	r := recv(t, x509Stream(t, w.workloadAPI()), "/a")
	w.mu.Lock()
	defer w.mu.Unlock()
	if len(w.sessions) != 2 {
		t.Fatalf("got %d sessions, want one for each process", len(w.sessions))
	}
	keys := 0
	for _, s := range w.sessions {
		var has workload.X509SVIDResponse
		if err := unmarshal(s.x509.Load().body, &has); err != nil {
			t.Fatal(err)
		}
		if string(has.Svids[0].X509SvidKey) == string(r.Svids[0].X509SvidKey) {
			keys++
		}
	}
	if keys != 1 {
		t.Errorf("%d processes have the key of this one, want itself alone", keys)
	}
}

func TestExitDropsSessionAndStreams(t *testing.T) {
	w := start(t)
	w.entry("/a", nil, mine)
	p := w.process()
	p.says(t, "[/a]")
	w.mu.Lock()
	var s *session
	for _, s = range w.sessions {
	}
	w.mu.Unlock()
	p.in.Close()
	<-s.proc.Done()
	p.Wait()
	eventually(t, "the session is dropped", func() bool {
		w.mu.Lock()
		defer w.mu.Unlock()
		return len(w.sessions) == 0
	})
	eventually(t, "its streams and connections are given back", func() bool {
		w.budget.mu.Lock()
		defer w.budget.mu.Unlock()
		return w.budget.conns == 0 && w.budget.streams.Load() == 0
	})
}

func TestStopEndsStreams(t *testing.T) {
	w := start(t)
	w.entry("/a", nil, mine)
	st := x509Stream(t, w.workloadAPI())
	recv(t, st, "/a")
	w.Server.stop()
	_, err := st.Recv()
	wantCode(t, err, codes.Unavailable)
}
