package main

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

// A stage is the directory and the processes of a demonstration.
type stage struct {
	dir, deputy, agent string
	workload, admin    string
	digest             string // SHA-256 of the agents' executable
	closers            []func()
}

// setUp makes the stage. Whatever happens after it, close must run.
func setUp() (*stage, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	s := &stage{deputy: filepath.Join(filepath.Dir(self), "deputy")}
	if _, err := os.Stat(s.deputy); err != nil {
		return nil, fmt.Errorf("the daemon's binary is not beside this one (make build): %w", err)
	}
	if s.dir, err = os.MkdirTemp("", "deputy-demo-"); err != nil {
		return nil, err
	}
	s.closers = append(s.closers, func() { os.RemoveAll(s.dir) })
	if err := os.Chmod(s.dir, 0o755); err != nil {
		return s, err
	}
	s.workload, s.admin = filepath.Join(s.dir, "public/workload.sock"), filepath.Join(s.dir, "private/admin.sock")
	s.agent = filepath.Join(s.dir, "agent")
	program, err := os.ReadFile(self)
	if err != nil {
		return s, err
	}
	sum := sha256.Sum256(program)
	s.digest = hex.EncodeToString(sum[:])
	return s, os.WriteFile(s.agent, program, 0o755)
}

// close undoes everything, the last first.
func (s *stage) close() {
	for i := len(s.closers) - 1; i >= 0; i-- {
		s.closers[i]()
	}
}

// An actor is a process that was started.
type actor struct {
	cmd   *exec.Cmd
	lines chan string // of its output
	log   bytes.Buffer
}

// start starts a process that ends with the stage.
func (s *stage) start(cmd *exec.Cmd) (*actor, error) {
	a := &actor{cmd: cmd, lines: make(chan string, 100)}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	cmd.Stderr = &a.log
	if cmd.SysProcAttr == nil {
		cmd.SysProcAttr = new(syscall.SysProcAttr)
	}
	cmd.SysProcAttr.Setpgid = true // an interrupt reaches the demonstration, which ends its actors
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	go func() {
		defer close(a.lines)
		for r := bufio.NewScanner(out); r.Scan(); {
			a.lines <- r.Text()
		}
		io.Copy(io.Discard, out)
	}()
	s.closers = append(s.closers, func() {
		cmd.Process.Signal(syscall.SIGTERM)
		kill := time.AfterFunc(5*time.Second, func() { cmd.Process.Kill() })
		cmd.Wait()
		kill.Stop()
	})
	return a, nil
}

// line is the next line of the actor's output.
func (a *actor) line(ctx context.Context, within time.Duration) (string, error) {
	select {
	case l, ok := <-a.lines:
		if !ok {
			return "", errors.New(strings.TrimSpace(a.log.String()))
		}
		return l, nil
	case <-ctx.Done():
		return "", ctx.Err()
	case <-time.After(within):
		return "", fmt.Errorf("%s said nothing for %s", filepath.Base(a.cmd.Path), within)
	}
}

// run starts the daemon with this configuration and waits until it serves.
func (s *stage) run(ctx context.Context, config string) error {
	file := filepath.Join(s.dir, "deputy.hcl")
	if err := os.WriteFile(file, []byte(config), 0o600); err != nil {
		return err
	}
	a, err := s.start(exec.Command(s.deputy, "run", "--config", file))
	if err != nil {
		return err
	}
	for end := time.Now().Add(15 * time.Second); time.Now().Before(end) && ctx.Err() == nil; time.Sleep(50 * time.Millisecond) {
		if exec.Command(s.deputy, "health", "--socket", s.workload).Run() == nil {
			return nil
		}
	}
	return fmt.Errorf("the daemon did not start:\n%s", &a.log)
}

// as is the command of an agent, under this user where we may choose.
func (s *stage) as(uid int, role string, args ...string) *exec.Cmd {
	cmd := exec.Command(s.agent, append([]string{role, s.workload}, args...)...)
	if os.Getuid() == 0 {
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uint32(uid), Gid: uint32(uid)}}
	}
	return cmd
}

// attested prints what the daemon knows of a process, as an operator sees it.
func (s *stage) attested(pid int, about ...string) error {
	out, err := exec.Command(s.deputy, "attest", fmt.Sprint(pid), "--admin-socket", s.admin).Output()
	if err != nil {
		return fmt.Errorf("attest %d: %w", pid, err)
	}
	for line := range strings.Lines(string(out)) {
		for _, prefix := range about {
			if strings.HasPrefix(line, prefix) {
				fmt.Print("    ", line)
				break
			}
		}
	}
	return nil
}
