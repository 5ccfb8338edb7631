package attestor

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/deputy-id/deputy/attestor/peer"
)

// Cgroups reads the places of processes. It holds the roots of the hierarchies
// as the daemon's own mounts show them, which root controls; what a process
// has mounted in a namespace of its own plays no part.
type Cgroups struct {
	unified, systemd *os.File // nil where not mounted; closed when nobody uses the Cgroups any more
	trusted          []uint32 // UIDs that count as root
}

// OpenCgroups finds the v2 hierarchy and v1's name=systemd.
func OpenCgroups() (*Cgroups, error) {
	text, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil, fmt.Errorf("read mounts: %w", err)
	}
	unified, systemd := cgroupMounts(text)
	c := &Cgroups{trusted: []uint32{0}}
	if uid := uint32(os.Geteuid()); uid != 0 {
		c.trusted = append(c.trusted, uid)
	}
	if c.unified, err = openCgroupRoot(unified, unix.CGROUP2_SUPER_MAGIC); err != nil {
		return nil, err
	}
	if c.systemd, err = openCgroupRoot(systemd, unix.CGROUP_SUPER_MAGIC); err != nil {
		return nil, err
	}
	if c.unified == nil && c.systemd == nil {
		return nil, errors.New("find cgroups: neither a v2 hierarchy nor v1's name=systemd is mounted with its root")
	}
	return c, nil
}

var ownCgroups = sync.OnceValues(OpenCgroups)

// PlaceOf is Place on hierarchies that are found once.
func PlaceOf(p *peer.Process) (Place, error) {
	c, err := ownCgroups()
	if err != nil {
		return Place{}, err
	}
	return c.Place(p)
}

// Place returns where the process is now. An error means that the place is
// unknown; a process whose directories do not count has a Place that says so.
func (c *Cgroups) Place(p *peer.Process) (Place, error) {
	const tries = 3
	text, err := p.ReadFile("cgroup")
	for range tries {
		if err != nil {
			return Place{}, err
		}
		place, walkErr := placeIn(text, c)
		// The directories are evidence only of where the process still is.
		var again []byte
		if again, err = p.ReadFile("cgroup"); err == nil && bytes.Equal(again, text) {
			if walkErr != nil {
				return Place{}, fmt.Errorf("read cgroup of %d: %w", p.PID(), walkErr)
			}
			if place.Owner == "" {
				info, err := p.Info()
				if err != nil {
					return Place{}, err
				}
				place.Owner = "uid:" + decimal(info.UID)
			}
			return place, nil
		}
		text = again
	}
	return Place{}, fmt.Errorf("read cgroup of %d: it keeps moving", p.PID())
}

// v2Decides reports whether the names come from the v2 line, whose changes the
// v2 cgroup ID shows. What cannot be read is not decided by it.
func v2Decides(text []byte) bool {
	lines, err := parseCgroup(text)
	if err != nil {
		return false
	}
	line, ok := lines.counting()
	return ok && !line.v1
}

// look implements directories.
func (c *Cgroups) look(v1 bool, path string) (directory, error) {
	root := c.unified
	if v1 {
		root = c.systemd
	}
	if root == nil {
		return directory{}, errors.New("the hierarchy is not mounted here")
	}
	// An open descriptor: the checks below are all of one directory, even if
	// another takes its name meanwhile.
	fd, err := unix.Openat2(int(root.Fd()), "."+path, &unix.OpenHow{
		Flags:   unix.O_RDONLY | unix.O_DIRECTORY | unix.O_CLOEXEC,
		Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_NO_XDEV,
	})
	if err != nil {
		return directory{}, fmt.Errorf("open cgroup %q: %w", path, err)
	}
	defer unix.Close(fd)

	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return directory{}, fmt.Errorf("stat cgroup %q: %w", path, err)
	}
	d := directory{closed: c.ours(&st)}
	d.guarded = true
	files := []string{"cgroup.procs"}
	if v1 {
		files = []string{"cgroup.procs", "tasks"}
	}
	for _, name := range files {
		var file unix.Stat_t
		if err := unix.Fstatat(fd, name, &file, unix.AT_SYMLINK_NOFOLLOW); err != nil {
			return directory{}, fmt.Errorf("stat %s of cgroup %q: %w", name, path, err)
		}
		d.guarded = d.guarded && c.ours(&file)
	}
	d.delegated = c.delegated(fd, st.Uid)
	return d, nil
}

// ours reports whether only root, or who counts as root, may write to the file.
// The owner of a file may always change its mode, so its bits do not count.
func (c *Cgroups) ours(st *unix.Stat_t) bool {
	return slices.Contains(c.trusted, st.Uid) && st.Mode&0o022 == 0
}

// delegated tells whose systemd made the directory by Delegate=: it marks
// them. The mark user.delegate is there since systemd 251, trusted.delegate,
// which root alone can read, since 236.
func (c *Cgroups) delegated(fd int, owner uint32) delegation {
	for _, mark := range []string{"user.delegate", "trusted.delegate"} {
		var value [8]byte
		n, err := unix.Fgetxattr(fd, mark, value[:])
		if err != nil || strings.TrimRight(string(value[:n]), "\x00") != "1" {
			continue
		}
		if owner != 0 && slices.Contains(c.trusted, owner) {
			return delegatedToUs
		}
		return delegatedToSome
	}
	return notDelegated
}

// openCgroupRoot opens the mount point, "" for none, and makes sure of what is there.
func openCgroupRoot(at string, magic int64) (*os.File, error) {
	if at == "" {
		return nil, nil
	}
	f, err := os.OpenFile(at, unix.O_PATH|unix.O_DIRECTORY, 0)
	if err != nil {
		return nil, fmt.Errorf("open cgroups: %w", err)
	}
	var fs unix.Statfs_t
	if err := unix.Fstatfs(int(f.Fd()), &fs); err != nil {
		return nil, errors.Join(fmt.Errorf("stat cgroups at %s: %w", at, err), f.Close())
	}
	if int64(fs.Type) != magic {
		return nil, errors.Join(fmt.Errorf("open cgroups: something else is mounted over %s", at), f.Close())
	}
	return f, nil
}

// cgroupMounts finds the mount points of the v2 hierarchy and of v1's
// name=systemd in a mountinfo file, proc_pid_mountinfo(5). Only mounts of a
// hierarchy's root count, which is the root of our cgroup namespace; "" where
// there is none.
func cgroupMounts(mountinfo []byte) (unified, systemd string) {
	for line := range strings.Lines(string(mountinfo)) {
		mount, super, ok := strings.Cut(line, " - ")
		m, s := strings.Fields(mount), strings.Fields(super)
		if !ok || len(m) < 6 || len(s) < 3 || m[3] != "/" {
			continue
		}
		at := unescapeMount(m[4])
		switch {
		case s[0] == "cgroup2" && unified == "":
			unified = at
		case s[0] == "cgroup" && systemd == "" && slices.Contains(strings.Split(s[2], ","), "name=systemd"):
			systemd = at
		}
	}
	return unified, systemd
}

// unescapeMount undoes the kernel's octal escapes of blanks and backslashes.
func unescapeMount(s string) string {
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+3 < len(s) {
			if n, err := strconv.ParseUint(s[i+1:i+4], 8, 8); err == nil {
				b.WriteByte(byte(n))
				i += 3
				continue
			}
		}
		b.WriteByte(s[i])
	}
	return b.String()
}
