package hardship

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/deputy-id/deputy/test/scratch"
	"github.com/deputy-id/deputy/test/wait"
)

func entry(path string) string {
	return fmt.Sprintf("entry %q {\n  selectors = [\"unix:uid:%d\"]\n}\n", path, os.Getuid())
}

// holds wants the identities that this process holds to become these.
func (d *host) holds(t *testing.T, paths ...string) {
	t.Helper()
	wait.UntilNil(t, func() error {
		out, err := d.Command("fetch", "x509").Output()
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
	d := start(t, mine())
	watching := d.watch(t)
	goroutines := d.goroutines(t)

	for i := range 2000 {
		if i%100 == 50 {
			d.Configure(t, mine()+entry(fmt.Sprintf("/agent/n%d", i)))
		}
		d.Signal(t, syscall.SIGHUP)
	}
	d.Configure(t, mine()+entry("/agent/last"))
	d.holds(t, "/agent/me", "/agent/last")
	watching.Says(t, "/agent/last") // by the stream of before
	if n := d.goroutines(t); n > goroutines+8 {
		t.Errorf("got %d goroutines, want those %d of before", n, goroutines)
	}
	d.Alive(t)
}

// The ways in which files come to be changed.
func TestFileThatIsReplaced(t *testing.T) {
	t.Parallel()
	d := start(t, mine())

	// In pieces: what is half there changes nothing, or is said to be wrong.
	whole := d.Text(mine() + entry("/agent/pieces"))
	f, err := os.OpenFile(d.Config, os.O_WRONLY|os.O_TRUNC, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteString(whole[:len(whole)-10]); err != nil {
		t.Fatal(err)
	}
	d.Says(t, "configuration is not reloaded, the last good one stays")
	d.holds(t, "/agent/me")
	if _, err := f.WriteString(whole[len(whole)-10:]); err != nil {
		t.Fatal(err)
	}
	f.Close()
	d.holds(t, "/agent/me", "/agent/pieces")

	// Away, and there again.
	if err := os.Remove(d.Config); err != nil {
		t.Fatal(err)
	}
	d.Signal(t, syscall.SIGHUP)
	d.Says(t, "no such file")
	d.holds(t, "/agent/me", "/agent/pieces")
	d.Configure(t, mine()+entry("/agent/back"))
	d.holds(t, "/agent/me", "/agent/back")
}

// A symbolic link that is turned elsewhere, as Kubernetes turns those of a
// ConfigMap: the name that is watched does not change, the directory behind it
// does.
func TestFileBehindALinkThatTurns(t *testing.T) {
	t.Parallel()
	d := newHost(t, mine())
	volume := filepath.Join(d.Dir, "volume")
	version := func(name, more string) {
		t.Helper()
		dir := filepath.Join(volume, name)
		scratch.Write(t, filepath.Join(dir, "c.hcl"), d.Text(more))
		next := filepath.Join(volume, "..next")
		if err := os.Symlink(name, next); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(next, filepath.Join(volume, "..data")); err != nil {
			t.Fatal(err)
		}
	}
	version("..1", mine())
	d.Config = filepath.Join(volume, "c.hcl")
	if err := os.Symlink("..data/c.hcl", d.Config); err != nil {
		t.Fatal(err)
	}
	d.Start(t)
	d.holds(t, "/agent/me")
	version("..2", mine()+entry("/agent/two"))
	d.holds(t, "/agent/me", "/agent/two")
	version("..3", mine())
	d.holds(t, "/agent/me")
}

// A link into a directory that is not watched is followed there.
func TestFileBehindALinkElsewhere(t *testing.T) {
	t.Parallel()
	d := newHost(t, mine())
	real := d.Config
	link := filepath.Join(d.Dir, "etc/deputy.hcl")
	if err := os.Mkdir(filepath.Dir(link), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(real, link); err != nil {
		t.Fatal(err)
	}
	d.Config = link
	d.Start(t)
	d.Config = real
	d.Configure(t, mine()+entry("/agent/two"))
	d.holds(t, "/agent/me", "/agent/two")
}

// A log that nobody reads any more is no reason to end.
func TestLogThatGoesNowhere(t *testing.T) {
	t.Parallel()
	t.Run("a pipe whose reader has gone", func(t *testing.T) {
		t.Parallel()
		d := newHost(t, mine())
		r, w, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		cmd := exec.Command(d.Binary, d.Args()[1:]...)
		cmd.Stderr = w
		d.StartBy(t, cmd)
		w.Close()
		r.Close()
		d.speaks(t)
	})
	t.Run("closed from the start", func(t *testing.T) {
		t.Parallel()
		d := newHost(t, mine())
		d.StartBy(t, d.shell(`exec "$0" "$@" <&- >&- 2>&-`))
		d.speaks(t)
	})
	t.Run("a device that is full", func(t *testing.T) {
		t.Parallel()
		d := newHost(t, mine())
		d.StartBy(t, d.shell(`exec "$0" "$@" 2>/dev/full`))
		d.speaks(t)
	})
}

// speaks makes the daemon log, by a reload, and wants it to go on.
func (d *host) speaks(t *testing.T) {
	t.Helper()
	for i := range 3 {
		name := fmt.Sprintf("/agent/n%d", i)
		d.Configure(t, mine()+entry(name))
		d.holds(t, "/agent/me", name)
	}
	d.Alive(t)
	d.Stop(t)
}
