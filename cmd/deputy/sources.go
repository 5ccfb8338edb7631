package main

import (
	"errors"
	"os"
	"strings"

	"github.com/hashicorp/go-hclog"

	"github.com/deputy-id/deputy/attestor"
	"github.com/deputy-id/deputy/attestor/container"
	"github.com/deputy-id/deputy/attestor/peer"
	"github.com/deputy-id/deputy/conf"
	"github.com/deputy-id/deputy/internal/owned"
)

// sources are the attestors that are on.
type sources struct {
	list   []attestor.Source
	names  *attestor.Exec
	closes []func() error
}

// newSources turns on unix, process, cgroup and exec always; the rest as the
// file lists them or, with no file, where root owns their socket on this host.
func newSources(c *conf.Config, table *peer.Table, demand func() attestor.Demand, log hclog.Logger) (*sources, error) {
	host, err := attestor.OpenHost()
	if err != nil {
		return nil, err
	}
	executables := attestor.NewExecutables(host, 0)
	cgroups, err := attestor.OpenCgroups()
	if err != nil {
		return nil, err
	}
	s := &sources{names: attestor.NewExec()}
	s.list = []attestor.Source{
		attestor.NewUnix(host, executables, demand).Source(),
		attestor.NewProcess(table, host, executables, demand).Source(),
		attestor.NewCgroup(cgroups).Source(),
		s.names.Source(),
	}
	s.systemd(c, cgroups, log)
	return s, s.docker(c, table, log)
}

// systemd gives its own selectors where they are asked for; beside cgroup:unit
// the main process of a unit is wanted without that.
func (s *sources) systemd(c *conf.Config, cgroups *attestor.Cgroups, log hclog.Logger) {
	there := owned.RootSocket(attestor.DefaultBus)
	a := attestor.NewSystemd(attestor.DefaultBus, cgroups)
	switch {
	case c.Systemd != nil:
		if !there {
			log.Warn("systemd is configured but its bus is not there: its selectors are unknown until it is", "socket", attestor.DefaultBus)
		}
		s.list = append(s.list, a.Source())
	case there && c.File == "":
		s.list = append(s.list, a.Source())
	case there:
		s.list = append(s.list, a.LeaderSource())
	default:
		return
	}
	s.closes = append(s.closes, a.Close)
}

func (s *sources) docker(c *conf.Config, table *peer.Table, log hclog.Logger) error {
	o := container.Options{Table: table, Log: log}
	switch {
	case c.Docker != nil:
		o.Socket, o.Env = c.Docker.Socket.Value, values(c.Docker.Env)
		if _, err := os.Stat(o.Socket); err != nil {
			log.Warn("docker is configured but not there: its selectors are unknown until it is", "socket", o.Socket, "error", err)
		}
	case c.File == "" && owned.RootSocket(container.DefaultSocket):
		o.Socket = container.DefaultSocket
	default:
		return nil
	}
	d, err := container.NewDocker(o)
	if err != nil {
		return err
	}
	s.list = append(s.list, d.Source())
	s.closes = append(s.closes, d.Close)
	return nil
}

// String lists the attestors by name.
func (s *sources) String() string {
	var names []string
	for _, one := range s.list {
		names = append(names, one.Name)
	}
	return strings.Join(names, " ")
}

func (s *sources) Close() error {
	var errs []error
	for _, c := range s.closes {
		errs = append(errs, c())
	}
	return errors.Join(errs...)
}
