package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	adminv1 "github.com/deputy-id/deputy/proto/deputy/admin/v1"
)

// A server is a process that is measured.
type server struct {
	cmd    *exec.Cmd
	socket string
	admin  string // Deputy's alone
	log    *bytes.Buffer
}

func start(cmd *exec.Cmd, socket string) (*server, error) {
	s := &server{cmd: cmd, socket: socket, log: new(bytes.Buffer)}
	cmd.Stderr = s.log
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGTERM}
	os.Remove(socket)
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	for end := time.Now().Add(15 * time.Second); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		if _, err := os.Stat(socket); err == nil {
			return s, nil
		}
	}
	s.stop()
	return nil, fmt.Errorf("%s did not open %s:\n%s", cmd.Path, socket, s.log)
}

func (s *server) stop() {
	s.cmd.Process.Signal(syscall.SIGTERM)
	s.cmd.Wait()
}

// startDeputy runs a daemon in the directory, with these further lines of configuration.
func startDeputy(binary, dir, extra string) (*server, error) {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	socket, admin := filepath.Join(dir, "public/w.sock"), filepath.Join(dir, "private/a.sock")
	file := filepath.Join(dir, "deputy.hcl")
	err := os.WriteFile(file, fmt.Appendf(nil, `
trust_domain = "bench.example"
data_dir     = %q
log_level    = "warn"
workload_socket { path = %q }
admin_socket { path = %q }
%s`, filepath.Join(dir, "data"), socket, admin, extra), 0o600)
	if err != nil {
		return nil, err
	}
	s, err := start(exec.Command(binary, "run", "--config", file), socket)
	if err != nil {
		return nil, err
	}
	s.admin = admin
	return s, nil
}

// collect makes the server collect its garbage.
func (s *server) collect() error {
	if s.admin == "" {
		return s.cmd.Process.Signal(syscall.SIGUSR1)
	}
	conn, err := dial(s.admin)
	if err != nil {
		return err
	}
	defer conn.Close()
	stream, err := adminv1.NewAdminClient(conn).Profile(context.Background(), &adminv1.ProfileRequest{Kind: adminv1.ProfileRequest_KIND_HEAP})
	if err != nil {
		return err
	}
	for {
		if _, err := stream.Recv(); err != nil {
			return nil
		}
	}
}

// resident is the resident set in KiB after a garbage collection.
func (s *server) resident() (int, error) {
	for range 2 {
		if err := s.collect(); err != nil {
			return 0, err
		}
		time.Sleep(500 * time.Millisecond)
	}
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", s.cmd.Process.Pid))
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(status)) {
		if f := strings.Fields(line); len(f) > 1 && f[0] == "VmRSS:" {
			return strconv.Atoi(f[1])
		}
	}
	return 0, errors.New("no VmRSS")
}

// cpu is the processor time that the server has used.
func (s *server) cpu() (time.Duration, error) {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", s.cmd.Process.Pid))
	if err != nil {
		return 0, err
	}
	f := strings.Fields(string(stat[bytes.LastIndexByte(stat, ')')+1:]))
	user, err := strconv.Atoi(f[11])
	if err != nil {
		return 0, err
	}
	system, err := strconv.Atoi(f[12])
	return time.Duration(user+system) * 10 * time.Millisecond, err // USER_HZ is 100
}
