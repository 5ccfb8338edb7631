package attestor

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/godbus/dbus/v5"
	"golang.org/x/sys/unix"

	"github.com/deputy-id/deputy/attestor/peer"
)

// DefaultBus is the socket of the system bus.
const DefaultBus = "/run/dbus/system_bus_socket"

// Systemd attests which unit of the host's systemd a process belongs to
// (systemd:id, systemd:fragment_path), and whether it is the unit's main
// process (process:leader:true).
//
// systemd is asked by pidfd, or by number where it is older than 253; either
// way the answer is believed only if the kernel's cgroup file puts the process
// into the unit's own cgroup, with nobody but root able to have put it there.
type Systemd struct {
	socket  string
	place   func(*peer.Process) (Place, error)
	running func() (bool, error)

	mu      sync.Mutex
	bus     *bus // nil until asked, and after it broke
	failed  error
	retryAt time.Time // not to be dialled before, because of failed
}

// NewSystemd returns the attestor. It connects to the bus, whose socket must be
// root's, when first asked.
func NewSystemd(socket string, c *Cgroups) *Systemd {
	return &Systemd{socket: socket, place: c.Place, running: systemdRuns}
}

// Source gives all that systemd says.
func (s *Systemd) Source() Source {
	return Source{Name: "systemd", Prefixes: []string{"systemd:", "process:leader:"}, Attestor: s}
}

// LeaderSource gives process:leader:true alone: beside cgroup:unit it is wanted
// where nobody asked for systemd's own selectors.
func (s *Systemd) LeaderSource() Source {
	return Source{Name: "systemd", Prefixes: []string{leaderPrefix}, Attestor: leaderOnly{s}}
}

const leaderPrefix = "process:leader:"

type leaderOnly struct{ *Systemd }

func (l leaderOnly) Attest(ctx context.Context, p *peer.Process) ([]Selector, error) {
	out, err := l.Systemd.Attest(ctx, p)
	return slices.DeleteFunc(out, func(s Selector) bool { return s != leaderSelector }), err
}

// systemdRuns is sd_booted(3).
func systemdRuns() (bool, error) {
	_, err := os.Lstat("/run/systemd/system")
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	return err == nil, err
}

// Attest implements Attestor.
func (s *Systemd) Attest(ctx context.Context, p *peer.Process) ([]Selector, error) {
	place, err := s.place(p)
	if err != nil || place.Unit == "" {
		return nil, err // no unit's cgroup, or none that can be believed
	}
	if runs, err := s.running(); err != nil || !runs {
		return nil, err
	}
	b, err := s.connect(ctx)
	if err != nil {
		return nil, fmt.Errorf("connect to system bus: %w", err)
	}
	u, err := b.unitOf(ctx, p)
	if err != nil {
		s.leave(b, err)
		return nil, fmt.Errorf("ask systemd about %d: %w", p.PID(), err)
	}
	// A number was p's as long as p is alive after the answer.
	if err := p.Alive(); err != nil {
		return nil, err
	}
	if u == nil || !within(place.Trusted, u.cgroup) {
		return nil, nil
	}
	var out []Selector
	for _, text := range []string{"id:" + u.id, "fragment_path:" + u.fragment} {
		if sel := (Selector{"systemd", text}); CheckSelector(sel) == nil {
			out = append(out, sel)
		}
	}
	leads, err := u.ledBy(p)
	if err != nil {
		return out, &Unknown{Prefixes: []string{leaderPrefix}, Err: err}
	}
	if !leads {
		return out, nil
	}
	if err := b.restOnMain(ctx, u); err != nil {
		if !errors.Is(err, errOtherMain) {
			s.leave(b, err)
		}
		return out, &Unknown{Prefixes: []string{leaderPrefix}, Err: fmt.Errorf("watch main process of %s: %w", u.id, err)}
	}
	return append(out, leaderSelector), nil
}

// within reports whether the directory is the cgroup or below it.
func within(dir, cgroup string) bool {
	return len(cgroup) > 1 && cgroup[0] == '/' && (dir == cgroup || strings.HasPrefix(dir, cgroup+"/"))
}

// A unit is what systemd says of one.
type unit struct {
	at                   dbus.ObjectPath
	id, fragment, cgroup string

	// Of services alone.
	kind, notify string
	main         uint32
	started      uint64 // of the main process, microseconds of CLOCK_MONOTONIC
}

// ledBy reports whether the process is the unit's main process, and the kind of
// unit where systemd alone, or that process itself, says which that is. A PID
// file, or a notification that any process of the unit may send, is not proof.
func (u *unit) ledBy(p *peer.Process) (bool, error) {
	switch u.kind {
	case "simple", "exec", "dbus", "notify", "notify-reload":
	default:
		return false, nil
	}
	if u.notify != "none" && u.notify != "main" || u.main == 0 || u.main != uint32(p.PID()) {
		return false, nil
	}
	// The number may be that of a main process which ended unseen, when it was
	// not systemd's child: then p is younger than the unit's main process.
	born, err := bornBefore(p.StartTime())
	if err != nil {
		return false, err
	}
	return born <= time.Duration(u.started)*time.Microsecond, nil
}

// bornBefore turns a start time, in ticks of CLOCK_BOOTTIME, into the earliest
// time of CLOCK_MONOTONIC at which that can have been: the two differ by the
// time that the machine was asleep, now at most as much as then.
func bornBefore(ticks uint64) (time.Duration, error) {
	var boot, mono unix.Timespec
	if err := errors.Join(unix.ClockGettime(unix.CLOCK_BOOTTIME, &boot), unix.ClockGettime(unix.CLOCK_MONOTONIC, &mono)); err != nil {
		return 0, fmt.Errorf("read clocks: %w", err)
	}
	asleep := time.Duration(boot.Nano() - mono.Nano())
	const tick = 10 * time.Millisecond // USER_HZ is 100 on every architecture of Linux that Go knows
	return time.Duration(ticks)*tick - asleep - tick, nil
}

