package attestor

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"

	"github.com/godbus/dbus/v5"
)

// A mainWatch is what the evidence that a process leads its unit rests on: it
// is done when systemd says that the unit has another main process, and when
// systemd can no longer be heard.
type mainWatch struct {
	bus  *bus
	at   dbus.ObjectPath
	main uint32
	done chan struct{}
	once sync.Once
}

func (w *mainWatch) Done() <-chan struct{} { return w.done }
func (w *mainWatch) end()                  { w.once.Do(func() { close(w.done) }) }

// Close implements Basis. It does not wait for the bus.
func (w *mainWatch) Close() error {
	w.bus.mu.Lock()
	_, watched := w.bus.mains[w]
	delete(w.bus.mains, w)
	w.bus.mu.Unlock()
	w.end()
	if watched {
		w.bus.conn.BusObject().Go("org.freedesktop.DBus.RemoveMatch", dbus.FlagNoReplyExpected, nil, mainRule(w.at))
	}
	return nil
}

var errOtherMain = errors.New("it changed meanwhile")

// mainRule matches what systemd says of changes of one unit. The bus counts
// equal rules, so that each watch has its own.
func mainRule(at dbus.ObjectPath) string {
	return fmt.Sprintf("type='signal',sender='%s',path='%s',interface='org.freedesktop.DBus.Properties',member='PropertiesChanged'", systemdName, at)
}

// restOnMain lets the answer that is being given hold only while the unit has
// this main process.
func (b *bus) restOnMain(ctx context.Context, u *unit) error {
	w := &mainWatch{bus: b, at: u.at, main: u.main, done: make(chan struct{})}
	if err := b.subscribe(ctx); err != nil {
		return err
	}
	if err := b.conn.BusObject().CallWithContext(ctx, "org.freedesktop.DBus.AddMatch", 0, mainRule(u.at)).Err; err != nil {
		return err
	}
	b.mu.Lock()
	if b.lost {
		b.mu.Unlock()
		return dbus.ErrClosed
	}
	b.mains[w] = struct{}{}
	b.mu.Unlock()
	// What changed before the watch began was not heard.
	var main uint32
	err := b.properties(ctx, u.at, systemdName+".Service", map[string]any{"MainPID": &main})
	if err == nil && main != u.main {
		err = errOtherMain
	}
	if err != nil {
		w.Close()
		return err
	}
	RestOn(ctx, w)
	return nil
}

// subscribe makes systemd tell of changes at all, once for each connection.
func (b *bus) subscribe(ctx context.Context) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.subscribed {
		return nil
	}
	err := b.call(ctx, systemdPath, systemdManager+".Subscribe").Err
	b.subscribed = err == nil || named(err, systemdName+".AlreadySubscribed")
	if b.subscribed {
		return nil
	}
	return err
}

// hear ends watches until the connection ends, and then all of them. A signal
// that somebody else made up costs no more than asking again.
func (b *bus) hear() {
	signals := make(chan *dbus.Signal, 64)
	b.conn.Signal(signals)
	for {
		select {
		case s, ok := <-signals:
			if !ok {
				b.silence()
				return
			}
			b.heard(s)
		case <-b.conn.Context().Done():
			b.silence()
			return
		}
	}
}

func (b *bus) heard(s *dbus.Signal) {
	var iface string
	var changed map[string]dbus.Variant
	var invalidated []string
	if s.Name != "org.freedesktop.DBus.Properties.PropertiesChanged" || dbus.Store(s.Body, &iface, &changed, &invalidated) != nil {
		return
	}
	now, told := changed["MainPID"]
	if !told && !slices.Contains(invalidated, "MainPID") {
		return
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	for w := range b.mains {
		if w.at == s.Path && (!told || now.Value() != w.main) {
			w.end()
		}
	}
}

func (b *bus) silence() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.lost = true
	for w := range b.mains {
		w.end()
	}
	clear(b.mains)
}
