package main

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/deputy-id/deputy/test/engine"
)

// A container is the image of an agent on an engine of the demonstration's own.
type container struct {
	engine *engine.Engine
	digest string // selector of the image
}

// container starts an engine, which installs Docker's if the machine has none,
// and makes the image of an agent.
func (s *stage) container() (*container, error) {
	if _, err := exec.LookPath("dockerd"); err != nil {
		fmt.Println("    If this machine has none, Debian's docker.io is installed now.")
	}
	e, err := engine.Open()
	if err != nil {
		return nil, err
	}
	s.closers = append(s.closers, func() {
		if err := e.Close(); err != nil {
			fmt.Fprintln(os.Stderr, "demo: end the engine:", err)
		}
	})
	image, err := s.image()
	if err != nil {
		return nil, err
	}
	load := e.Command("import", "--change", `ENTRYPOINT ["/agent"]`, "-", "crawler:demo")
	load.Stdin = image
	if out, err := load.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("import the image: %w: %s", err, out)
	}
	id, err := e.Command("image", "inspect", "--format", "{{.Id}}", "crawler:demo").Output()
	if err != nil {
		return nil, fmt.Errorf("inspect the image: %w", err)
	}
	fmt.Println("    An engine of our own runs, with an image around one static binary.")
	return &container{e, "image:config_digest:" + strings.TrimSpace(string(id))}, nil
}

// image is a root file system that holds the agent alone.
func (s *stage) image() (*bytes.Buffer, error) {
	program, err := os.ReadFile(s.agent)
	if err != nil {
		return nil, err
	}
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	if err := w.WriteHeader(&tar.Header{Name: "agent", Mode: 0o755, Size: int64(len(program))}); err != nil {
		return nil, err
	}
	if _, err := w.Write(program); err != nil {
		return nil, err
	}
	return &b, w.Close()
}

// show runs the agent in a container and prints what was attested of it.
func (c *container) show(ctx context.Context, s *stage) error {
	public := filepath.Dir(s.workload)
	out, err := c.engine.Command("run", "-d", "--network", "none", "--name", "crawler", "-v", public+":"+public+":ro", "crawler:demo", "stay", s.workload).CombinedOutput()
	if err != nil {
		return fmt.Errorf("run: %w: %s", err, out)
	}
	s.closers = append(s.closers, func() { c.engine.Command("rm", "-f", "crawler").Run() })
	var said []byte
	for end := time.Now().Add(15 * time.Second); len(said) == 0; time.Sleep(100 * time.Millisecond) {
		if said, err = c.engine.Command("logs", "crawler").CombinedOutput(); err != nil {
			return err
		}
		if time.Now().After(end) || ctx.Err() != nil {
			return errors.New("the crawler said nothing")
		}
	}
	out, err = c.engine.Command("inspect", "--format", "{{.State.Pid}}", "crawler").Output()
	if err != nil {
		return err
	}
	var pid int
	if _, err := fmt.Sscan(string(out), &pid); err != nil {
		return err
	}
	if !strings.Contains(string(said), crawlerID) {
		return fmt.Errorf("the crawler got %s", said)
	}
	fmt.Printf("    PID %d\n", pid)
	if err := s.attested(pid, "cgroup:path", "container:name", "image:config_digest", "process:leader"); err != nil {
		return err
	}
	fmt.Printf("  so it is %s", said)
	return nil
}
