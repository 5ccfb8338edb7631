package hardship

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

func entry(path string) string {
	return fmt.Sprintf("entry %q {\n  selectors = [\"unix:uid:%d\"]\n}\n", path, os.Getuid())
}

// holds wants the identities that this process holds to become these.
func (d *daemon) holds(t *testing.T, paths ...string) {
	t.Helper()
	eventually(t, func() error {
		out, err := d.cli("fetch", "x509").Output()
		if err != nil {
			return err
		}
		for _, p := range paths {
			if !strings.Contains(string(out), "spiffe://hard.example"+p+"\n") {
				return fmt.Errorf("got %q, want %s in it", out, p)
			}
		}
		if n := strings.Count(string(out), "spiffe_id:"); n != len(paths) {
			return fmt.Errorf("got %d identities, want %d", n, len(paths))
		}
		return nil
	})
}

// Signals without end, while the file changes, end with the last file in
// force, and drop nobody.
func TestStormOfSignals(t *testing.T) {
	t.Parallel()
	d := newPlace(t, mine()).start(t)
	watching := d.cli("watch")
	var updates transcript
	watching.Stdout, watching.Stderr = &updates, &updates
	if err := watching.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { watching.Process.Kill(); watching.Wait() })
	eventually(t, updates.has("update 1"))
	goroutines := d.goroutines(t)

	for i := range 2000 {
		if i%100 == 50 {
			d.configure(t, mine()+entry(fmt.Sprintf("/agent/n%d", i)))
		}
		if err := d.cmd.Process.Signal(syscall.SIGHUP); err != nil {
			t.Fatal(err)
		}
	}
	d.configure(t, mine()+entry("/agent/last"))
	d.holds(t, "/agent/me", "/agent/last")
	eventually(t, updates.has("/agent/last")) // by the stream of before
	if n := d.goroutines(t); n > goroutines+8 {
		t.Errorf("got %d goroutines, want those %d of before", n, goroutines)
	}
	d.alive(t)
}

// The ways in which files come to be changed.
func TestFileThatIsReplaced(t *testing.T) {
	t.Parallel()
	p := newPlace(t, mine())
	d := p.start(t)

	// In pieces: what is half there changes nothing, or is said to be wrong.
	whole := p.text(mine() + entry("/agent/pieces"))
	f, err := os.OpenFile(p.config, os.O_WRONLY|os.O_TRUNC, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteString(whole[:len(whole)-10]); err != nil {
		t.Fatal(err)
	}
	d.logged(t, "configuration is not reloaded, the last good one stays")
	d.holds(t, "/agent/me")
	if _, err := f.WriteString(whole[len(whole)-10:]); err != nil {
		t.Fatal(err)
	}
	f.Close()
	d.holds(t, "/agent/me", "/agent/pieces")

	// Away, and there again.
	if err := os.Remove(p.config); err != nil {
		t.Fatal(err)
	}
	d.cmd.Process.Signal(syscall.SIGHUP)
	d.logged(t, "no such file")
	d.holds(t, "/agent/me", "/agent/pieces")
	p.configure(t, mine()+entry("/agent/back"))
	d.holds(t, "/agent/me", "/agent/back")
}

// A symbolic link that is turned elsewhere, as Kubernetes turns those of a
// ConfigMap: the name that is watched does not change, the directory behind it
// does.
func TestFileBehindALinkThatTurns(t *testing.T) {
	t.Parallel()
	p := newPlace(t, mine())
	volume := filepath.Join(p.dir, "volume")
	version := func(name, more string) {
		t.Helper()
		dir := filepath.Join(volume, name)
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, "c.hcl"), []byte(p.text(more)), 0o600); err != nil {
			t.Fatal(err)
		}
		next := filepath.Join(volume, "..next")
		if err := os.Symlink(name, next); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(next, filepath.Join(volume, "..data")); err != nil {
			t.Fatal(err)
		}
	}
	version("..1", mine())
	p.config = filepath.Join(volume, "c.hcl")
	if err := os.Symlink("..data/c.hcl", p.config); err != nil {
		t.Fatal(err)
	}
	d := p.start(t)
	d.holds(t, "/agent/me")
	version("..2", mine()+entry("/agent/two"))
	d.holds(t, "/agent/me", "/agent/two")
	version("..3", mine())
	d.holds(t, "/agent/me")
}

// A link into a directory that is not watched is followed there.
func TestFileBehindALinkElsewhere(t *testing.T) {
	t.Parallel()
	p := newPlace(t, mine())
	real := p.config
	link := filepath.Join(p.dir, "etc/deputy.hcl")
	if err := os.Mkdir(filepath.Dir(link), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(real, link); err != nil {
		t.Fatal(err)
	}
	p.config = link
	d := p.start(t)
	p.config = real
	p.configure(t, mine()+entry("/agent/two"))
	d.holds(t, "/agent/me", "/agent/two")
}

// A log that nobody reads any more is no reason to end.
func TestLogThatGoesNowhere(t *testing.T) {
	t.Parallel()
	t.Run("a pipe whose reader has gone", func(t *testing.T) {
		t.Parallel()
		p := newPlace(t, mine())
		r, w, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		cmd := p.command()
		cmd.Stderr = w
		d := p.begin(t, cmd)
		w.Close()
		r.Close()
		d.speaks(t)
	})
	t.Run("closed from the start", func(t *testing.T) {
		t.Parallel()
		p := newPlace(t, mine())
		d := p.begin(t, shell(p, `exec "$0" "$@" <&- >&- 2>&-`))
		d.speaks(t)
	})
	t.Run("a device that is full", func(t *testing.T) {
		t.Parallel()
		p := newPlace(t, mine())
		d := p.begin(t, shell(p, `exec "$0" "$@" 2>/dev/full`))
		d.speaks(t)
	})
}

// speaks makes the daemon log, by a reload, and wants it to go on.
func (d *daemon) speaks(t *testing.T) {
	t.Helper()
	for i := range 3 {
		name := fmt.Sprintf("/agent/n%d", i)
		d.configure(t, mine()+entry(name))
		d.holds(t, "/agent/me", name)
	}
	d.alive(t)
	d.stop(t)
}
