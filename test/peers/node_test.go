package peers

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/deputy-id/deputy/test/page"
	"github.com/deputy-id/deputy/test/scratch"
)

// nodeModules makes a directory with Node's gRPC client and the Workload API's
// contract, once for this machine.
var nodeModules = sync.OnceValues(func() (string, error) {
	packages := []string{"@grpc/grpc-js@1.14.7", "@grpc/proto-loader@0.8.1"}
	dir := cached("node-" + strings.NewReplacer("@", "", "/", "-").Replace(strings.Join(packages, "-")))
	if _, err := os.Stat(filepath.Join(dir, "workload.proto")); err == nil {
		return dir, nil
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return "", err
	}
	if out, err := exec.Command("npm", append([]string{"install", "--silent", "--prefix", dir}, packages...)...).CombinedOutput(); err != nil {
		return "", fmt.Errorf("install %s: %w\n%s", packages, err, out)
	}
	spiffe, err := exec.Command("go", "list", "-m", "-f", "{{.Dir}}", "github.com/spiffe/go-spiffe/v2").Output()
	if err != nil {
		return "", fmt.Errorf("find go-spiffe: %w", err)
	}
	contract, err := os.ReadFile(filepath.Join(strings.TrimSpace(string(spiffe)), "proto/spiffe/workload/workload.proto"))
	if err != nil {
		return "", err
	}
	return dir, os.WriteFile(filepath.Join(dir, "workload.proto"), contract, 0o644)
})

// The README's lines, under deputy exec with a name and without.
func TestNodeAgentOfTheReadme(t *testing.T) {
	dir := built(t, nodeModules)
	d := start(t, "peers.example", "")
	script := scratch.Write(t, filepath.Join(d.Dir, "agent.js"), page.Open(t, "../../README.md").Blocks(t, "js")[0])
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	agent := func(args ...string) *exec.Cmd {
		args = append([]string{"exec", "--socket", d.Workload, "--admin-socket", d.Admin}, args...)
		c := exec.CommandContext(ctx, d.Binary, append(args, "--", "node", script)...)
		c.Dir, c.Env = dir, append(os.Environ(), "NODE_PATH="+filepath.Join(dir, "node_modules"))
		c.Cancel = func() error { return c.Process.Signal(os.Interrupt) }
		return c
	}

	named := agent("--name", "researcher", "--entry", "/agent/researcher")
	out, err := named.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	named.Stderr = os.Stderr
	if err := named.Start(); err != nil {
		t.Fatal(err)
	}
	// Its stream stays open, and so does the agent.
	got, err := bufio.NewReader(out).ReadString('\n')
	if want := "spiffe://peers.example/agent/researcher\n"; got != want {
		t.Errorf("got %q, %v, want %q", got, err, want)
	}
	named.Process.Signal(os.Interrupt)
	named.Wait()

	nameless, err := agent().CombinedOutput()
	if err == nil {
		t.Error("an agent without a name got an identity")
	}
	contains(t, string(nameless), "no identity issued")
}
