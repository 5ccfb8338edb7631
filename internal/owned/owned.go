// Package owned says whether a directory is ours: whether nobody but root and
// the user that we run as could put there what we then find in it. A CA key that
// another user could have laid down makes that user the authority, and a socket
// in the place of ours answers instead of us.
package owned

import (
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"syscall"

	"github.com/deputy-id/deputy/internal/bounded"
)

// Dir returns why another user could change what a directory holds, or put
// another directory in its place; nil if none could. The path is absolute, and
// the directory is there.
func Dir(path string) error {
	info, err := os.Stat(path)
	switch {
	case err != nil:
		return err
	case !info.IsDir():
		return fmt.Errorf("%s is not a directory", path)
	case info.Mode().Perm()&0o022 != 0:
		return fmt.Errorf("directory %s may be written by others (mode %04o)", path, info.Mode().Perm())
	}
	if err := File(path); err != nil {
		return err
	}
	return Way(path)
}

// File returns an error if the file, or what a link leads to, is neither root's
// nor ours.
func File(path string) error {
	info, err := os.Stat(path)
	if err != nil {
		return err
	}
	return mine(path, info, os.Geteuid())
}

// ReadFile reads a file, of so many bytes at most, that nobody but root and we
// could have written, or put there: another file of root's may hold what a
// stranger likes.
func ReadFile(path string, most int) ([]byte, error) {
	if err := Way(path); err != nil {
		return nil, err
	}
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	info, err := f.Stat()
	switch {
	case err != nil:
		return nil, err
	case info.Mode().Perm()&0o022 != 0:
		return nil, fmt.Errorf("%s may be written by others (mode %04o)", path, info.Mode().Perm())
	}
	if err := mine(path, info, os.Geteuid()); err != nil {
		return nil, err
	}
	return bounded.OpenFile(f, most)
}

// RootSocket reports whether there is a socket at the path and it is root's.
// What another user listens on would be a runtime that says what that user
// likes.
func RootSocket(path string) bool {
	info, err := os.Stat(path)
	return err == nil && info.Mode()&fs.ModeSocket != 0 && info.Sys().(*syscall.Stat_t).Uid == 0
}

// Way returns why another user could put something else in the place of path,
// or in it where it is a directory: that, a directory or a link on the way there
// is that user's, or may be written by everybody who likes and is not sticky. (A
// directory of our own that our group may write is how many distributions set a
// user up.)
func Way(path string) error { return WayOf(path, os.Geteuid()) }

// WayOf is Way for what is another user's: why one who is neither root nor
// that user could put something else in the place of path.
func WayOf(path string, uid int) error {
	real, err := filepath.EvalSymlinks(path)
	if err != nil {
		return err
	}
	for _, at := range slices.Concat(upFrom(path), upFrom(real)) {
		info, err := os.Lstat(at)
		if err != nil {
			return err
		}
		if err := mine(at, info, uid); err != nil {
			return err
		}
		if info.IsDir() && info.Mode().Perm()&0o002 != 0 && info.Mode()&fs.ModeSticky == 0 {
			return fmt.Errorf("directory %s may be written by everybody (mode %04o)", at, info.Mode().Perm())
		}
	}
	return nil
}

// upFrom lists a path and the directories on the way to it, nearest first. The
// path is always looked at: whoever exchanges a link for a file and back must not
// find a moment at which neither counts.
func upFrom(path string) []string {
	all := []string{path}
	for dir := filepath.Dir(path); ; dir = filepath.Dir(dir) {
		all = append(all, dir)
		if dir == filepath.Dir(dir) {
			return all
		}
	}
}

func mine(path string, info fs.FileInfo, uid int) error {
	if owner := info.Sys().(*syscall.Stat_t).Uid; owner != 0 && int(owner) != uid {
		return fmt.Errorf("%s belongs to UID %d", path, owner)
	}
	return nil
}
