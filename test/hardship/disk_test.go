package hardship

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/deputy-id/deputy/test/need"
)

// small gives the data directory a file system of a mebibyte.
func (d *host) small(t *testing.T) {
	t.Helper()
	if err := os.Mkdir(d.Data, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("tmpfs", d.Data, "tmpfs", 0, "size=1m,mode=700"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(d.Data, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
}

// fill takes all of the space, to the last byte, and returns what gives it back.
func (d *host) fill(t *testing.T) (free func()) {
	t.Helper()
	path := filepath.Join(d.Data, "fill")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for page := make([]byte, 4096); err == nil; {
		_, err = f.Write(page)
	}
	if !strings.Contains(err.Error(), "no space") {
		t.Fatal(err)
	}
	return func() {
		if err := os.Remove(path); err != nil {
			t.Fatal(err)
		}
	}
}

// A disk that fills while the daemon runs costs new entries and keys, each
// with a clear error, and nothing that there was.
func TestDiskThatFills(t *testing.T) {
	need.Root(t, "a file system of the test's")
	t.Parallel()
	short := "authority \"local\" { ca_ttl = \"30s\" }\nentry \"/agent/me\" {\n  selectors = [\"unix:uid:0\"]\n  x509_ttl = \"5s\"\n  jwt_ttl = \"5s\"\n}\n"
	d := newHost(t, short)
	d.small(t)
	d.Start(t)
	d.Run(t, "entry", "create", "/agent/kept", "--selector", "unix:uid:4711")
	before := d.Run(t, "bundle", "show")

	free := d.fill(t)
	var failed error
	for i := 0; failed == nil && i < 500; i++ { // the log of SQLite has some room yet
		failed = d.Try("entry", "create", "/agent/many", "--selector", "unix:uid:"+strings.Repeat("1", 1+i%9), "--dns-name", strings.Repeat("a", i%60+1)+".example")
		if failed != nil && strings.Contains(failed.Error(), "AlreadyExists") {
			failed = nil
		}
		d.fill(t)
	}
	if failed == nil || !strings.Contains(failed.Error(), "full") && !strings.Contains(failed.Error(), "no space") {
		t.Errorf("got %v, want it said that the disk is full", failed)
	}
	d.fetches(t, "/agent/me")
	// The next CA key cannot be kept, and so is not used.
	d.Says(t, `key rotation failed, signing with the keys there are: .*no space left on device`)
	if now := d.Run(t, "bundle", "show"); now != before {
		t.Error("a key was published that is not on the disk")
	}
	d.fetches(t, "/agent/me")
	if out := d.Run(t, "entry", "list"); !strings.Contains(out, "/agent/kept") {
		t.Errorf("got %q, want the entry of before", out)
	}

	free()
	d.Run(t, "entry", "create", "/agent/after", "--selector", "unix:uid:4712")
	d.Says(t, `(?s)no space left on device.*next key (prepared|signs): `)
	d.fetches(t, "/agent/me")
	d.Stop(t)

	d.Start(t)
	out := d.Run(t, "entry", "list")
	for _, id := range []string{"/agent/kept", "/agent/after"} {
		if !strings.Contains(out, id) {
			t.Errorf("got %q, want %s after a restart", out, id)
		}
	}
}

// A file that is damaged anywhere ends the start with its name, and stays as
// it is for whoever mends it.
func TestDamagedFiles(t *testing.T) {
	t.Parallel()
	d := start(t, mine())
	d.Run(t, "entry", "create", "/agent/kept", "--selector", "unix:uid:4711")
	d.Stop(t)
	healthy := d.files(t)
	for name, damage := range map[string]struct {
		file  string
		spoil func([]byte) []byte
	}{
		"keys cut off":                      {"keys.json", func(b []byte) []byte { return b[:len(b)/2] }},
		"keys emptied":                      {"keys.json", func([]byte) []byte { return nil }},
		"keys of noughts":                   {"keys.json", func(b []byte) []byte { return make([]byte, len(b)) }},
		"a key of another certificate":      {"keys.json", func(b []byte) []byte { return flip(b, `"key": "`, 60) }},
		"bundles of others that are none":   {"federated.json", func([]byte) []byte { return []byte("{}") }},
		"database cut off":                  {"entries.db", func(b []byte) []byte { return b[:len(b)-4096] }},
		"database emptied":                  {"entries.db", func([]byte) []byte { return nil }},
		"database whose header is gone":     {"entries.db", func(b []byte) []byte { return append(make([]byte, 100), b[100:]...) }},
		"database in which an entry rotted": {"entries.db", func(b []byte) []byte { return flip(b, "unix:uid:4711", 12) }},
	} {
		t.Run(name, func(t *testing.T) {
			d.restore(t, healthy)
			path := filepath.Join(d.Data, damage.file)
			bad := damage.spoil(bytes.Clone(healthy[damage.file]))
			if err := os.WriteFile(path, bad, 0o600); err != nil {
				t.Fatal(err)
			}
			d.refusesToStart(t, path)
			if now, err := os.ReadFile(path); err != nil || !bytes.Equal(now, bad) {
				t.Errorf("the file was changed (%v)", err)
			}
		})
	}
	d.restore(t, healthy)
	d.Start(t)
	if out := d.Run(t, "entry", "list"); !strings.Contains(out, "/agent/kept") {
		t.Errorf("got %q, want the entry of before", out)
	}
}

// flip changes one bit at a distance after a text.
func flip(b []byte, text string, after int) []byte {
	b[bytes.Index(b, []byte(text))+after] ^= 1
	return b
}

// files are those of the data directory.
func (d *host) files(t *testing.T) map[string][]byte {
	t.Helper()
	all := make(map[string][]byte)
	names, err := os.ReadDir(d.Data)
	if err != nil {
		t.Fatal(err)
	}
	for _, n := range names {
		if all[n.Name()], err = os.ReadFile(filepath.Join(d.Data, n.Name())); err != nil {
			t.Fatal(err)
		}
	}
	return all
}

func (d *host) restore(t *testing.T, files map[string][]byte) {
	t.Helper()
	if err := os.RemoveAll(d.Data); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(d.Data, 0o700); err != nil {
		t.Fatal(err)
	}
	for name, b := range files {
		if err := os.WriteFile(filepath.Join(d.Data, name), b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
}

// A daemon that is killed while it is written to has, when it is back, all
// that it ever confirmed, and the same trust bundle.
func TestKilled(t *testing.T) {
	t.Parallel()
	d := start(t, mine())
	first := d.fetchAt(t, new(clock))
	bundle := d.Run(t, "bundle", "show")
	var confirmed []string
	for round := range 3 {
		writing := make(chan []string)
		go func() {
			var done []string
			for i := 0; ; i++ {
				path := "/agent/" + string(rune('a'+round)) + "/" + time.Duration(i).String()
				if d.Try("entry", "create", path, "--selector", "unix:uid:4711") != nil {
					writing <- done
					return
				}
				done = append(done, path)
			}
		}()
		time.AfterFunc(200*time.Millisecond, func() { d.Signal(t, syscall.SIGKILL) })
		confirmed = append(confirmed, <-writing...)
		d.Wait(t)
		d.Start(t)
	}
	if len(confirmed) == 0 {
		t.Fatal("no entry was confirmed between the kills")
	}
	out := d.Run(t, "entry", "list")
	for _, path := range confirmed {
		if !strings.Contains(out, "spiffe://hard.example"+path+" ") {
			t.Errorf("%s was confirmed and is lost", path)
		}
	}
	if now := d.Run(t, "bundle", "show"); now != bundle {
		t.Error("the trust bundle is another")
	}
	d.verifies(t, first)
	d.fetches(t, "/agent/me")
}
