package peers

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"

	"github.com/deputy-id/deputy/test/loopback"
	"github.com/deputy-id/deputy/test/process"
	"github.com/deputy-id/deputy/test/scratch"
	"github.com/deputy-id/deputy/test/wait"
)

// spireAgent builds SPIRE's agent, once for this machine.
var spireAgent = sync.OnceValues(func() (string, error) { return buildSPIRE("agent") })

const node = "spiffe://example.org/node"

// A spire is a stock server and a stock agent with our plugins, started from
// the sample files.
type spire struct {
	dir        string
	serverBin  string
	agentBin   string
	serverSock string
	workload   string // the agent's socket, in a directory that a container may mount
	rules      string // file
	server     *process.Process
	agent      *process.Process
}

// Changes to the sample files, beyond their paths.
type changes struct {
	server, agent func(string) string // nil: none
	rules         string              // empty: the sample's
}

// newSPIRE builds what is missing and writes the configuration; nothing runs yet.
func newSPIRE(t testing.TB, c changes) *spire {
	t.Helper()
	bin := plugins(t)
	s := &spire{dir: scratch.Dir(t), serverBin: built(t, spireServer), agentBin: built(t, spireAgent)}
	s.serverSock, s.rules = s.path("server.sock"), s.path("claims.hcl")
	s.workload = s.path("public/w.sock")
	for _, dir := range []string{"server", "agent", "public"} {
		if err := os.Mkdir(s.path(dir), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	paths := strings.NewReplacer(
		`"8081"`, fmt.Sprintf(`"%d"`, loopback.Port(t)),
		"/run/spire/server/private/api.sock", s.serverSock,
		"/run/spire/agent/public/api.sock", s.workload,
		"/var/lib/spire", s.dir,
		"/etc/spire", s.dir,
		"/opt/deputy/bin", bin,
	)
	for name, change := range map[string]func(string) string{"server.conf": c.server, "agent.conf": c.agent} {
		text := paths.Replace(sample(t, name))
		// So that a test need not wait for what a fleet may.
		text = strings.Replace(text, "server {\n", "server {\n  experimental {\n    cache_reload_interval = \"500ms\"\n  }\n", 1)
		text = strings.Replace(text, "agent {\n", "agent {\n  experimental {\n    sync_interval = \"1s\"\n  }\n", 1)
		if change != nil {
			text = change(text)
		}
		plugin := "deputy-claims"
		if name == "agent.conf" {
			plugin = "deputy-attest"
		}
		if none := strings.Repeat("0", 64); strings.Contains(text, none) {
			text = strings.ReplaceAll(text, none, checksum(t, filepath.Join(bin, plugin)))
		}
		s.write(t, name, text)
	}
	if c.rules == "" {
		c.rules = sample(t, "claims.hcl")
	}
	s.write(t, "claims.hcl", c.rules)
	return s
}

func (s *spire) path(name string) string { return filepath.Join(s.dir, name) }

// write replaces a file as an editor or a configuration map does: by a rename.
func (s *spire) write(t testing.TB, name, text string) {
	t.Helper()
	scratch.Replace(t, s.path(name), text)
}

func (s *spire) read(t testing.TB, name string) string {
	t.Helper()
	b, err := os.ReadFile(s.path(name))
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func sample(t testing.TB, name string) string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join("../../conf/samples/spire", name))
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func checksum(t testing.TB, path string) string {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return fmt.Sprintf("%x", sha256.Sum256(b))
}

// startServer starts the server and waits until it answers.
func (s *spire) startServer(t testing.TB) {
	t.Helper()
	s.server = process.Start(t, exec.Command(s.serverBin, "run", "-config", s.path("server.conf")))
	s.ready(t, s.server, s.serverSock)
	s.write(t, "bundle.pem", s.cli(t, "bundle", "show"))
}

// startAgent starts the agent, which joins by a token, and waits for its socket.
func (s *spire) startAgent(t testing.TB) {
	t.Helper()
	_, token, ok := strings.Cut(s.cli(t, "token", "generate", "-spiffeID", node), "Token: ")
	if !ok {
		t.Fatal("the server gave no token")
	}
	token, _, _ = strings.Cut(token, "\n")
	s.agent = process.Start(t, exec.Command(s.agentBin, "run", "-config", s.path("agent.conf"), "-joinToken", strings.TrimSpace(token)))
	s.ready(t, s.agent, s.workload)
}

func (s *spire) ready(t testing.TB, r *process.Process, socket string) {
	t.Helper()
	r.Until(t, socket, func() bool {
		conn, err := net.Dial("unix", socket)
		if err != nil {
			return false
		}
		conn.Close()
		return true
	})
}

// cli runs a command of the server's own command line.
func (s *spire) cli(t testing.TB, noun, verb string, args ...string) string {
	t.Helper()
	return process.Run(t, exec.Command(s.serverBin, append([]string{noun, verb, "-socketPath", s.serverSock}, args...)...))
}

// entry registers an ID for the workloads that have all of the selectors.
func (s *spire) entry(t testing.TB, path string, selectors ...string) {
	t.Helper()
	args := []string{"-parentID", node, "-spiffeID", "spiffe://example.org" + path}
	for _, one := range selectors {
		args = append(args, "-selector", one)
	}
	s.cli(t, "entry", "create", args...)
}

// jwt fetches a token for an ID from the agent, as this process.
func (s *spire) jwt(path, audience string) (*jwtsvid.SVID, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	return workloadapi.FetchJWTSVID(ctx, jwtsvid.Params{
		Audience: audience, Subject: spiffeid.RequireFromString("spiffe://example.org" + path),
	}, workloadapi.WithAddr("unix://"+s.workload))
}

// mustJWT is jwt, which may take until the agent has heard of its entries.
func (s *spire) mustJWT(t testing.TB, path, audience string) *jwtsvid.SVID {
	t.Helper()
	var svid *jwtsvid.SVID
	wait.Until(t, "a token of "+path, func() (ok bool) {
		var err error
		svid, err = s.jwt(path, audience)
		return err == nil
	})
	return svid
}

// children lists the processes below a process that run the program of this name.
func children(t testing.TB, parent int, name string) (pids []int) {
	t.Helper()
	tasks, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", parent))
	if err != nil || len(tasks) == 0 {
		t.Fatalf("list the children of %d: %v", parent, err)
	}
	for _, file := range tasks {
		b, err := os.ReadFile(file)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		for _, field := range bytes.Fields(b) {
			pid, err := strconv.Atoi(string(field))
			if err != nil {
				t.Fatal(err)
			}
			if exe, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", pid)); err == nil && filepath.Base(exe) == name {
				pids = append(pids, pid)
			}
		}
	}
	return pids
}

// without takes a plugin's block out of a sample.
func without(plugin string) func(string) string {
	block := regexp.MustCompile(`(?ms)^  ` + regexp.QuoteMeta(plugin) + ` \{.*?^  \}\n`)
	return func(text string) string { return block.ReplaceAllString(text, "") }
}
