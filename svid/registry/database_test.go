package registry

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/hashicorp/go-hclog"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// closed returns the bytes of a database with n entries, and those entries.
func closed(t testing.TB, n int) ([]byte, []Entry) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "entries.db")
	s := open(t, path)
	for i := range n {
		e := full(t)
		e.Path = fmt.Sprintf("/agent/%d", i)
		create(t, s, e)
	}
	set, _ := s.Set()
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(path + "-wal"); err == nil {
		t.Fatal("a log is left behind")
	}
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return data, set.Entries()
}

var ids = cmpopts.EquateComparable(spiffeid.ID{}, spiffeid.TrustDomain{})

// broken opens a database with this content. It must either be as it was, or
// be refused by name and left alone.
func broken(t *testing.T, data []byte, want []Entry) error {
	t.Helper()
	path := filepath.Join(t.TempDir(), "entries.db")
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}
	s, err := Open(t.Context(), path, td, hclog.NewNullLogger())
	if err == nil {
		set, _ := s.Set()
		if diff := cmp.Diff(want, set.Entries(), ids); diff != "" {
			t.Errorf("a broken database was accepted: %s", diff)
		}
		s.Close()
		return nil
	}
	if !strings.Contains(err.Error(), path) {
		t.Errorf("got %v, which does not name the file", err)
	}
	after, readErr := os.ReadFile(path)
	if readErr != nil {
		t.Fatal(readErr)
	}
	if !bytes.Equal(after, data) {
		t.Error("the broken file was changed")
	}
	return err
}

func TestBrokenDatabases(t *testing.T) {
	data, entries := closed(t, 40)
	for name, content := range map[string][]byte{
		"empty":             {},
		"cut in the header": data[:50],
		"cut after a page":  data[:4096],
		"cut in the middle": data[:len(data)/2],
		"text":              []byte("trust_domain = \"example.org\"\n" + strings.Repeat("#", 5000)),
		"zeroes":            make([]byte, len(data)),
	} {
		t.Run(name, func(t *testing.T) {
			err := broken(t, content, entries)
			if err == nil {
				t.Fatal("got no error")
			}
			if name == "empty" && !strings.Contains(err.Error(), "restore it") {
				t.Errorf("got %v, want what to do", err)
			}
		})
	}
}

func TestFlippedBitsNeverChangeAnEntry(t *testing.T) {
	data, entries := closed(t, 40)
	rng := rand.New(rand.NewPCG(1, 2))
	refused := 0
	for range 300 {
		at, bit := rng.IntN(len(data)), rng.IntN(8)
		flipped := bytes.Clone(data)
		flipped[at] ^= 1 << bit
		if broken(t, flipped, entries) != nil {
			refused++
		}
		if t.Failed() {
			t.Fatalf("byte %d, bit %d", at, bit)
		}
	}
	// The last byte may be one that no entry is in.
	broken(t, data[:len(data)-1], entries)
	if refused == 0 {
		t.Error("no flipped bit was noticed")
	}
}

func TestAlteredContentIsRefused(t *testing.T) {
	for name, statement := range map[string]string{
		"another body":      `UPDATE entry SET body = CAST(replace(CAST(body AS TEXT), 'unix:uid:1000', 'unix:uid:1001') AS BLOB)`,
		"a later expiry":    `UPDATE entry SET expires_at = expires_at + 1`,
		"another ID":        `UPDATE entry SET id = 'other'`,
		"no trust domain":   `DELETE FROM meta`,
		"a newer version":   `PRAGMA user_version = 99`,
		"a foreign program": `PRAGMA application_id = 1`,
		"a missing table":   `DROP TABLE entry`,
	} {
		t.Run(name, func(t *testing.T) {
			data, entries := closed(t, 1)
			path := filepath.Join(t.TempDir(), "entries.db")
			if err := os.WriteFile(path, data, 0o600); err != nil {
				t.Fatal(err)
			}
			db, err := connect(path, "rw")
			if err != nil {
				t.Fatal(err)
			}
			if _, err := db.ExecContext(t.Context(), statement); err != nil {
				t.Fatal(err)
			}
			db.Close()
			data, err = os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			if err := broken(t, data, entries); err == nil {
				t.Error("got no error")
			}
		})
	}
}

