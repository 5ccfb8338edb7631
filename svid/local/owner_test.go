package local

import (
	"context"
	"os"
	"path/filepath"
	"testing"
)

// Whoever could lay down keys would be the authority from the next start on.
func TestKeysThatAnotherUserCouldHaveLaidDownAreNotUsed(t *testing.T) {
	if os.Getuid() != 0 {
		if os.Getenv("CI") != "" {
			t.Fatal("files of other users take root to make")
		}
		t.Skip("SKIPPED: files of other users take root to make")
	}
	const stranger = 61002
	for name, change := range map[string]func(dir string) error{
		"their file":                   func(dir string) error { return os.Chown(filepath.Join(dir, stateFile), stranger, -1) },
		"their directory":              func(dir string) error { return os.Chown(dir, stranger, -1) },
		"a directory that they write":  func(dir string) error { return os.Chmod(dir, 0o777) },
		"a directory below one theirs": func(dir string) error { return os.Chown(filepath.Dir(dir), stranger, -1) },
	} {
		t.Run(name, func(t *testing.T) {
			dir := filepath.Join(t.TempDir(), "top", "data")
			o := Options{TrustDomain: td, DataDir: dir}
			for range 2 { // the second finds what the first left
				a, err := Open(context.Background(), o)
				if err != nil {
					t.Fatal(err)
				}
				a.Close()
			}
			if err := change(dir); err != nil {
				t.Fatal(err)
			}
			if a, err := Open(context.Background(), o); err == nil {
				a.Close()
				t.Error("it was opened, want an error")
			}
		})
	}
}
