// Package daemon runs the real daemon for tests, on a configuration of theirs:
//
//	d := daemon.Start(t, "example.org", `entry "/agent/x" { selectors = ["unix:uid:0"] }`)
//	d.Run(t, "fetch", "x509")
//
// It ends with the test, which fails if it does not end well or has ended
// before; then the end of its log is shown.
package daemon

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/deputy-id/deputy/test/binary"
	"github.com/deputy-id/deputy/test/process"
	"github.com/deputy-id/deputy/test/scratch"
	"github.com/deputy-id/deputy/test/wait"
)

// A Daemon is a daemon and its place on this machine.
type Daemon struct {
	Binary string // deputy
	Dir    string // what /run/deputy is in earnest, with its other files too

	// Where its files and sockets are. A test may change them and then configure
	// it anew.
	Config, Data, Workload, Admin string

	*process.Process // that was started last

	trustDomain string
}

// New makes a place for a daemon that does not run yet.
//
// To the configuration it adds the trust domain, unless that is empty and so
// the configuration's own business, data_dir and the sockets. Dir stands in it
// as /run/deputy.
func New(tb testing.TB, trustDomain, config string) *Daemon {
	tb.Helper()
	dir := scratch.Dir(tb)
	d := &Daemon{
		Binary:      binary.Deputy(tb),
		Dir:         dir,
		Config:      filepath.Join(dir, "deputy.hcl"),
		Data:        filepath.Join(dir, "data"),
		Workload:    filepath.Join(dir, "public/workload.sock"),
		Admin:       filepath.Join(dir, "private/admin.sock"),
		trustDomain: trustDomain,
	}
	d.Configure(tb, config)
	return d
}

// Start makes a place and runs a daemon in it.
func Start(tb testing.TB, trustDomain, config string) *Daemon {
	tb.Helper()
	d := New(tb, trustDomain, config)
	d.Start(tb)
	return d
}

// Text is the whole of a configuration.
func (d *Daemon) Text(config string) string {
	head := fmt.Sprintf("data_dir = %q\nworkload_socket { path = %q }\nadmin_socket { path = %q }\n", d.Data, d.Workload, d.Admin)
	if d.trustDomain != "" {
		head = fmt.Sprintf("trust_domain = %q\n", d.trustDomain) + head
	}
	return head + strings.ReplaceAll(config, "/run/deputy/", d.Dir+"/")
}

// Configure puts a configuration in the place of the one before.
func (d *Daemon) Configure(tb testing.TB, config string) {
	tb.Helper()
	scratch.Replace(tb, d.Config, d.Text(config))
}

// Args is the command line by which it is started.
func (d *Daemon) Args() []string { return []string{d.Binary, "run", "--config", d.Config} }

// Start starts the daemon, for the first time or anew, and returns when it serves.
func (d *Daemon) Start(tb testing.TB) {
	tb.Helper()
	d.StartBy(tb, exec.Command(d.Args()[0], d.Args()[1:]...))
}

// StartBy is Start by a command of the test's, which becomes what Args says.
func (d *Daemon) StartBy(tb testing.TB, cmd *exec.Cmd) {
	tb.Helper()
	p := process.Start(tb, cmd)
	d.Process = p
	tb.Cleanup(func() {
		if !p.Awaited() {
			endsWell(tb, p)
		}
	})
	wait.UntilNil(tb, func() error {
		p.Alive(tb)
		return d.Try("health")
	})
}

// Stop ends the daemon, which has to end well.
func (d *Daemon) Stop(tb testing.TB) {
	tb.Helper()
	endsWell(tb, d.Process)
}

func endsWell(tb testing.TB, p *process.Process) {
	tb.Helper()
	if err := p.End(tb); err != nil {
		tb.Errorf("deputy run: %v", err)
	}
}

// Env is the test's environment with the variables by which clients and
// commands find the daemon.
func (d *Daemon) Env() []string {
	return append(os.Environ(), "SPIFFE_ENDPOINT_SOCKET=unix://"+d.Workload, "DEPUTY_ADMIN_SOCKET="+d.Admin)
}

// Command is one of deputy's, for this daemon.
func (d *Daemon) Command(args ...string) *exec.Cmd {
	cmd := exec.Command(d.Binary, args...)
	cmd.Dir = d.Dir
	cmd.Env = d.Env()
	return cmd
}

// Run runs a command of deputy's, which has to end well, and returns what it said.
func (d *Daemon) Run(tb testing.TB, args ...string) string {
	tb.Helper()
	return process.Run(tb, d.Command(args...))
}

// Try runs a command of deputy's. The error has what it said.
func (d *Daemon) Try(args ...string) error {
	_, err := process.Try(d.Command(args...))
	return err
}
