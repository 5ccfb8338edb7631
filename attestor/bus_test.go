package attestor

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	"github.com/godbus/dbus/v5"
	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/deputy-id/deputy/attestor/peer"
)

// startBus starts a real message bus and returns its socket.
func startBus(t *testing.T) string {
	t.Helper()
	socket := filepath.Join(t.TempDir(), "bus")
	c := exec.Command("dbus-daemon", "--session", "--nofork", "--print-address", "--address=unix:path="+socket)
	out, err := c.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Start(); err != nil {
		if os.Getenv("CI") != "" {
			t.Fatal(err)
		}
		t.Skipf("LOUD: systemd by pidfd is not tested: %v", err)
	}
	t.Cleanup(func() { c.Process.Kill(); c.Wait() })
	if _, err := out.Read(make([]byte, 256)); err != nil { // it prints when it listens
		t.Fatal(err)
	}
	return socket
}

// A fakeSystemd answers on a bus as systemd 253 and later do, about one unit.
type fakeSystemd struct {
	want   peer.FileID // of the pidfd that must come
	byFD   atomic.Int32
	refuse *dbus.Error
	props  map[string]any
	conn   *dbus.Conn
}

// Subscribe is answered, as systemd does before it tells of changes.
func (f *fakeSystemd) Subscribe() *dbus.Error { return nil }

func (f *fakeSystemd) GetUnitByPIDFD(fd dbus.UnixFD) (dbus.ObjectPath, string, []byte, *dbus.Error) {
	defer unix.Close(int(fd))
	f.byFD.Add(1)
	if f.refuse != nil {
		return "", "", nil, f.refuse
	}
	var st unix.Stat_t
	if err := unix.Fstat(int(fd), &st); err != nil || st.Ino != f.want.Ino {
		return "", "", nil, dbus.NewError("test.WrongDescriptor", nil)
	}
	return "/org/freedesktop/systemd1/unit/a", f.props["Id"].(string), []byte{1}, nil
}

func (f *fakeSystemd) Get(_, name string) (dbus.Variant, *dbus.Error) {
	v, ok := f.props[name]
	if !ok {
		return dbus.Variant{}, dbus.NewError("org.freedesktop.DBus.Error.UnknownProperty", nil)
	}
	return dbus.MakeVariant(v), nil
}

func (f *fakeSystemd) serve(t *testing.T, socket string) {
	t.Helper()
	conn, err := dbus.Connect("unix:path=" + socket)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	f.conn = conn
	if err := errors.Join(
		conn.Export(f, systemdPath, systemdManager),
		conn.Export(f, "/org/freedesktop/systemd1/unit/a", "org.freedesktop.DBus.Properties"),
	); err != nil {
		t.Fatal(err)
	}
	if reply, err := conn.RequestName(systemdName, dbus.NameFlagDoNotQueue); err != nil || reply != dbus.RequestNameReplyPrimaryOwner {
		t.Fatalf("own %s: %v, %v", systemdName, reply, err)
	}
}

// attestor returns one that asks the fake about a process that the kernel
// places in a.service.
func (f *fakeSystemd) attestor(t *testing.T, p *peer.Process) *Systemd {
	t.Helper()
	if err := p.Pidfd(func(fd int) error {
		var st unix.Stat_t
		err := unix.Fstat(fd, &st)
		f.want.Ino = st.Ino
		return err
	}); err != nil {
		t.Fatal(err)
	}
	socket := startBus(t)
	f.serve(t, socket)
	return standIn(t, socket)
}

func standIn(t *testing.T, socket string) *Systemd {
	s := &Systemd{
		socket: socket,
		place: func(*peer.Process) (Place, error) {
			return Place{Path: "/system.slice/a.service/x", Trusted: "/system.slice/a.service", Unit: "a.service"}, nil
		},
		running: func() (bool, error) { return true, nil },
	}
	t.Cleanup(func() { s.Close() })
	return s
}

func monotonic(t *testing.T) uint64 {
	t.Helper()
	var now unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &now); err != nil {
		t.Fatal(err)
	}
	return uint64(now.Nano() / 1000)
}

func TestSystemdByPidfd(t *testing.T) {
	id := Selector{"systemd", "id:a.service"}
	file := Selector{"systemd", "fragment_path:/etc/systemd/system/a.service"}
	for name, test := range map[string]struct {
		change map[string]any
		want   []Selector
	}{
		"main process of a simple service":      {nil, []Selector{id, file, leaderSelector}},
		"of a dbus service":                     {map[string]any{"Type": "dbus"}, []Selector{id, file, leaderSelector}},
		"of one that notifies from main":        {map[string]any{"Type": "notify", "NotifyAccess": "main"}, []Selector{id, file, leaderSelector}},
		"of one that notifies from anywhere":    {map[string]any{"Type": "notify", "NotifyAccess": "all"}, []Selector{id, file}},
		"of one that notifies from its helpers": {map[string]any{"NotifyAccess": "exec"}, []Selector{id, file}},
		"of a forking service":                  {map[string]any{"Type": "forking"}, []Selector{id, file}},
		"of a oneshot service":                  {map[string]any{"Type": "oneshot"}, []Selector{id, file}},
		"another process":                       {map[string]any{"MainPID": uint32(1)}, []Selector{id, file}},
		"the number of a main process long gone": {
			map[string]any{"ExecMainStartTimestampMonotonic": uint64(1)}, []Selector{id, file}},
		"a unit that was made by hand":             {map[string]any{"FragmentPath": ""}, []Selector{id, leaderSelector}},
		"a unit whose cgroup is not the process's": {map[string]any{"ControlGroup": "/system.slice/a"}, nil},
		"a unit without a cgroup":                  {map[string]any{"ControlGroup": ""}, nil},
		"the root unit":                            {map[string]any{"ControlGroup": "/"}, nil},
	} {
		t.Run(name, func(t *testing.T) {
			p := newBench(t).open(start(t, self(t), nil).self)
			f := &fakeSystemd{props: map[string]any{
				"Id": "a.service", "FragmentPath": "/etc/systemd/system/a.service", "ControlGroup": "/system.slice/a.service",
				"Type": "simple", "NotifyAccess": "none", "MainPID": uint32(p.PID()),
				"ExecMainStartTimestampMonotonic": monotonic(t),
			}}
			for k, v := range test.change {
				f.props[k] = v
			}
			got, err := f.attestor(t, p).Attest(t.Context(), p)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(test.want, got); diff != "" {
				t.Errorf("selectors (-want +got):\n%s", diff)
			}
			if f.byFD.Load() != 1 {
				t.Errorf("asked by pidfd %d times, want once", f.byFD.Load())
			}
		})
	}
}

