package attest

import (
	"errors"
	"slices"
	"strings"
	"sync"

	"github.com/hashicorp/go-hclog"

	"github.com/deputy-id/deputy/attestor"
	"github.com/deputy-id/deputy/attestor/container"
	"github.com/deputy-id/deputy/attestor/peer"
	"github.com/deputy-id/deputy/internal/owned"
)

// sources are the attestors of one configuration.
type sources struct {
	settings Settings
	table    *peer.Table
	set      *attestor.Set
	users    sync.WaitGroup // attestations under way

	list   []attestor.Source
	closes []func() error
}

// newSources turns on unix, process and cgroup, and the others as the settings
// say; but none that gives nothing of what is wanted.
func newSources(settings Settings, table *peer.Table, log hclog.Logger) (*sources, error) {
	s := &sources{settings: settings, table: table}
	host, err := attestor.OpenHost()
	if err != nil {
		return nil, err
	}
	cgroups, err := attestor.OpenCgroups()
	if err != nil {
		return nil, err
	}
	executables := attestor.NewExecutables(host, 0)
	s.add(attestor.NewUnix(host, executables, s.settings.demand).Source())
	s.add(attestor.NewProcess(table, host, executables, s.settings.demand).Source())
	s.add(attestor.NewCgroup(cgroups).Source())
	s.systemd(cgroups)
	if err := s.docker(log); err != nil {
		return nil, errors.Join(err, s.close())
	}
	s.set = attestor.NewSet(log, s.settings.demand, s.list...)
	return s, nil
}

// add takes a source that gives something of what is wanted.
func (s *sources) add(one attestor.Source) bool {
	wanted := slices.ContainsFunc(one.Prefixes, s.settings.wants)
	if wanted {
		s.list = append(s.list, one)
	}
	return wanted
}

// systemd is asked for the main process of a unit even where its own selectors
// are not listed, as in the daemon.
func (s *sources) systemd(cgroups *attestor.Cgroups) {
	there := owned.RootSocket(attestor.DefaultBus)
	a := attestor.NewSystemd(attestor.DefaultBus, cgroups)
	source := a.Source()
	switch {
	case s.settings.Systemd, !s.settings.listed() && (there || s.settings.Type == "systemd"):
	case there:
		source = a.LeaderSource()
	default:
		return
	}
	if s.add(source) {
		s.closes = append(s.closes, a.Close)
	}
}

func (s *sources) docker(log hclog.Logger) error {
	o := container.Options{Table: s.table, Log: log}
	switch {
	case s.settings.Docker != nil:
		o.Socket, o.Env = s.settings.Docker.Socket, s.settings.Docker.Env
	case !s.settings.listed() && (given[s.settings.Type] == "docker" || owned.RootSocket(container.DefaultSocket)):
	default:
		return nil
	}
	d, err := container.NewDocker(o)
	if err != nil {
		return err
	}
	if s.add(d.Source()) {
		s.closes = append(s.closes, d.Close)
		return nil
	}
	return d.Close()
}

// String lists the attestors by name.
func (s *sources) String() string {
	names := make([]string, len(s.list))
	for i, one := range s.list {
		names[i] = one.Name
	}
	return strings.Join(names, " ")
}

// end closes the attestors once nobody uses them any more.
func (s *sources) end(log hclog.Logger) {
	s.users.Wait()
	s.set.Close()
	if err := s.close(); err != nil {
		log.Warn("close attestors", "error", err)
	}
}

func (s *sources) close() error {
	var errs []error
	for _, c := range s.closes {
		errs = append(errs, c())
	}
	return errors.Join(errs...)
}
