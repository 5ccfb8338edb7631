// Package binary builds the programs that tests start, once for each test
// binary, whose TestMain removes them:
//
//	func TestMain(m *testing.M) {
//		code := m.Run()
//		binary.Remove()
//		os.Exit(code)
//	}
//
// It also makes the cache of test results honest. The go command takes a result
// from there unless a file that the test looked at has changed, and of what a
// compiler that the test started looked at it knows nothing; so the sources are
// looked at here.
package binary

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
)

// Version is what the built deputy says of itself.
const Version = "v0.0.0-test"

// shared is what this test binary has built.
var shared struct {
	mu    sync.Mutex // guards what follows
	dir   string
	built map[string]error // by package
}

// Deputy returns the path of deputy. Every user may execute it, and it has its
// directory to itself but for what else is built.
func Deputy(tb testing.TB) string {
	tb.Helper()
	return Program(tb, "cmd/deputy")
}

// Program builds a package of the module, named by its directory below the
// module's root, and returns the path of the static binary. All of them are in
// one directory.
func Program(tb testing.TB, pkg string) string {
	tb.Helper()
	root, err := moduleRoot()
	if err != nil {
		tb.Fatal(err)
	}
	shared.mu.Lock()
	defer shared.mu.Unlock()
	if shared.dir == "" {
		// A short name: sockets may come to stand below it.
		if shared.dir, err = os.MkdirTemp("", "dp"); err != nil {
			tb.Fatal(err)
		}
		if err := os.Chmod(shared.dir, 0o755); err != nil {
			tb.Fatal(err)
		}
		shared.built = make(map[string]error)
	}
	path := filepath.Join(shared.dir, filepath.Base(pkg))
	err, done := shared.built[pkg]
	if !done {
		err = errors.Join(look(root, pkg), Build(path, "./"+pkg))
		shared.built[pkg] = err
	}
	if err != nil {
		tb.Fatal(err)
	}
	return path
}

// Build builds a package into a file, in the way of Program, with more flags
// of go build.
func Build(path, pkg string, flags ...string) error {
	root, err := moduleRoot()
	if err != nil {
		return err
	}
	args := append([]string{"build", "-ldflags", "-X main.version=" + Version, "-o", path}, flags...)
	cmd := exec.Command("go", append(args, pkg)...)
	cmd.Dir = root
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("build %s: %w\n%s", pkg, err, out)
	}
	return nil
}

// Remove removes what was built.
func Remove() {
	shared.mu.Lock()
	defer shared.mu.Unlock()
	if shared.dir != "" {
		os.RemoveAll(shared.dir)
	}
}

// look stats the sources that a package may be built from: all that are no
// test's, and those below test for what is built there.
func look(root, pkg string) error {
	return filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case d.IsDir() && (d.Name() == ".git" || path == filepath.Join(root, "bin")):
			return fs.SkipDir
		case path == filepath.Join(root, "test") && !strings.HasPrefix(pkg, "test/"):
			return fs.SkipDir
		case filepath.Ext(path) == ".go" && !strings.HasSuffix(path, "_test.go") || d.Name() == "go.mod":
			_, err = os.Stat(path)
		}
		return err
	})
}

// moduleRoot is the directory of this module, at or above the working directory,
// which in a test is that of its package. Some tests have a module of their own
// below it.
func moduleRoot() (string, error) {
	dir, err := os.Getwd()
	if err != nil {
		return "", err
	}
	for {
		text, err := os.ReadFile(filepath.Join(dir, "go.mod"))
		if err == nil && strings.HasPrefix(string(text), "module github.com/deputy-id/deputy\n") {
			return dir, nil
		}
		parent := filepath.Dir(dir)
		if parent == dir {
			return "", errors.New("no module of deputy at or above the working directory")
		}
		dir = parent
	}
}
