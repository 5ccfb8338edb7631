package hardship

import (
	"encoding/binary"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	build "github.com/deputy-id/deputy/test/binary"
	"github.com/deputy-id/deputy/test/scratch"
)

// timekeeper builds a deputy whose clock can be set: another package time in the
// place of Go's. (A time namespace moves the other clocks only, and the
// machine's own is not ours to set.) The go command keeps what it compiled; the
// first time takes a minute.
func timekeeper(t *testing.T) string {
	t.Helper()
	build.Deputy(t) // so that the result depends on its sources
	dir := t.TempDir()
	out, err := exec.Command("go", "env", "GOROOT").Output()
	if err != nil {
		t.Fatal(err)
	}
	original := filepath.Join(strings.TrimSpace(string(out)), "src/time")
	text, err := os.ReadFile(filepath.Join(original, "time.go"))
	if err != nil {
		t.Fatal(err)
	}
	const now = "\tsec, nsec, mono := runtimeNow()\n"
	if strings.Count(string(text), now) != 1 {
		t.Fatal("this Go tells the time in another way")
	}
	changed := strings.Replace(string(text), now, now+"\tsec += offset()\n", 1)
	more, err := filepath.Abs("testdata/clock.go.txt")
	if err != nil {
		t.Fatal(err)
	}
	overlay, err := json.Marshal(map[string]map[string]string{"Replace": {
		filepath.Join(original, "time.go"):   filepath.Join(dir, "time.go"),
		filepath.Join(original, "offset.go"): more,
	}})
	if err != nil {
		t.Fatal(err)
	}
	scratch.Write(t, filepath.Join(dir, "time.go"), changed)
	scratch.Write(t, filepath.Join(dir, "overlay.json"), string(overlay))
	path := filepath.Join(dir, "deputy")
	if err := build.Build(path, "./cmd/deputy", "-overlay", filepath.Join(dir, "overlay.json")); err != nil {
		t.Fatal(err)
	}
	return path
}

// A clock is that of one daemon.
type clock struct {
	file string
	by   time.Duration // ahead of ours
}

func (c *clock) set(t *testing.T, by time.Duration) {
	t.Helper()
	f, err := os.OpenFile(c.file, os.O_WRONLY|os.O_CREATE, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var b [8]byte
	binary.NativeEndian.PutUint64(b[:], uint64(by/time.Second))
	if _, err := f.WriteAt(b[:], 0); err != nil {
		t.Fatal(err)
	}
	c.by = by
}

func (c *clock) now() time.Time { return time.Now().Add(c.by) }

// An issued SVID, with the time of the daemon's clock at which it was.
type issued struct {
	svid *x509svid.SVID
	at   time.Time
}

// fetchAt fetches an SVID and wants it to be valid by the daemon's clock, under
// the bundle of now.
func (d *host) fetchAt(t *testing.T, c *clock) issued {
	t.Helper()
	dir := t.TempDir()
	d.Run(t, "fetch", "x509", "--write", dir)
	svid, err := x509svid.Load(filepath.Join(dir, "svid.0.pem"), filepath.Join(dir, "svid.0.key"))
	if err != nil {
		t.Fatal(err)
	}
	got := issued{svid, c.now()}
	d.verifies(t, got)
	return got
}

// verifies wants an SVID to hold under the bundle of now, at the time of its issue.
func (d *host) verifies(t *testing.T, i issued) {
	t.Helper()
	dir := t.TempDir()
	d.Run(t, "fetch", "bundle", "--write", dir)
	bundle, err := x509bundle.Load(spiffeid.RequireTrustDomainFromString("hard.example"), filepath.Join(dir, "bundle.0.pem"))
	if err != nil {
		t.Fatal(err)
	}
	if _, _, err := x509svid.Verify(i.svid.Certificates, bundle, x509svid.WithTime(i.at)); err != nil {
		t.Errorf("an SVID of %s under the bundle of now: %v", i.at.Format(time.RFC3339), err)
	}
}

func TestClockThatJumps(t *testing.T) {
	t.Parallel()
	d := newHost(t, mine())
	c := &clock{file: filepath.Join(d.Dir, "clock")}
	c.set(t, 0)
	cmd := exec.Command(timekeeper(t), d.Args()[1:]...) // clients go by the true time
	cmd.Env = append(os.Environ(), "CLOCK_OFFSET="+c.file)
	d.StartBy(t, cmd)
	d.Run(t, "entry", "create", "/agent/kept", "--selector", "unix:uid:4711")
	watching := d.watch(t)

	first := d.fetchAt(t, c)
	for _, jump := range []struct {
		name string
		to   time.Duration
	}{
		{"ahead, within the life of the CA", 3 * time.Hour},
		{"back by minutes", 3*time.Hour - 10*time.Minute},
		{"back to before the start of the daemon", -30 * time.Minute},
		{"back by days", -72 * time.Hour},
		{"to the true time again", 0},
	} {
		c.set(t, jump.to)
		then := d.fetchAt(t, c)
		// What was issued before still holds.
		d.verifies(t, first)
		if out := d.Run(t, "fetch", "jwt", "--audience", "a"); out == "" {
			t.Errorf("%s: no token", jump.name)
		}
		c.set(t, jump.to+time.Minute)
		d.verifies(t, then)
		d.Alive(t)
	}
	// Where the CA has ended there is a new one at once.
	c.set(t, 30*24*time.Hour)
	d.fetchAt(t, c)
	watching.Says(t, "update 2") // the stream followed
	if out := d.Run(t, "entry", "list"); !strings.Contains(out, "/agent/kept") {
		t.Errorf("got %q, want the entry of before", out)
	}
	d.Stop(t)
}
