// Package peers runs unmodified third parties against Deputy's binaries. It is
// a module of its own, so that what they depend on is no dependency of ours.
package peers

import (
	"bytes"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// spireVersion is that of spire/go.mod.
const spireVersion = "1.15.3"

// spireServer builds SPIRE's server, whose command line is a client of the
// admin socket, once for this machine.
var spireServer = sync.OnceValues(func() (string, error) { return buildSPIRE("server") })

func buildSPIRE(part string) (string, error) {
	name := "spire-" + part
	return buildIn("spire", name+"-"+spireVersion, "github.com/spiffe/spire/cmd/"+name)
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

// buildAlone builds a program that the module in the directory of its name
// pins, with what it requires and nobody else.
func buildAlone(name, module, pkg string) (string, error) {
	cmd := exec.Command("go", "list", "-m", "-f", "{{.Version}}", module)
	cmd.Dir = name
	version, err := cmd.Output()
	if err != nil {
		return "", fmt.Errorf("read the version of %s: %w", module, err)
	}
	return buildIn(name, name+"-"+strings.TrimPrefix(strings.TrimSpace(string(version)), "v"), pkg)
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

// deputy builds the daemon from the module above.
var deputy = sync.OnceValues(func() (string, error) {
	dir, err := os.MkdirTemp("", "deputy-peers-")
	if err != nil {
		return "", err
	}
	scratch = append(scratch, dir)
	path := filepath.Join(dir, "deputy")
	cmd := exec.Command("go", "build", "-o", path, "./cmd/deputy")
	cmd.Dir = "../.."
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("build deputy: %w\n%s", err, out)
	}
	return path, nil
})

// plugins builds those of SPIRE's plugins that are ours, and what the tests of
// them run, and returns their directory.
var plugins = sync.OnceValues(func() (string, error) {
	dir, err := os.MkdirTemp("", "deputy-peers-")
	if err != nil {
		return "", err
	}
	scratch = append(scratch, dir)
	cmd := exec.Command("go", "build", "-o", dir+"/", "./cmd/deputy-claims", "./cmd/deputy-attest", "./test/agent", "./test/composer", "./test/container")
	cmd.Dir = "../.."
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("build the plugins: %w\n%s", err, out)
	}
	return dir, nil
})

// scratch are directories of binaries to remove in the end.
var scratch []string

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
	for _, dir := range scratch {
		os.RemoveAll(dir)
	}
	os.Exit(code)
}

// A daemon is a running deputy with its directory.
type daemon struct {
	binary, dir, workload, admin string
}

// start runs a daemon for the length of the test, with these lines of
// configuration after its trust domain and sockets.
func start(t *testing.T, trustDomain, config string) *daemon {
	t.Helper()
	binary, err := deputy()
	if err != nil {
		t.Fatal(err)
	}
	dir, err := os.MkdirTemp("", "dp") // t.TempDir is too long for a socket
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	d := &daemon{binary, dir, filepath.Join(dir, "public/w.sock"), filepath.Join(dir, "private/a.sock")}
	file := filepath.Join(dir, "deputy.hcl")
	text := fmt.Sprintf("trust_domain = %q\ndata_dir = %q\nworkload_socket { path = %q }\nadmin_socket { path = %q }\n%s",
		trustDomain, filepath.Join(dir, "data"), d.workload, d.admin, config)
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	var log bytes.Buffer
	cmd := exec.Command(binary, "run", "--config", file)
	cmd.Stderr = &log
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cmd.Process.Signal(syscall.SIGTERM)
		if err := cmd.Wait(); err != nil {
			t.Errorf("deputy run: %v", err)
		}
		if t.Failed() {
			t.Logf("log of the daemon:\n%s", &log)
		}
	})
	for end := time.Now().Add(20 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		if exec.Command(binary, "health", "--socket", d.workload).Run() == nil {
			return d
		}
		if time.Now().After(end) {
			t.Fatalf("deputy did not become healthy:\n%s", &log)
		}
	}
}

// run runs a command, wants it to succeed and returns its output.
func run(t *testing.T, name string, args ...string) string {
	t.Helper()
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", filepath.Base(name), strings.Join(args, " "), err, out)
	}
	return string(out)
}

// fail runs a command, wants it to fail and returns its output.
func fail(t *testing.T, name string, args ...string) string {
	t.Helper()
	out, err := exec.Command(name, args...).CombinedOutput()
	if err == nil {
		t.Fatalf("%s %s: got success, want failure\n%s", filepath.Base(name), strings.Join(args, " "), out)
	}
	return string(out)
}
