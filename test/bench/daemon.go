package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
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

// profiled runs f and writes what the daemon spent meanwhile.
func (o options) profiled(s *server, what string, f func() error) error {
	ended := make(chan error, 1)
	go func() { ended <- f() }()
	cpu, err := s.profile(adminv1.ProfileRequest_KIND_CPU, int32(max(o.length/time.Second, 1)))
	if err := errors.Join(err, <-ended); err != nil {
		return err
	}
	allocs, err := s.profile(adminv1.ProfileRequest_KIND_ALLOCS, 0)
	if err != nil {
		return err
	}
	return errors.Join(
		os.WriteFile(o.profile+"."+what+".cpu", cpu, 0o644),
		os.WriteFile(o.profile+"."+what+".allocs", allocs, 0o644), // since the daemon's start
	)
}

// profile takes one of the daemon.
func (s *server) profile(kind adminv1.ProfileRequest_Kind, seconds int32) ([]byte, error) {
	conn, err := dial(s.admin)
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	stream, err := adminv1.NewAdminClient(conn).Profile(context.Background(), &adminv1.ProfileRequest{Kind: kind, Seconds: seconds})
	if err != nil {
		return nil, err
	}
	var all []byte
	for {
		r, err := stream.Recv()
		if err == io.EOF {
			return all, nil
		}
		if err != nil {
			return nil, err
		}
		all = append(all, r.Chunk...)
	}
}

// collect makes the server collect its garbage.
func (s *server) collect() error {
	if s.admin == "" {
		return s.cmd.Process.Signal(syscall.SIGUSR1)
	}
	_, err := s.profile(adminv1.ProfileRequest_KIND_HEAP, 0)
	return err
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
