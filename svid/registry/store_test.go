package registry

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/hashicorp/go-hclog"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/deputy-id/deputy/attestor"
	"github.com/deputy-id/deputy/test/bubble"
)

var td = spiffeid.RequireTrustDomainFromString("example.org")

func selectors(t testing.TB, texts ...string) []attestor.Selector {
	t.Helper()
	out := make([]attestor.Selector, len(texts))
	for i, text := range texts {
		s, err := attestor.ParseSelector(text)
		if err != nil {
			t.Fatal(err)
		}
		out[i] = s
	}
	return out
}

func entry(t testing.TB, path string, texts ...string) Entry {
	t.Helper()
	return Entry{Path: path, Selectors: selectors(t, texts...)}
}

func open(t testing.TB, path string) *Store {
	t.Helper()
	s, err := Open(t.Context(), path, td, hclog.NewNullLogger())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

func create(t testing.TB, s *Store, e Entry) Entry {
	t.Helper()
	e, err := s.Create(t.Context(), e)
	if err != nil {
		t.Fatal(err)
	}
	return e
}

func paths(s *Store) []string {
	set, _ := s.Set()
	var out []string
	for _, e := range set.Entries() {
		out = append(out, e.Path)
	}
	return out
}

func full(t testing.TB) Entry {
	return Entry{
		Path:          "/agent/{{unix.user}}",
		Selectors:     selectors(t, "unix:uid:1000", "docker:label:a:b:c"),
		X509TTL:       time.Hour,
		JWTTTL:        5 * time.Minute,
		DNSNames:      []string{"b.example.org", "a.example.org"},
		Hint:          "main",
		FederatesWith: []spiffeid.TrustDomain{spiffeid.RequireTrustDomainFromString("other.org")},
		Audiences:     []string{"z", "a"},
		Instance:      true,
		AllowTraced:   true,
		JWTFresh:      true,
		ExpiresAt:     time.Now().Add(time.Hour).Round(0),
	}
}

// crash copies the database as a power cut would leave it.
func crash(t *testing.T, path string) string {
	t.Helper()
	to := filepath.Join(t.TempDir(), "entries.db")
	for _, suffix := range []string{"", "-wal"} {
		data, err := os.ReadFile(path + suffix)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(to+suffix, data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return to
}

func TestEntriesSurviveACrash(t *testing.T) {
	path := filepath.Join(t.TempDir(), "entries ?#%.db")
	s := open(t, path)
	want := create(t, s, full(t))
	gone := create(t, s, entry(t, "/gone", "unix:uid:1"))
	if _, err := s.Delete(t.Context(), gone.ID); err != nil {
		t.Fatal(err)
	}
	if _, err := s.CreateTransient(t.Context(), entry(t, "/transient", "unix:uid:2")); err != nil {
		t.Fatal(err)
	}

	again := open(t, crash(t, path))
	if diff := cmp.Diff([]string{"/agent/{{unix.user}}"}, paths(again)); diff != "" {
		t.Fatal(diff)
	}
	got, err := again.Get(t.Context(), want.ID)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, got, cmpopts.EquateComparable(spiffeid.ID{}, spiffeid.TrustDomain{})); diff != "" {
		t.Error(diff)
	}
}

func TestDatabaseIsForItsOwnerAlone(t *testing.T) {
	path := filepath.Join(t.TempDir(), "entries.db")
	s := open(t, path)
	create(t, s, full(t))
	for _, suffix := range []string{"", "-wal", "-shm"} {
		info, err := os.Stat(path + suffix)
		if err != nil {
			t.Fatal(err)
		}
		if got := info.Mode().Perm(); got != 0o600 {
			t.Errorf("%q: got mode %o, want 600", suffix, got)
		}
	}
}

func TestDatabaseOfAnotherTrustDomainIsRefused(t *testing.T) {
	path := filepath.Join(t.TempDir(), "entries.db")
	open(t, path).Close()
	_, err := Open(t.Context(), path, spiffeid.RequireTrustDomainFromString("other.org"), hclog.NewNullLogger())
	if err == nil || !strings.Contains(err.Error(), path) || !strings.Contains(err.Error(), `"example.org"`) {
		t.Errorf("got %v, want one that names the file and its trust domain", err)
	}
}

func TestCreate(t *testing.T) {
	s := open(t, "")
	first := create(t, s, entry(t, "/a", "unix:uid:1", "unix:gid:1"))
	if first.SPIFFEID.String() != "spiffe://example.org/a" || first.ParentID != NodeID(td) {
		t.Errorf("got %s under %s", first.SPIFFEID, first.ParentID)
	}
	got, err := s.Create(t.Context(), entry(t, "/a", "unix:gid:1", "unix:uid:1", "unix:gid:1"))
	if !errors.Is(err, ErrExists) || got.ID != first.ID {
		t.Errorf("similar entry: got %s, %v, want ErrExists and the first", got.ID, err)
	}
	same := entry(t, "/b", "unix:uid:1")
	same.ID = first.ID
	if _, err := s.Create(t.Context(), same); !errors.Is(err, ErrExists) {
		t.Errorf("taken ID: got %v, want ErrExists", err)
	}
	same.ID = "file-x"
	if _, err := s.Create(t.Context(), same); !errors.Is(err, ErrInvalid) {
		t.Errorf("ID of the file's kind: got %v, want ErrInvalid", err)
	}
	if _, err := s.Create(t.Context(), entry(t, "/b")); !errors.Is(err, ErrInvalid) {
		t.Errorf("no selectors: got %v, want ErrInvalid", err)
	}
	if diff := cmp.Diff([]string{"/a"}, paths(s)); diff != "" {
		t.Error(diff)
	}
}

func TestUpdate(t *testing.T) {
	s := open(t, filepath.Join(t.TempDir(), "entries.db"))
	a := create(t, s, entry(t, "/a", "unix:uid:1"))
	create(t, s, entry(t, "/b", "unix:uid:1"))

	got, err := s.Update(t.Context(), a.ID, func(e *Entry) error {
		e.Path, e.Hint, e.ID, e.FromFile = "/c", "x", "other", true
		e.Selectors[0].Value = "uid:2"
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if got.ID != a.ID || got.Revision != 1 || got.SPIFFEID.Path() != "/c" || got.FromFile || !got.CreatedAt.Equal(a.CreatedAt) {
		t.Errorf("got %+v", got)
	}
	if a.Selectors[0].Value != "uid:1" {
		t.Error("an entry that was given out changed")
	}
	set, stale := s.Set()
	for name, tc := range map[string]struct {
		id     string
		change func(*Entry) error
		want   error
	}{
		"an unknown ID":     {"nobody", nil, ErrNotFound},
		"a similar entry":   {a.ID, func(e *Entry) error { e.Path = "/b"; e.Selectors[0].Value = "uid:1"; return nil }, ErrExists},
		"an invalid change": {a.ID, func(e *Entry) error { e.Path = "/spire/x"; return nil }, ErrInvalid},
		"an editor's no":    {a.ID, func(*Entry) error { return os.ErrPermission }, os.ErrPermission},
	} {
		if _, err := s.Update(t.Context(), tc.id, tc.change); !errors.Is(err, tc.want) {
			t.Errorf("%s: got %v, want %v", name, err, tc.want)
		}
	}
	select {
	case <-stale:
		t.Error("a refused update published a set")
	default:
	}
	if e, _ := set.Entry(a.ID); e.Path != "/c" {
		t.Errorf("got path %s, want /c", e.Path)
	}
}

func TestFileEntries(t *testing.T) {
	s := open(t, "")
	api := create(t, s, entry(t, "/api", "unix:uid:1"))
	file := []Entry{entry(t, "/z", "unix:uid:1"), entry(t, "/a", "unix:uid:1")}
	if err := s.ReplaceFile(file); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]string{"/z", "/a", "/api"}, paths(s)); diff != "" {
		t.Error(diff)
	}
	set, stale := s.Set()
	z := set.Entries()[0]
	if !strings.HasPrefix(z.ID, "file-") || !z.FromFile {
		t.Errorf("got ID %s", z.ID)
	}
	if _, err := s.Delete(t.Context(), z.ID); !errors.Is(err, ErrFromFile) {
		t.Errorf("delete: got %v, want ErrFromFile", err)
	}
	if _, err := s.Update(t.Context(), z.ID, nil); !errors.Is(err, ErrFromFile) {
		t.Errorf("update: got %v, want ErrFromFile", err)
	}
	if err := s.ReplaceFile([]Entry{entry(t, "/z", "unix:uid:1"), entry(t, "/a", "unix:uid:1")}); err != nil {
		t.Fatal(err)
	}
	if err := s.ReplaceFile([]Entry{entry(t, "/z", "unix:uid:1"), entry(t, "/z", "unix:uid:1")}); !errors.Is(err, ErrExists) {
		t.Errorf("similar entries: got %v, want ErrExists", err)
	}
	if err := s.ReplaceFile([]Entry{entry(t, "/new", "unix:uid:1"), {}}); !errors.Is(err, ErrInvalid) {
		t.Errorf("invalid entry: got %v, want ErrInvalid", err)
	}
	select {
	case <-stale:
		t.Error("a reload that changes nothing published a set")
	default:
	}
	if err := s.ReplaceFile([]Entry{entry(t, "/a", "unix:uid:1"), entry(t, "/z", "unix:uid:1")}); err != nil {
		t.Fatal(err)
	}
	<-stale
	set, _ = s.Set()
	if e, _ := set.Entry(z.ID); !e.CreatedAt.Equal(z.CreatedAt) {
		t.Error("an entry that stayed has a new creation time")
	}
	if err := s.ReplaceFile(nil); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]string{api.Path}, paths(s)); diff != "" {
		t.Error(diff)
	}
}

