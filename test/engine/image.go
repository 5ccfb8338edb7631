package engine

import (
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// An Image is one that is made from nothing but a static program, which is
// /program in it and its entry point.
type Image struct {
	Name    string            // tag; empty for none
	Program string            // path of the program; empty for the test agent
	Labels  map[string]string // of the image, and so of its containers
	Env     map[string]string
	Content string // of a file beside the program: two contents make two images
}

// Image makes an image and returns its ID, sha256:….
func (e *Engine) Image(tb testing.TB, im Image) string {
	tb.Helper()
	program := im.Program
	if program == "" {
		program = e.Build(tb, "github.com/deputy-id/deputy/test/agent")
	}
	dir := filepath.Join(e.dir, "context-"+strconv.FormatInt(e.number(), 10))
	if err := os.Mkdir(dir, 0o700); err != nil {
		tb.Fatal(err)
	}
	defer os.RemoveAll(dir)
	var file strings.Builder
	file.WriteString("FROM scratch\nCOPY program content /\n")
	for _, k := range slices.Sorted(maps.Keys(im.Labels)) {
		fmt.Fprintf(&file, "LABEL %s=%s\n", strconv.Quote(k), quote(im.Labels[k]))
	}
	for _, k := range slices.Sorted(maps.Keys(im.Env)) {
		fmt.Fprintf(&file, "ENV %s=%s\n", k, quote(im.Env[k]))
	}
	file.WriteString("ENTRYPOINT [\"/program\"]\n")
	for name, content := range map[string]string{"Dockerfile": file.String(), "content": im.Content} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o644); err != nil {
			tb.Fatal(err)
		}
	}
	if err := os.Link(program, filepath.Join(dir, "program")); err != nil {
		b, err := os.ReadFile(program) // another file system
		if err != nil {
			tb.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, "program"), b, 0o755); err != nil {
			tb.Fatal(err)
		}
	}
	args := []string{"build", "--quiet"}
	if im.Name != "" {
		args = append(args, "--tag", im.Name)
	}
	return e.Docker(tb, append(args, dir)...)
}

// quote writes a value as a Dockerfile reads it: a dollar sign is a dollar sign.
func quote(s string) string { return strings.ReplaceAll(strconv.Quote(s), "$", `\$`) }

// Build builds a Go program, static, and returns its path. Each is built once.
func (e *Engine) Build(tb testing.TB, pkg string) string {
	tb.Helper()
	e.mu.Lock()
	defer e.mu.Unlock()
	if path := e.built[pkg]; path != "" {
		return path
	}
	path := filepath.Join(e.dir, "program-"+strconv.Itoa(len(e.built)))
	cmd := exec.Command("go", "build", "-trimpath", "-ldflags=-s -w", "-o", path, pkg)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		tb.Fatalf("build %s: %v: %s", pkg, err, out)
	}
	e.built[pkg] = path
	return path
}

// A Container is one that was started.
type Container struct {
	ID  string
	PID int // of its init process

	engine *Engine
}

// Run starts a container and removes it when the test ends. The arguments are
// those of docker run: options, the image, and the program's arguments.
func (e *Engine) Run(tb testing.TB, args ...string) *Container {
	tb.Helper()
	id := e.Docker(tb, append([]string{"run", "--detach", "--network", "none"}, args...)...)
	tb.Cleanup(func() {
		if out, err := e.run("rm", "--force", id); err != nil && !strings.Contains(err.Error(), "No such container") {
			tb.Errorf("remove container: %v %s", err, out)
		}
	})
	c := &Container{ID: id, engine: e}
	c.PID = c.Inspect(tb).State.Pid
	if c.PID == 0 {
		tb.Fatalf("container does not run: %s", e.Docker(tb, "logs", id))
	}
	return c
}

// Exec starts another process in the container and leaves it running until
// the container ends. It returns its PID.
func (c *Container) Exec(tb testing.TB, args ...string) int {
	tb.Helper()
	before := c.PIDs(tb)
	c.engine.Docker(tb, append([]string{"exec", "--detach", c.ID}, args...)...)
	for _, pid := range c.PIDs(tb) {
		if !slices.Contains(before, pid) {
			return pid
		}
	}
	tb.Fatalf("docker exec %v left no process", args)
	return 0
}

// PIDs are those of the container's processes, as the host numbers them.
func (c *Container) PIDs(tb testing.TB) []int {
	tb.Helper()
	lines := strings.Split(c.engine.Docker(tb, "top", c.ID, "-eo", "pid"), "\n")
	var pids []int
	for _, line := range lines[1:] {
		pid, err := strconv.Atoi(strings.TrimSpace(line))
		if err != nil {
			tb.Fatalf("docker top: %v", err)
		}
		pids = append(pids, pid)
	}
	return pids
}

// Logs are what the container's program has written so far.
func (c *Container) Logs(tb testing.TB) string {
	tb.Helper()
	return c.engine.Docker(tb, "logs", c.ID)
}

// Inspected is what tests want of docker inspect.
type Inspected struct {
	State struct {
		Pid       int
		Running   bool
		StartedAt string
	}
	Image string // ID
	Name  string // with a slash before it
}

// Inspect says what the engine knows of the container.
func (c *Container) Inspect(tb testing.TB) Inspected {
	tb.Helper()
	var in []Inspected
	if err := json.Unmarshal([]byte(c.engine.Docker(tb, "inspect", "--type", "container", c.ID)), &in); err != nil || len(in) != 1 {
		tb.Fatalf("docker inspect: %v (%d containers)", err, len(in))
	}
	return in[0]
}
