// Package scratch makes the files of tests with real processes: in directories
// whose names are short enough for sockets, as those of testing.TB are not, and
// which other users may enter.
package scratch

import (
	"io"
	"os"
	"path/filepath"
	"testing"
)

// Dir makes a directory for the length of the test.
func Dir(tb testing.TB) string {
	tb.Helper()
	dir, err := os.MkdirTemp("", "dp")
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			tb.Error(err)
		}
	})
	if err := os.Chmod(dir, 0o755); err != nil {
		tb.Fatal(err)
	}
	return dir
}

// Write writes a file that everybody may read, makes its directory if there is
// none, and returns its path.
func Write(tb testing.TB, path, text string) string {
	tb.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		tb.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		tb.Fatal(err)
	}
	return path
}

// Replace puts a new file in the place of an old one as editors and
// configuration maps do, by a rename: nobody reads a half.
func Replace(tb testing.TB, path, text string) {
	tb.Helper()
	Write(tb, path+".next", text)
	if err := os.Rename(path+".next", path); err != nil {
		tb.Fatal(err)
	}
}

// Program copies a program to where every user may execute it, and returns the
// path of the copy.
func Program(tb testing.TB, path, from string) string {
	tb.Helper()
	in, err := os.Open(from)
	if err != nil {
		tb.Fatal(err)
	}
	defer in.Close()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		tb.Fatal(err)
	}
	out, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o755)
	if err != nil {
		tb.Fatal(err)
	}
	_, err = io.Copy(out, in)
	if closed := out.Close(); err == nil {
		err = closed
	}
	if err != nil {
		tb.Fatal(err)
	}
	return path
}
