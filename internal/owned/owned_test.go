package owned

import (
	"net"
	"os"
	"path/filepath"
	"testing"
)

const stranger = 61002

// tree makes a directory below one that changes, and returns both.
func tree(t *testing.T) (top, dir string) {
	t.Helper()
	if os.Getuid() != 0 {
		if os.Getenv("CI") != "" {
			t.Fatal("files of other users take root to make")
		}
		t.Skip("SKIPPED: files of other users take root to make")
	}
	top = filepath.Join(t.TempDir(), "top")
	dir = filepath.Join(top, "dir")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	return top, dir
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func TestDir(t *testing.T) {
	for _, c := range []struct {
		name   string
		change func(t *testing.T, top, dir string) (path string)
		ours   bool
	}{
		{"root's", func(_ *testing.T, _, dir string) string { return dir }, true},
		{"a stranger's", func(t *testing.T, _, dir string) string {
			must(t, os.Chown(dir, stranger, -1))
			return dir
		}, false},
		{"writable by the group", func(t *testing.T, _, dir string) string {
			must(t, os.Chmod(dir, 0o775))
			return dir
		}, false},
		{"sticky and writable", func(t *testing.T, _, dir string) string {
			must(t, os.Chmod(dir, 0o777|os.ModeSticky))
			return dir
		}, false},
		{"below a stranger's", func(t *testing.T, top, dir string) string {
			must(t, os.Chown(top, stranger, -1))
			return dir
		}, false},
		{"below one that everybody may write", func(t *testing.T, top, dir string) string {
			must(t, os.Chmod(top, 0o777))
			return dir
		}, false},
		{"below a sticky one", func(t *testing.T, top, dir string) string {
			must(t, os.Chmod(top, 0o777|os.ModeSticky))
			return dir
		}, true},
		{"below one that the group may write", func(t *testing.T, top, dir string) string {
			must(t, os.Chmod(top, 0o775))
			return dir
		}, true},
		{"behind a link of root's", func(t *testing.T, top, dir string) string {
			link := filepath.Join(top, "link")
			must(t, os.Symlink(dir, link))
			return link
		}, true},
		{"behind a link of a stranger's", func(t *testing.T, top, dir string) string {
			link := filepath.Join(top, "link")
			must(t, os.Symlink(dir, link))
			must(t, os.Lchown(link, stranger, -1))
			return link
		}, false},
		{"behind a link into a stranger's", func(t *testing.T, top, dir string) string {
			link := filepath.Join(t.TempDir(), "link")
			must(t, os.Symlink(dir, link))
			must(t, os.Chown(top, stranger, -1))
			return link
		}, false},
		{"a file", func(t *testing.T, top, _ string) string {
			path := filepath.Join(top, "file")
			must(t, os.WriteFile(path, nil, 0o600))
			return path
		}, false},
		{"nothing", func(_ *testing.T, top, _ string) string { return filepath.Join(top, "none") }, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			top, dir := tree(t)
			if err := Dir(c.change(t, top, dir)); (err == nil) != c.ours {
				t.Errorf("got %v, want an error: %t", err, !c.ours)
			}
		})
	}
}

func TestWayOfAnotherUser(t *testing.T) {
	top, dir := tree(t)
	file := filepath.Join(dir, "file")
	must(t, os.WriteFile(file, nil, 0o600))
	if err := WayOf(file, stranger); err != nil {
		t.Errorf("got %v below directories of root's", err)
	}
	must(t, os.Chown(top, stranger, -1))
	if err := WayOf(file, stranger); err != nil {
		t.Errorf("got %v below a directory of that user's", err)
	}
	if err := WayOf(file, stranger+1); err == nil {
		t.Error("got no error below a directory of a third user's")
	}
	link := filepath.Join(t.TempDir(), "link")
	must(t, os.Symlink(file, link))
	must(t, os.Lchown(link, stranger+1, -1))
	if err := WayOf(link, stranger); err == nil {
		t.Error("got no error behind a link of a third user's")
	}
	// Who has a link there at one moment may have a file at the next.
	must(t, os.Lchown(file, stranger+1, -1))
	if err := WayOf(file, stranger); err == nil {
		t.Error("got no error for a file of a third user's")
	}
}

func TestReadFile(t *testing.T) {
	for name, tt := range map[string]struct {
		mode       os.FileMode
		owner, top int
		ours       bool
	}{
		"readable by all":                  {0o644, 0, 0, true},
		"writable by the group":            {0o664, 0, 0, false},
		"writable by all":                  {0o606, 0, 0, false},
		"a stranger's":                     {0o600, stranger, 0, false},
		"root's, where a stranger put one": {0o600, 0, stranger, false},
	} {
		t.Run(name, func(t *testing.T) {
			top, dir := tree(t)
			must(t, os.Chown(top, tt.top, -1))
			path := filepath.Join(dir, "file")
			must(t, os.WriteFile(path, []byte("text"), 0o600))
			must(t, os.Chmod(path, tt.mode))
			must(t, os.Chown(path, tt.owner, -1))
			got, err := ReadFile(path, 4)
			if tt.ours && (err != nil || string(got) != "text") || !tt.ours && err == nil {
				t.Errorf("got %q, %v, want ours %t", got, err, tt.ours)
			}
			if _, err := ReadFile(path, 3); err == nil {
				t.Error("read more than there may be")
			}
		})
	}
}

func TestRootSocket(t *testing.T) {
	_, dir := tree(t)
	path := filepath.Join(dir, "s")
	if RootSocket(path) {
		t.Error("got a socket where nothing is")
	}
	l, err := net.Listen("unix", path)
	must(t, err)
	t.Cleanup(func() { l.Close() })
	if !RootSocket(path) {
		t.Error("got no socket of root's, want one")
	}
	must(t, os.Chown(path, stranger, -1))
	if RootSocket(path) {
		t.Error("got a stranger's socket for root's")
	}
	file := filepath.Join(dir, "file")
	must(t, os.WriteFile(file, nil, 0o600))
	if RootSocket(file) {
		t.Error("got a file for a socket")
	}
}