// connect returns the connection to the bus.
func (s *Systemd) connect(ctx context.Context) (*bus, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.bus != nil && s.bus.conn.Connected() {
		return s.bus, nil
	}
	if time.Now().Before(s.retryAt) {
		return nil, s.failed
	}
	b, err := dialBus(ctx, s.socket)
	if err != nil {
		s.failed, s.retryAt = err, time.Now().Add(retryAfter)
		return nil, err
	}
	s.bus = b
	return b, nil
}

// leave gives up a connection that failed. An answer, even a refusal, is no
// failure of the connection.
func (s *Systemd) leave(b *bus, err error) {
	if _, answered := errors.AsType[dbus.Error](err); answered {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.bus == b {
		s.bus = nil
	}
	b.conn.Close()
}

// Close closes the connection. No Attest may follow.
func (s *Systemd) Close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.bus == nil {
		return nil
	}
	b := s.bus
	s.bus = nil
	return b.conn.Close()
}

// A bus is a connection to the system bus.
type bus struct {
	conn     *dbus.Conn
	byNumber atomic.Bool // this systemd has no GetUnitByPIDFD

	mu         sync.Mutex
	subscribed bool
	lost       bool
	mains      map[*mainWatch]struct{}
}

const (
	systemdName    = "org.freedesktop.systemd1"
	systemdManager = systemdName + ".Manager"
	systemdPath    = dbus.ObjectPath("/org/freedesktop/systemd1")

	unknownMethod = "org.freedesktop.DBus.Error.UnknownMethod"
	noUnitForPID  = systemdName + ".NoUnitForPID"
	noSuchUnit    = systemdName + ".NoSuchUnit"
	unknownObject = "org.freedesktop.DBus.Error.UnknownObject"
)

func (b *bus) call(ctx context.Context, at dbus.ObjectPath, method string, args ...any) *dbus.Call {
	return b.conn.Object(systemdName, at).CallWithContext(ctx, method, dbus.FlagNoAutoStart, args...)
}

// unitOf asks for the unit of a process; nil for none.
func (b *bus) unitOf(ctx context.Context, p *peer.Process) (*unit, error) {
	at, err := b.pathOf(ctx, p)
	if err == nil {
		var u *unit
		if u, err = b.read(ctx, at); err == nil {
			return u, nil
		}
	}
	// What was unloaded meanwhile has no processes.
	if named(err, noUnitForPID, noSuchUnit, unknownObject) {
		return nil, nil
	}
	return nil, err
}

// pathOf asks for the object of the process's unit.
func (b *bus) pathOf(ctx context.Context, p *peer.Process) (dbus.ObjectPath, error) {
	var at dbus.ObjectPath
	if !b.byNumber.Load() && b.conn.SupportsUnixFDs() {
		var id string
		var invocation []byte
		fd, err := dupPidfd(p)
		if err != nil {
			return "", err
		}
		defer unix.Close(fd)
		err = b.call(ctx, systemdPath, systemdManager+".GetUnitByPIDFD", dbus.UnixFD(fd)).Store(&at, &id, &invocation)
		if !named(err, unknownMethod) {
			return at, err
		}
		b.byNumber.Store(true)
	}
	err := b.call(ctx, systemdPath, systemdManager+".GetUnitByPID", uint32(p.PID())).Store(&at)
	return at, err
}

func dupPidfd(p *peer.Process) (int, error) {
	fd := -1
	err := p.Pidfd(func(pidfd int) (err error) {
		fd, err = unix.FcntlInt(uintptr(pidfd), unix.F_DUPFD_CLOEXEC, 0)
		return err
	})
	return fd, err
}

// read asks for the properties of a unit, one by one: GetAll makes systemd
// count what the whole unit uses.
func (b *bus) read(ctx context.Context, at dbus.ObjectPath) (*unit, error) {
	u := unit{at: at}
	if err := b.properties(ctx, at, systemdName+".Unit", map[string]any{"Id": &u.id, "FragmentPath": &u.fragment}); err != nil {
		return nil, err
	}
	kind := strings.TrimPrefix(path.Ext(u.id), ".")
	if kind == "" {
		return nil, fmt.Errorf("unit %q has no type", u.id)
	}
	wanted := map[string]any{"ControlGroup": &u.cgroup}
	if kind == "service" {
		wanted["Type"], wanted["NotifyAccess"] = &u.kind, &u.notify
		wanted["MainPID"], wanted["ExecMainStartTimestampMonotonic"] = &u.main, &u.started
	}
	iface := systemdName + "." + strings.ToUpper(kind[:1]) + kind[1:]
	return &u, b.properties(ctx, at, iface, wanted)
}

// properties asks for all of them at once.
func (b *bus) properties(ctx context.Context, at dbus.ObjectPath, iface string, into map[string]any) error {
	came := make(chan *dbus.Call, len(into))
	object := b.conn.Object(systemdName, at)
	targets := make(map[*dbus.Call]any, len(into))
	for name, target := range into {
		call := object.GoWithContext(ctx, "org.freedesktop.DBus.Properties.Get", dbus.FlagNoAutoStart, came, iface, name)
		targets[call] = target
	}
	var errs []error
	for range into {
		call := <-came
		var value dbus.Variant
		err := call.Store(&value)
		if err == nil {
			err = value.Store(targets[call])
		}
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// named reports whether the error is the bus's or systemd's of one of these names.
func named(err error, names ...string) bool {
	e, ok := errors.AsType[dbus.Error](err)
	return ok && slices.Contains(names, e.Name)
}
