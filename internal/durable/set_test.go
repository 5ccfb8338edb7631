package durable

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"io/fs"
	"math/big"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
)

// pair is a set with a certificate and its key.
func pair(t *testing.T, serial int64) []SetFile {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(serial)}
	cert, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	return []SetFile{
		{"cert", pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert}), 0o644, -1},
		{"key", pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), 0o600, -1},
	}
}

func open(t *testing.T, dir string) *Set {
	t.Helper()
	s, err := OpenSet(dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

func (s *Set) must(t *testing.T, files []SetFile) bool {
	t.Helper()
	changed, err := s.Replace(files)
	if err != nil {
		t.Fatal(err)
	}
	return changed
}

// A key never comes with another's certificate: not for who opens the version
// that is current, and not for who goes by the names of the files unless the
// version changes meanwhile.
func TestReadersSeeOneSet(t *testing.T) {
	const updates = 500
	dir := t.TempDir()
	s := open(t, dir)
	var sets [8][]SetFile
	for i := range sets {
		sets[i] = pair(t, int64(i+1))
	}
	s.must(t, sets[0])

	version := func() string {
		to, err := os.Readlink(filepath.Join(dir, data))
		if err != nil {
			t.Error(err)
		}
		return to
	}
	stop := make(chan struct{})
	var readers sync.WaitGroup
	for name, read := range map[string]func(version string) error{
		"the version": func(version string) error {
			_, err := tls.LoadX509KeyPair(filepath.Join(dir, version, "cert"), filepath.Join(dir, version, "key"))
			if err != nil && !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("got %v from one version", err)
			}
			return err
		},
		"names": func(string) error {
			_, err := tls.LoadX509KeyPair(filepath.Join(dir, "cert"), filepath.Join(dir, "key"))
			return err
		},
		"names, the key first": func(string) error {
			key, err := os.ReadFile(filepath.Join(dir, "key"))
			if err != nil {
				return err
			}
			cert, err := os.ReadFile(filepath.Join(dir, "cert"))
			if err != nil {
				return err
			}
			_, err = tls.X509KeyPair(cert, key)
			return err
		},
	} {
		readers.Go(func() {
			good := 0
			for {
				select {
				case <-stop:
					if good == 0 {
						t.Errorf("by %s: no read", name)
					}
					return
				default:
				}
				before := version()
				switch err := read(before); {
				case err == nil:
					good++
				case version() == before:
					t.Errorf("by %s: %v", name, err)
				}
			}
		})
	}
	for i := range updates {
		if !s.must(t, sets[(i+1)%len(sets)]) {
			t.Error("got no change, want one")
		}
	}
	close(stop)
	readers.Wait()
}

func TestReplaceOfTheSameChangesNothing(t *testing.T) {
	for name, c := range map[string]struct {
		spoil func(t *testing.T, dir string)
		want  bool
	}{
		"as it is": {func(*testing.T, string) {}, false},
		"a foreign file beside": {func(t *testing.T, dir string) {
			write(t, filepath.Join(dir, "mine"))
		}, false},
		"a file in the place of a link": {func(t *testing.T, dir string) {
			remove(t, filepath.Join(dir, "key"))
			write(t, filepath.Join(dir, "key"))
		}, true},
		"a link that is gone": {func(t *testing.T, dir string) { remove(t, filepath.Join(dir, "key")) }, true},
		"a link to a file of before": {func(t *testing.T, dir string) {
			if err := os.Symlink(data+"/old", filepath.Join(dir, "old")); err != nil {
				t.Fatal(err)
			}
		}, true},
		"another content": {func(t *testing.T, dir string) { write(t, filepath.Join(dir, "key")) }, true},
		"another mode": {func(t *testing.T, dir string) {
			if err := os.Chmod(filepath.Join(dir, "key"), 0o644); err != nil {
				t.Fatal(err)
			}
		}, true},
		"a version that is gone": {func(t *testing.T, dir string) {
			to, err := os.Readlink(filepath.Join(dir, data))
			if err != nil {
				t.Fatal(err)
			}
			remove(t, filepath.Join(dir, to))
		}, true},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			files := pair(t, 1)
			first, err := OpenSet(dir)
			if err != nil {
				t.Fatal(err)
			}
			first.must(t, files)
			if err := first.Close(); err != nil {
				t.Fatal(err)
			}
			c.spoil(t, dir)
			if got := open(t, dir).must(t, files); got != c.want {
				t.Errorf("got changed %t, want %t", got, c.want)
			}
			if _, err := tls.LoadX509KeyPair(filepath.Join(dir, "cert"), filepath.Join(dir, "key")); err != nil {
				t.Error(err)
			}
			if _, err := os.Lstat(filepath.Join(dir, "old")); !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("got %v for the link of before", err)
			}
		})
	}
}

func write(t *testing.T, path string) {
	t.Helper()
	if err := os.WriteFile(path, []byte("other"), 0o600); err != nil {
		t.Fatal(err)
	}
}

func remove(t *testing.T, path string) {
	t.Helper()
	if err := os.RemoveAll(path); err != nil {
		t.Fatal(err)
	}
}

func TestASetIsOpenOnce(t *testing.T) {
	dir := t.TempDir()
	s, err := OpenSet(dir)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := OpenSet(dir); !errors.Is(err, ErrLocked) {
		t.Fatalf("got %v, want ErrLocked", err)
	}
	if info, err := os.Stat(filepath.Join(dir, lock)); err != nil || info.Mode() != 0o600 {
		t.Errorf("got %v, %v for the lock, want what only its owner may open", info, err)
	}
	s.Close()
	open(t, dir)
}

// A set that cannot be written leaves the old one as it was, and nothing half.
func TestReplaceThatFailsKeepsTheOldSet(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir)
	old := pair(t, 1)
	s.must(t, old)
	// The second of the files cannot be made.
	next := append(pair(t, 2), SetFile{"key", nil, 0o600, -1})
	if _, err := s.Replace(next); err == nil {
		t.Fatal("got no error, want one")
	}
	if s.must(t, old) {
		t.Error("the old set has changed")
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, e := range entries {
		if !strings.HasPrefix(e.Name(), own) {
			names = append(names, e.Name())
		}
	}
	if want := []string{data, "cert", "key"}; !slices.Equal(names, want) || len(entries) != len(want)+2 {
		t.Errorf("got %v, want %v, a version and the lock", entries, want)
	}
}

func TestReplaceGivesAFileToAGroup(t *testing.T) {
	if os.Getuid() != 0 {
		if os.Getenv("CI") != "" {
			t.Fatal("groups of others take root to give to")
		}
		t.Skip("SKIPPED: groups of others take root to give to")
	}
	dir := t.TempDir()
	s := open(t, dir)
	files := pair(t, 1)
	files[1].Mode, files[1].GID = 0o640, 4711
	s.must(t, files)
	info, err := os.Stat(filepath.Join(dir, "key"))
	if err != nil {
		t.Fatal(err)
	}
	if gid := info.Sys().(*syscall.Stat_t).Gid; info.Mode() != 0o640 || gid != 4711 {
		t.Errorf("got mode %o, group %d, want 640, 4711", info.Mode(), gid)
	}
	if s.must(t, files) {
		t.Error("the same set is said to be another")
	}
	files[1].GID = 4712
	if !s.must(t, files) {
		t.Error("another group is said to be no change")
	}
}
