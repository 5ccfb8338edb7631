// Package hardship runs the real daemon where things go wrong: clients that
// misbehave, disks that fill, clocks that jump, kernels that lack what is
// wanted, descriptors that run out, interpreters instead of programs. Whatever
// happens, nothing that was issued or stored is lost, and the daemon goes on
// for everybody else.
package hardship

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"net"
	"os"
	"os/exec"
	"strings"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/deputy-id/deputy/test/binary"
	"github.com/deputy-id/deputy/test/daemon"
	"github.com/deputy-id/deputy/test/engine"
	"github.com/deputy-id/deputy/test/process"
	"github.com/deputy-id/deputy/test/wait"
)

func TestMain(m *testing.M) {
	if play() {
		return
	}
	// They wait more than they work: for timeouts, and for each other's ends.
	flag.Parse()
	flag.Set("test.parallel", "6")
	code := engine.Main(m)
	binary.Remove()
	os.Exit(code)
}

// roleEnv names the part that a copy of this test binary plays.
const roleEnv = "DEPUTY_HARDSHIP_ROLE"

var roles = map[string]func(args []string) error{
	"hold":         hold,
	"older-kernel": olderKernel,
	"touch":        touch,
}

// play plays a role, if this copy has one.
func play() bool {
	role := os.Getenv(roleEnv)
	if role == "" {
		return false
	}
	os.Unsetenv(roleEnv)
	if err := roles[role](os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, role+":", err)
		os.Exit(1)
	}
	return true
}

// as is the command of a role.
func as(role string, args ...string) *exec.Cmd {
	cmd := exec.Command("/proc/self/exe", args...)
	cmd.Env = append(os.Environ(), roleEnv+"="+role)
	return cmd
}

// mine is an entry that this process holds, on which most tests look.
func mine() string {
	return fmt.Sprintf("entry \"/agent/me\" {\n  selectors = [\"unix:uid:%d\"]\n}\n", os.Getuid())
}

// A host is where a daemon runs.
type host struct{ *daemon.Daemon }

const trustDomain = "hard.example"

// newHost writes the configuration of a daemon that is still to be started.
func newHost(t *testing.T, config string) *host {
	t.Helper()
	return &host{daemon.New(t, trustDomain, config)}
}

// start runs a daemon until the end of the test.
func start(t *testing.T, config string) *host {
	t.Helper()
	return &host{daemon.Start(t, trustDomain, config)}
}

// refusesToStart wants the daemon to end with status 1 and these words.
func (d *host) refusesToStart(t *testing.T, words ...string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), wait.Patience)
	defer cancel()
	out, err := exec.CommandContext(ctx, d.Binary, d.Args()[1:]...).CombinedOutput()
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.ExitCode() != 1 {
		t.Fatalf("got %v, want status 1\n%s", err, out)
	}
	for _, w := range words {
		if !strings.Contains(string(out), w) {
			t.Errorf("got %q, want %q in it", out, w)
		}
	}
}

// fetches wants this process to get its identity now.
func (d *host) fetches(t *testing.T, id string) {
	t.Helper()
	if out := d.Run(t, "fetch", "x509"); !strings.Contains(out, "spiffe://hard.example"+id) {
		t.Fatalf("got %q, want spiffe://hard.example%s in it", out, id)
	}
}

// watch runs deputy watch, and returns when it has its first SVIDs.
func (d *host) watch(t *testing.T) *process.Process {
	t.Helper()
	p := process.Start(t, d.Command("watch"))
	p.Says(t, "update 1")
	return p
}

// dial opens a gRPC client on a socket.
func dial(t *testing.T, socket string) *grpc.ClientConn {
	t.Helper()
	conn, err := grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn
}

// connect opens a bare connection.
func connect(t *testing.T, socket string) net.Conn {
	t.Helper()
	conn, err := net.Dial("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn
}