func TestWhatIsNoFileIsRefused(t *testing.T) {
	dir := t.TempDir()
	for name, path := range map[string]string{"a directory": dir, "no directory": filepath.Join(dir, "no", "entries.db")} {
		if _, err := Open(t.Context(), path, td, hclog.NewNullLogger()); err == nil || !strings.Contains(err.Error(), path) {
			t.Errorf("%s: got %v, want an error that names it", name, err)
		}
	}
}

func TestAFailedWriteChangesNothing(t *testing.T) {
	for name, pragma := range map[string]string{"a disk that is read-only": "query_only = 1", "a full disk": "max_page_count = 1"} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "entries.db")
			s := open(t, path)
			e := create(t, s, entry(t, "/a", "unix:uid:1"))
			before, stale := s.Set()
			if err := s.Break(t.Context(), pragma); err != nil {
				t.Fatal(err)
			}
			large := strings.Repeat("x", 1000)
			var failed error
			for i := range 100 { // a full disk has room in the pages that there are
				new := entry(t, fmt.Sprintf("/%s/%d", large, i), "unix:uid:1")
				if _, failed = s.Create(t.Context(), new); failed != nil {
					break
				}
				before, stale = s.Set()
			}
			if failed == nil || errors.Is(failed, ErrInvalid) {
				t.Fatalf("create: got %v, want the disk's error", failed)
			}
			if _, err := s.Update(t.Context(), e.ID, func(e *Entry) error {
				for range 60 {
					e.Audiences = append(e.Audiences, fmt.Sprint(len(e.Audiences), large))
				}
				return nil
			}); err == nil {
				t.Error("update: got no error")
			}
			after, _ := s.Set()
			if after != before {
				t.Error("a set was published")
			}
			select {
			case <-stale:
				t.Error("the set is stale")
			default:
			}
			s.Close()
			again := open(t, path)
			if diff := cmp.Diff(before.Entries(), must(again.Set()).Entries(), ids); diff != "" {
				t.Error(diff)
			}
		})
	}
}

func must[T, U any](v T, _ U) T { return v }

func TestExpiredEntriesAreNotLoaded(t *testing.T) {
	path := filepath.Join(t.TempDir(), "entries.db")
	s := open(t, path)
	e := entry(t, "/a", "unix:uid:1")
	e.ID, e.ExpiresAt = "mine", time.Now().Add(-time.Second)
	create(t, s, e)
	s.Close()
	s = open(t, path)
	if got := paths(s); len(got) != 0 {
		t.Errorf("got %v, want nothing", got)
	}
	e.ExpiresAt = time.Time{}
	create(t, s, e) // its row is still there
	s.Close()
	if diff := cmp.Diff([]string{"/a"}, paths(open(t, path))); diff != "" {
		t.Error(diff)
	}
}

func FuzzRow(f *testing.F) {
	e, err := full(f).Check(td)
	if err != nil {
		f.Fatal(err)
	}
	r, err := newRow(&e)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(r.body)
	f.Add([]byte(`{"path":"/a","parent_id":"spiffe://example.org/spire/server","selectors":["unix:uid:1"],"x509_ttl":9223372036854775807}`))
	f.Add([]byte(`{"path":"/a","selectors":["unix:uid:1"]}{}`))
	f.Fuzz(func(t *testing.T, body []byte) {
		r := row{id: "x", body: body}
		r.sum = r.digest()
		e, err := r.entry(td)
		if err != nil {
			return
		}
		again, err := newRow(&e)
		if err != nil {
			t.Fatal(err)
		}
		back, err := again.entry(td)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(e, back, ids); diff != "" {
			t.Error(diff)
		}
	})
}

func BenchmarkCreate(b *testing.B) {
	s := open(b, filepath.Join(b.TempDir(), "entries.db"))
	for _, e := range many(b, 10000) {
		e.ID = ""
		if _, err := s.CreateTransient(b.Context(), e); err != nil {
			b.Fatal(err)
		}
	}
	i := 0
	for b.Loop() {
		i++
		if _, err := s.Create(b.Context(), entry(b, fmt.Sprintf("/b/%d", i), "unix:uid:1")); err != nil {
			b.Fatal(err)
		}
	}
}
