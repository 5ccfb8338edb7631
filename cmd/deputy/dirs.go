package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/user"
	"path/filepath"
	"strconv"

	"github.com/deputy-id/deputy/conf"
	"github.com/deputy-id/deputy/internal/owned"
)

// makeDirs makes the directories of the sockets: the public one for everybody
// to enter, the private one for us (and the admin group) alone.
func makeDirs(c *conf.Config, group int) error {
	public, private := filepath.Dir(c.WorkloadSocket.Path.Value), filepath.Dir(c.AdminSocket.Path.Value)
	if err := makeDir(public, 0o755, -1); err != nil {
		return err
	}
	mode := os.FileMode(0o700)
	if group >= 0 {
		mode = 0o750
	}
	return makeDir(private, mode, group)
}

// makeDataDir makes the directory of the keys, for us alone, where there is
// none. That its parents let others pass matters: the sockets may be beside it.
// What is there already is the authority's to check.
func makeDataDir(dir string) error {
	if _, err := os.Stat(dir); !errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return createDir(dir, 0o700, -1)
}

// impassable names the directory on the way to a socket that keeps other users
// from it, or is empty.
func impassable(socket string) string {
	for dir := filepath.Dir(socket); ; dir = filepath.Dir(dir) {
		if info, err := os.Stat(dir); err == nil && info.Mode().Perm()&0o001 == 0 {
			return dir
		}
		if dir == filepath.Dir(dir) {
			return ""
		}
	}
}

// makeDir makes a directory with this mode, and its parents so that everybody
// can pass. One that is there stays as it is, but must not let others replace
// the socket in it: they could answer in our place. Neither must the way to it.
func makeDir(dir string, mode os.FileMode, group int) error {
	info, err := os.Stat(dir)
	if errors.Is(err, fs.ErrNotExist) {
		if err := createDir(dir, mode, group); err != nil {
			return err
		}
		info, err = os.Stat(dir)
	}
	if err != nil {
		return fmt.Errorf("make directory: %w", err)
	}
	if !info.IsDir() {
		return fmt.Errorf("make directory: %s is none", dir)
	}
	err = owned.File(dir)
	if err == nil && info.Mode().Perm()&0o022 != 0 && info.Mode()&fs.ModeSticky == 0 {
		err = fmt.Errorf("directory %s may be written by others (mode %04o)", dir, info.Mode().Perm())
	}
	if err == nil {
		err = owned.Way(dir)
	}
	if err != nil {
		return fmt.Errorf("somebody could put another socket in the place of ours: %w", err)
	}
	return nil
}

// createDir makes a directory and those above it, where nobody else could have
// what follows done to something that they put in its place.
func createDir(dir string, mode os.FileMode, group int) error {
	if parent := filepath.Dir(dir); parent != dir {
		_, err := os.Stat(parent)
		if errors.Is(err, fs.ErrNotExist) {
			if err := createDir(parent, 0o755, -1); err != nil {
				return err
			}
		} else if err := owned.Way(parent); err != nil {
			return fmt.Errorf("make directory: %w", err)
		}
	}
	// What somebody else put there meanwhile is not ours to give away: it may be
	// a link, and what follows would be done to where it leads.
	if err := os.Mkdir(dir, mode); err != nil {
		return fmt.Errorf("make directory: %w", err)
	}
	if group >= 0 {
		if err := os.Chown(dir, -1, group); err != nil {
			return fmt.Errorf("make directory: %w", err)
		}
	}
	// The umask has been taken off.
	if err := os.Chmod(dir, mode); err != nil {
		return fmt.Errorf("make directory: %w", err)
	}
	return nil
}

// adminGroup is the GID of the group that may administer, -1 for none.
func adminGroup(c *conf.Config) (int, error) {
	name := c.AdminSocket.Group
	if name.Value == "" {
		return -1, nil
	}
	gid, err := groupID(name.Value)
	if err != nil {
		return -1, err
	}
	return gid, nil
}

// groupID finds a group by name or GID.
func groupID(name string) (int, error) {
	g, err := user.LookupGroup(name)
	if err != nil {
		if _, bad := strconv.ParseUint(name, 10, 32); bad == nil {
			g, err = user.LookupGroupId(name)
		}
	}
	if err != nil {
		return -1, err
	}
	return strconv.Atoi(g.Gid)
}