func TestSystemdThatKnowsNoUnitSaysNothing(t *testing.T) {
	p := newBench(t).open(os.Getpid())
	f := &fakeSystemd{refuse: dbus.NewError(noUnitForPID, nil)}
	if got, err := f.attestor(t, p).Attest(t.Context(), p); err != nil || got != nil {
		t.Errorf("got %v, %v, want nothing", got, err)
	}
}

func TestSystemdThatFailsIsUnknown(t *testing.T) {
	p := newBench(t).open(os.Getpid())
	f := &fakeSystemd{refuse: dbus.NewError("org.freedesktop.DBus.Error.AccessDenied", nil)}
	if got, err := f.attestor(t, p).Attest(t.Context(), p); err == nil {
		t.Errorf("got %v, want an error", got)
	}
}

func TestBusWithoutSystemdIsUnknown(t *testing.T) {
	p := newBench(t).open(os.Getpid())
	if got, err := standIn(t, startBus(t)).Attest(t.Context(), p); err == nil {
		t.Errorf("got %v, want an error", got)
	}
}

func TestBusThatIsNotThereIsUnknown(t *testing.T) {
	p := newBench(t).open(os.Getpid())
	s := standIn(t, filepath.Join(t.TempDir(), "none"))
	if got, err := s.Attest(t.Context(), p); err == nil {
		t.Errorf("got %v, want an error", got)
	}
}

func TestBusThatDoesNotAnswerIsUnknown(t *testing.T) {
	p := newBench(t).open(os.Getpid())
	socket := filepath.Join(t.TempDir(), "mute")
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	if err := errors.Join(unix.Bind(fd, &unix.SockaddrUnix{Name: socket}), unix.Listen(fd, 1)); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	if got, err := standIn(t, socket).Attest(ctx, p); err == nil {
		t.Errorf("got %v, want an error", got)
	}
}

func TestHostWithoutSystemdIsCertain(t *testing.T) {
	p := newBench(t).open(os.Getpid())
	s := standIn(t, filepath.Join(t.TempDir(), "none"))
	s.running = func() (bool, error) { return false, nil }
	if got, err := s.Attest(t.Context(), p); err != nil || got != nil {
		t.Errorf("got %v, %v, want nothing", got, err)
	}
}

func TestLeaderEndsWhenTheUnitHasAnotherMainProcess(t *testing.T) {
	p := newBench(t).open(start(t, self(t), nil).self)
	f := &fakeSystemd{props: map[string]any{
		"Id": "a.service", "FragmentPath": "", "ControlGroup": "/system.slice/a.service",
		"Type": "notify", "NotifyAccess": "main", "MainPID": uint32(p.PID()),
		"ExecMainStartTimestampMonotonic": monotonic(t),
	}}
	systemd := f.attestor(t, p)
	changed := func(main uint32) {
		t.Helper()
		err := f.conn.Emit("/org/freedesktop/systemd1/unit/a", "org.freedesktop.DBus.Properties.PropertiesChanged",
			systemdName+".Service", map[string]dbus.Variant{"MainPID": dbus.MakeVariant(main)}, []string{})
		if err != nil {
			t.Fatal(err)
		}
	}
	s := newTestSet(systemd.Source())
	if e := mustAttest(t, s, p); !e.Has(leaderSelector) {
		t.Fatalf("got %v, want leader", e.Selectors)
	}
	rests := s.record(p).kept.Load().bases
	if len(rests) != 1 {
		t.Fatalf("evidence rests on %d things, want one", len(rests))
	}
	for _, test := range []struct {
		what string
		do   func()
	}{
		{"another main process", func() { changed(uint32(p.PID())); changed(1) }},
		{"a lost bus", func() { systemd.bus.conn.Close() }},
	} {
		rests := s.record(p).kept.Load().bases
		select {
		case <-rests[0].Done():
			t.Fatalf("before %s: the evidence ended", test.what)
		default:
		}
		test.do()
		select {
		case <-rests[0].Done():
		case <-time.After(10 * time.Second):
			t.Fatalf("%s did not end the evidence", test.what)
		}
		if e := mustAttest(t, s, p); !e.Has(leaderSelector) {
			t.Fatalf("got %v, want leader: the fake says so again", e.Selectors)
		}
	}
}
