package main

import (
	"os"
	"path/filepath"
	"testing"
)

func TestDirectoryOfASocketIsNobodyElses(t *testing.T) {
	if os.Getuid() != 0 {
		if os.Getenv("CI") != "" {
			t.Fatal("files of other users take root to make")
		}
		t.Skip("SKIPPED: files of other users take root to make")
	}
	const stranger = 61002
	for _, c := range []struct {
		name   string
		change func(top, dir string) error // before dir is there
		want   bool
	}{
		{"new", func(string, string) error { return nil }, true},
		{"there", func(_, dir string) error { return os.Mkdir(dir, 0o755) }, true},
		{"of a stranger", func(_, dir string) error {
			return firstError(os.Mkdir(dir, 0o755), os.Chown(dir, stranger, -1))
		}, false},
		{"below a stranger's", func(top, _ string) error { return os.Chown(top, stranger, -1) }, false},
		{"below one that everybody may write", func(top, _ string) error { return os.Chmod(top, 0o777) }, false},
		{"behind a stranger's link", func(top, dir string) error {
			link := filepath.Join(filepath.Dir(top), "link")
			return firstError(os.Symlink(top, link), os.Lchown(link, stranger, -1))
		}, false},
		{"a link that leads nowhere yet", func(top, dir string) error { return os.Symlink(filepath.Join(top, "none"), dir) }, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			top := filepath.Join(t.TempDir(), "top")
			dir := filepath.Join(top, "dir")
			if err := firstError(os.Mkdir(top, 0o755), c.change(top, dir)); err != nil {
				t.Fatal(err)
			}
			if _, err := os.Lstat(filepath.Join(filepath.Dir(top), "link")); err == nil {
				dir = filepath.Join(filepath.Dir(top), "link", "dir")
			}
			_, before := os.Lstat(dir)
			if err := makeDir(dir, 0o755, -1); (err == nil) != c.want {
				t.Errorf("got %v, want an error: %t", err, !c.want)
			}
			if _, after := os.Lstat(dir); !c.want && (before == nil) != (after == nil) {
				t.Errorf("a directory was made: %v", after)
			}
		})
	}
}

func firstError(errs ...error) error {
	for _, err := range errs {
		if err != nil {
			return err
		}
	}
	return nil
}
