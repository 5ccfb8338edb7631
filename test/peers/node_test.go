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
	dir, err := nodeModules()
	if err != nil {
		t.Fatal(err)
	}
	d := start(t, "peers.example", "")
	script := filepath.Join(d.dir, "agent.js")
	if err := os.WriteFile(script, []byte(readme(t, "js")), 0o644); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	agent := func(args ...string) *exec.Cmd {
		args = append([]string{"exec", "--socket", d.workload, "--admin-socket", d.admin}, args...)
		c := exec.CommandContext(ctx, d.binary, append(args, "--", "node", script)...)
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
