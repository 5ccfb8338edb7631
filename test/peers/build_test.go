// Package peers runs unmodified third parties against Deputy's binaries. It is
// a module of its own, so that what they depend on is no dependency of ours.
package peers

import (
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/deputy-id/deputy/test/binary"
	"github.com/deputy-id/deputy/test/daemon"
	"github.com/deputy-id/deputy/test/process"
)

// spireServer builds SPIRE's server, whose command line is a client of the
// admin socket, once for this machine.
var spireServer = sync.OnceValues(func() (string, error) { return buildSPIRE("server") })

func buildSPIRE(part string) (string, error) {
	const module = "github.com/spiffe/spire"
	name := "spire-" + part
	return buildAlone("spire", name, module, module+"/cmd/"+name)
}

// cached is the path of what is made once for this machine: in the user's cache
// directory, if there is one.
func cached(name string) string {
	cache, err := os.UserCacheDir()
	if err != nil {
		cache = os.TempDir()
	}
	return filepath.Join(cache, "deputy-peers", name)
}

// buildAlone builds a program of the version that the module in a directory
// pins, with what that requires and nobody else.
func buildAlone(dir, name, module, pkg string) (string, error) {
	cmd := exec.Command("go", "list", "-m", "-f", "{{.Version}}", module)
	cmd.Dir = dir
	version, err := cmd.Output()
	if err != nil {
		return "", fmt.Errorf("read the version of %s: %w", module, err)
	}
	return buildIn(dir, name+"-"+strings.TrimPrefix(strings.TrimSpace(string(version)), "v"), pkg)
}

// buildIn keeps a binary in the user's cache directory, under a name that holds
// its version. It is built in the module of a directory.
func buildIn(dir, name, pkg string) (string, error) {
	path := cached(name)
	if _, err := os.Stat(path); err == nil {
		return path, nil
	}
	fmt.Fprintf(os.Stderr, "building %s (once; some minutes)\n", name)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return "", err
	}
	temp := fmt.Sprintf("%s.%d", path, os.Getpid())
	cmd := exec.Command("go", "build", "-o", temp, pkg)
	cmd.Dir = dir
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("build %s: %w\n%s", pkg, err, out)
	}
	return path, os.Rename(temp, path)
}

// built is what one of these builds.
func built(t testing.TB, build func() (string, error)) string {
	t.Helper()
	path, err := build()
	if err != nil {
		t.Fatal(err)
	}
	return path
}

// plugins builds those of SPIRE's plugins that are ours, and what the tests of
// them run, and returns their directory.
func plugins(t testing.TB) (dir string) {
	t.Helper()
	for _, pkg := range []string{"cmd/deputy-claims", "cmd/deputy-attest", "test/agent", "test/composer", "test/container"} {
		dir = filepath.Dir(binary.Program(t, pkg))
	}
	return dir
}

func TestMain(m *testing.M) {
	if dir := os.Getenv(cellRole); dir != "" {
		if err := runCell(dir); err != nil {
			fmt.Fprintln(os.Stderr, "cell:", err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	// Those in parallel wait more than they work.
	flag.Parse()
	flag.Set("test.parallel", "4")
	code := m.Run()
	binary.Remove()
	os.Exit(code)
}

// A host is where a daemon runs.
type host struct{ *daemon.Daemon }

// start runs a daemon for the length of the test, with these lines of
// configuration after its trust domain and sockets.
func start(t *testing.T, trustDomain, config string) *host {
	t.Helper()
	return &host{daemon.Start(t, trustDomain, config)}
}

// run runs a command, wants it to succeed and returns its output.
func run(t *testing.T, name string, args ...string) string {
	t.Helper()
	return process.Run(t, exec.Command(name, args...))
}

// fail runs a command, wants it to fail and returns its output.
func fail(t *testing.T, name string, args ...string) string {
	t.Helper()
	out, err := process.Try(exec.Command(name, args...))
	if err == nil {
		t.Fatalf("%s %s: got success, want failure\n%s", filepath.Base(name), strings.Join(args, " "), out)
	}
	return out
}
