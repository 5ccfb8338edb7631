package main

import (
	"archive/tar"
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

// A container is the image of an agent on an engine of the demonstration's own.
type container struct {
	socket string // of the engine
	digest string // selector of the image
}

// container starts an engine in the stage's directory, installing Docker's if
// the machine has none, and makes the image of an agent.
func (s *stage) container() (*container, error) {
	daemon, err := engine()
	if err != nil {
		return nil, err
	}
	dir := filepath.Join(s.dir, "docker")
	if err := os.Mkdir(dir, 0o700); err != nil {
		return nil, err
	}
	c := &container{socket: filepath.Join(dir, "d.sock")}
	cmd := exec.Command(daemon, "--iptables=false", "--ip6tables=false", "--bridge=none",
		"--data-root", filepath.Join(dir, "data"), "--exec-root", filepath.Join(dir, "exec"),
		"-H", "unix://"+c.socket, "-p", filepath.Join(dir, "pid"))
	var log bytes.Buffer
	cmd.Stdout, cmd.Stderr = &log, &log
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	s.closers = append(s.closers, func() {
		cmd.Process.Signal(syscall.SIGTERM)
		select {
		case <-ended:
		case <-time.After(15 * time.Second):
			cmd.Process.Kill()
		}
	})
	for end := time.Now().Add(20 * time.Second); c.docker("version").Run() != nil; time.Sleep(100 * time.Millisecond) {
		select {
		case err := <-ended:
			ended <- err
			return nil, fmt.Errorf("%s ended (%v): %s", daemon, err, last(log.String()))
		default:
		}
		if time.Now().After(end) {
			return nil, fmt.Errorf("%s did not answer: %s", daemon, last(log.String()))
		}
	}
	image, err := s.image()
	if err != nil {
		return nil, err
	}
	load := c.docker("import", "--change", `ENTRYPOINT ["/agent"]`, "-", "crawler:demo")
	load.Stdin = image
	if out, err := load.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("import the image: %w: %s", err, out)
	}
	id, err := c.docker("image", "inspect", "--format", "{{.Id}}", "crawler:demo").Output()
	if err != nil {
		return nil, fmt.Errorf("inspect the image: %w", err)
	}
	c.digest = "image:config_digest:" + strings.TrimSpace(string(id))
	fmt.Printf("    An engine of our own runs, with an image around one static binary.\n")
	return c, nil
}

// engine finds Docker's daemon, or installs it.
func engine() (string, error) {
	for _, p := range []string{"/usr/sbin/dockerd", "/usr/bin/dockerd", "/usr/local/bin/dockerd"} {
		if _, err := os.Stat(p); err == nil {
			return p, nil
		}
	}
	if _, err := exec.LookPath("apt-get"); err != nil {
		return "", fmt.Errorf("no dockerd, and no apt-get to install it with")
	}
	fmt.Println("    This machine has none: installing Debian's docker.io.")
	for _, args := range [][]string{{"update", "-q"}, {"install", "-y", "-q", "--no-install-recommends", "docker.io"}} {
		cmd := exec.Command("apt-get", args...)
		cmd.Env = append(os.Environ(), "DEBIAN_FRONTEND=noninteractive")
		if out, err := cmd.CombinedOutput(); err != nil {
			return "", fmt.Errorf("apt-get %s: %w: %s", args[0], err, last(string(out)))
		}
	}
	return "/usr/sbin/dockerd", nil
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

func (c *container) docker(args ...string) *exec.Cmd {
	return exec.Command("docker", append([]string{"-H", "unix://" + c.socket}, args...)...)
}

// show runs the agent in a container and prints what was attested of it.
func (c *container) show(s *stage) error {
	public := filepath.Dir(s.workload)
	out, err := c.docker("run", "-d", "--network", "none", "--name", "crawler", "-v", public+":"+public+":ro", "crawler:demo", "stay", s.workload).CombinedOutput()
	if err != nil {
		return fmt.Errorf("run: %w: %s", err, out)
	}
	s.closers = append(s.closers, func() { c.docker("rm", "-f", "crawler").Run() })
	var said []byte
	for end := time.Now().Add(15 * time.Second); len(said) == 0; time.Sleep(100 * time.Millisecond) {
		if said, err = c.docker("logs", "crawler").CombinedOutput(); err != nil {
			return err
		}
		if time.Now().After(end) {
			return fmt.Errorf("the crawler said nothing")
		}
	}
	out, err = c.docker("inspect", "--format", "{{.State.Pid}}", "crawler").Output()
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

func last(text string) string {
	lines := strings.Split(strings.TrimSpace(text), "\n")
	return lines[len(lines)-1]
}
