package durable

import (
	"bytes"
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// What begins with own is ours in the directory of a set; the link data leads
// to the version that is current. The lock is a file that nobody else may open:
// the directory itself everybody who may read it could lock.
const (
	own  = "..deputy-"
	lock = own + "lock"
	data = "..data"
)

// A Set keeps files that belong together in a directory and replaces them all
// at once. Each is a link there, to ..data/NAME, and ..data is a link to the
// directory of one version. One rename of that link puts the next version in
// the place of the last: a path leads to the old file or to the new one, whole.
//
// Who opens several files one after the other may still meet the rename
// between two of them; nothing that is a path can help there. Who must not
// opens ..data once and the files in that directory: the version before the
// current one is kept until the next is written.
//
// What is in the directory besides is left alone. Nothing is written through a
// link. The directory must be one that nobody else may write to.
type Set struct {
	root   *os.Root
	locked *os.File
}

// A SetFile is one of the files of a Set.
type SetFile struct {
	Name string
	Data []byte
	Mode os.FileMode
	GID  int // -1: as it comes
}

// OpenSet opens a directory that is there and locks it for the life of the
// set; one that another process has open is ErrLocked.
func OpenSet(dir string) (*Set, error) {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return nil, err
	}
	f, err := root.OpenFile(lock, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		root.Close()
		return nil, fmt.Errorf("lock %s: %w", dir, err)
	}
	if err := flock(f); err != nil {
		f.Close()
		root.Close()
		return nil, fmt.Errorf("lock %s: %w", dir, err)
	}
	return &Set{root, f}, nil
}

// Close gives up the lock; the files stay.
func (s *Set) Close() error { return errors.Join(s.locked.Close(), s.root.Close()) }

// At reports whether it is this directory that is at the path.
func (s *Set) At(dir string) bool {
	mine, err := s.root.Stat(".")
	if err != nil {
		return false
	}
	there, err := os.Stat(dir)
	return err == nil && os.SameFile(mine, there)
}

// Replace makes these the files of the set, whose former files go if they are
// not among them, and reports whether that changed anything. After an error
// the directory has all of the old set or, if that is how far it came, all of
// the new; a further call mends it.
func (s *Set) Replace(files []SetFile) (changed bool, err error) {
	current, err := s.current()
	if err != nil {
		return false, fmt.Errorf("replace files in %s: %w", s.root.Name(), err)
	}
	if current != "" && s.holds(current, files) {
		return false, nil
	}
	if err := s.replace(current, files); err != nil {
		return false, fmt.Errorf("replace files in %s: %w", s.root.Name(), err)
	}
	return true, nil
}

func (s *Set) replace(current string, files []SetFile) error {
	if err := s.sweep(current); err != nil {
		return err
	}
	next := own + rand.Text()
	if err := s.write(next, files); err != nil {
		s.root.RemoveAll(next)
		return err
	}
	if err := s.link(next, data); err != nil {
		s.root.RemoveAll(next)
		return err
	}
	// From here on the new set is current.
	for _, f := range files {
		if target, err := s.root.Readlink(f.Name); err == nil && target == data+"/"+f.Name {
			continue
		}
		if err := s.link(data+"/"+f.Name, f.Name); err != nil {
			return err
		}
	}
	former, err := s.former(files)
	if err != nil {
		return err
	}
	for _, name := range former {
		if err := s.root.Remove(name); err != nil {
			return err
		}
	}
	return s.sync(".")
}

// current is the directory of the current version, "" if there is none.
func (s *Set) current() (string, error) {
	target, err := s.root.Readlink(data)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return "", nil
	case err != nil:
		return "", err
	case !strings.HasPrefix(target, own) || target == lock || strings.Contains(target, "/"):
		return "", fmt.Errorf("%s is somebody else's: it leads to %s", data, target)
	}
	return target, nil
}

// write writes a version that nobody sees yet.
func (s *Set) write(version string, files []SetFile) error {
	if err := s.root.Mkdir(version, 0o700); err != nil {
		return err
	}
	for _, f := range files {
		if err := s.writeFile(version+"/"+f.Name, f); err != nil {
			return err
		}
	}
	// The umask has been taken off.
	if err := s.root.Chmod(version, 0o755); err != nil {
		return err
	}
	return s.sync(version)
}

func (s *Set) writeFile(path string, f SetFile) (err error) {
	w, err := s.root.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, w.Close()) }()
	if f.GID >= 0 {
		if err := w.Chown(-1, f.GID); err != nil {
			return err
		}
	}
	if err := w.Chmod(f.Mode); err != nil {
		return err
	}
	if _, err := w.Write(f.Data); err != nil {
		return err
	}
	return w.Sync()
}

// sync makes the entries of a directory durable.
func (s *Set) sync(dir string) error {
	d, err := s.root.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}

// link puts a link in the place of what has the name.
func (s *Set) link(target, name string) error {
	temp := own + rand.Text()
	if err := s.root.Symlink(target, temp); err != nil {
		return err
	}
	if err := s.root.Rename(temp, name); err != nil {
		s.root.Remove(temp)
		return err
	}
	return nil
}

// sweep removes what is ours and not current: the version before, and what a
// crash left.
func (s *Set) sweep(current string) error {
	entries, err := s.list()
	if err != nil {
		return err
	}
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), own) && e.Name() != lock && e.Name() != current {
			if err := s.root.RemoveAll(e.Name()); err != nil {
				return err
			}
		}
	}
	return nil
}

// former lists links to files that a set had and these are not.
func (s *Set) former(files []SetFile) ([]string, error) {
	entries, err := s.list()
	if err != nil {
		return nil, err
	}
	var names []string
	for _, e := range entries {
		if e.Type() != fs.ModeSymlink || slices.ContainsFunc(files, func(f SetFile) bool { return f.Name == e.Name() }) {
			continue
		}
		if target, err := s.root.Readlink(e.Name()); err == nil && target == data+"/"+e.Name() {
			names = append(names, e.Name())
		}
	}
	return names, nil
}

func (s *Set) list() ([]fs.DirEntry, error) {
	d, err := s.root.Open(".")
	if err != nil {
		return nil, err
	}
	defer d.Close()
	return d.ReadDir(-1)
}

// holds reports whether the version has these very files, and the directory
// the links to them and no others.
func (s *Set) holds(version string, files []SetFile) bool {
	there, err := s.root.Open(version)
	if err != nil {
		return false
	}
	defer there.Close()
	names, err := there.Readdirnames(-1)
	if err != nil || len(names) != len(files) {
		return false
	}
	if former, err := s.former(files); err != nil || len(former) > 0 {
		return false
	}
	for _, f := range files {
		if target, err := s.root.Readlink(f.Name); err != nil || target != data+"/"+f.Name {
			return false
		}
		info, err := s.root.Lstat(version + "/" + f.Name)
		if err != nil || info.Mode() != f.Mode {
			return false
		}
		if f.GID >= 0 && int(info.Sys().(*syscall.Stat_t).Gid) != f.GID {
			return false
		}
		if old, err := s.root.ReadFile(version + "/" + f.Name); err != nil || !bytes.Equal(old, f.Data) {
			return false
		}
	}
	return true
}

// flock takes a lock that the kernel gives up with the process.
func flock(f *os.File) error {
	err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	if errors.Is(err, unix.EWOULDBLOCK) {
		return ErrLocked
	}
	return err
}