func TestRunRemovesEntriesAsTheyExpire(t *testing.T) {
	bubble.Test(t, func(t *testing.T) {
		s := open(t, "")
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error)
		go func() { done <- s.Run(ctx) }()
		start := time.Now()
		create(t, s, entry(t, "/stays", "unix:uid:1"))
		for i := range 3 {
			e := entry(t, fmt.Sprintf("/e%d", i), "unix:uid:1")
			e.ExpiresAt = start.Add(time.Duration(3-i) * 10 * time.Minute)
			create(t, s, e)
		}
		for want := 4; want > 1; want-- {
			set, stale := s.Set()
			if set.Len() != want {
				t.Fatalf("after %s: got %d entries, want %d", time.Since(start), set.Len(), want)
			}
			<-stale
		}
		if got := time.Since(start); got != 30*time.Minute {
			t.Errorf("the last went after %s, want 30m", got)
		}
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

// The wall clock is what expire is given.
func TestClockThatIsAheadForAWhileCostsNoEntry(t *testing.T) {
	path := filepath.Join(t.TempDir(), "entries.db")
	s := open(t, path)
	e := entry(t, "/e", "unix:uid:1")
	e.ExpiresAt = time.Now().Add(time.Hour)
	create(t, s, e)
	s.expire(t.Context(), time.Now())
	for _, wrong := range []time.Duration{10 * 365 * 24 * time.Hour, -10 * 365 * 24 * time.Hour, 2 * time.Hour} {
		_, stale := s.Set()
		next := s.expire(t.Context(), time.Now().Add(wrong))
		if next.IsZero() {
			t.Errorf("%s off: nobody looks again", wrong)
		}
		if wrong > 0 {
			select {
			case <-stale:
			default:
				t.Errorf("%s off: streams that have the entry were not told to look again", wrong)
			}
		}
	}
	_, stale := s.Set()
	s.expire(t.Context(), time.Now())
	select {
	case <-stale:
	default:
		t.Error("the right time again: nobody was told to look again")
	}
	if diff := cmp.Diff([]string{"/e"}, paths(s)); diff != "" {
		t.Error(diff)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]string{"/e"}, paths(open(t, path))); diff != "" {
		t.Errorf("after a restart: %s", diff)
	}
}

func TestConcurrentWriters(t *testing.T) {
	path := filepath.Join(t.TempDir(), "entries.db")
	s := open(t, path)
	var wg sync.WaitGroup
	for w := range 8 {
		wg.Go(func() {
			for i := range 10 {
				e, err := s.Create(t.Context(), entry(t, fmt.Sprintf("/w%d/%d", w, i), "unix:uid:1"))
				if err != nil {
					t.Error(err)
					return
				}
				set, _ := s.Set()
				set.Match(&attestor.Evidence{Selectors: e.Selectors})
				if _, err := s.Update(t.Context(), e.ID, func(e *Entry) error { e.Hint = "x"; return nil }); err != nil {
					t.Error(err)
				}
				if i%2 == 0 {
					if _, err := s.Delete(t.Context(), e.ID); err != nil {
						t.Error(err)
					}
				}
			}
		})
	}
	wg.Go(func() {
		for i := range 20 {
			if err := s.ReplaceFile([]Entry{entry(t, fmt.Sprintf("/file/%d", i), "unix:uid:1")}); err != nil {
				t.Error(err)
			}
		}
	})
	wg.Wait()
	if err := s.ReplaceFile(nil); err != nil {
		t.Fatal(err)
	}
	set, _ := s.Set()
	if set.Len() != 40 {
		t.Errorf("got %d entries, want 40", set.Len())
	}
	m := set.Match(&attestor.Evidence{Selectors: selectors(t, "unix:uid:1")})
	if len(m.Entries) != 40 {
		t.Errorf("got %d matches, want 40", len(m.Entries))
	}
	s.Close()
	if got := len(paths(open(t, path))); got != 40 {
		t.Errorf("after reopening: got %d entries, want 40", got)
	}
}
