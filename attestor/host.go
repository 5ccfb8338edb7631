package attestor

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"runtime"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/deputy-id/deputy/attestor/peer"
)

// A Host is the machine as its own processes see it: the root directory and
// the namespaces of PID 1. They are our own unless the daemon runs in a
// container or a mount namespace of its own. Where we may not look at PID 1,
// which takes the rights of root, our own stand in.
type Host struct {
	namespaces map[string]peer.FileID
	root       *os.File // O_PATH; closed when nobody uses the Host any more
}

// hostNamespaces are those that decide what a process is on the host: who it
// is (user), what its number means (pid), which file a path names (mnt) and
// where it stands (cgroup). A network or a hostname of its own does not take
// a process off the host.
var hostNamespaces = []string{"user", "pid", "mnt", "cgroup"}

// OpenHost opens the host's root.
func OpenHost() (*Host, error) {
	h, err := openHost("/proc/1")
	if errors.Is(err, fs.ErrPermission) {
		h, err = openHost("/proc/self")
	}
	return h, err
}

func openHost(process string) (*Host, error) {
	h := &Host{namespaces: make(map[string]peer.FileID)}
	for _, kind := range hostNamespaces {
		var st unix.Stat_t
		if err := unix.Stat(process+"/ns/"+kind, &st); err != nil {
			return nil, fmt.Errorf("stat %s namespace of the host: %w", kind, err)
		}
		h.namespaces[kind] = peer.FileID{Dev: st.Dev, Ino: st.Ino}
	}
	root, err := unix.Open(process+"/root", unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open root of the host: %w", err)
	}
	h.root = os.NewFile(uintptr(root), process+"/root")
	// Where a filter refuses the call, no path would be there and nothing would
	// say why: better not to start.
	fd, err := h.open(".", unix.O_PATH|unix.O_DIRECTORY, 0)
	if err != nil {
		return nil, fmt.Errorf("call openat2 (needs Linux 5.6, and a unit without RestrictSUIDSGID): %w", err)
	}
	return h, unix.Close(fd)
}

// shares reports whether the process is in the host's namespaces.
func (h *Host) shares(p *peer.Process) (bool, error) {
	for _, kind := range hostNamespaces {
		id, err := p.Namespace(kind)
		if err != nil {
			return false, err
		}
		if id != h.namespaces[kind] {
			return false, nil
		}
	}
	return true, nil
}

// open opens an absolute path in the host's root, whatever it links to.
func (h *Host) open(path string, flags, resolve uint64) (int, error) {
	defer runtime.KeepAlive(h.root)
	// The kernel gives up (EAGAIN) when a directory on the way is renamed
	// meanwhile, which somebody could keep doing.
	const tries = 8
	var err error
	for range tries {
		var fd int
		fd, err = unix.Openat2(int(h.root.Fd()), strings.TrimLeft(path, "/"), &unix.OpenHow{
			Flags:   flags | unix.O_CLOEXEC,
			Resolve: unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_MAGICLINKS | resolve,
		})
		if err == nil {
			return fd, nil
		}
		if !errors.Is(err, unix.EAGAIN) && !errors.Is(err, unix.EINTR) {
			break
		}
	}
	return -1, err
}

// file opens a file of the host for reading.
func (h *Host) file(path string) (*os.File, error) {
	fd, err := h.open(path, unix.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("open %s of the host: %w", path, err)
	}
	return os.NewFile(uintptr(fd), path), nil
}

// names reports whether the path, read without following any link, names that
// very file. The kernel's own name of a running program goes through no links;
// one that does was made up in another mount namespace.
func (h *Host) names(path string, file peer.FileID) (bool, error) {
	fd, err := h.open(path, unix.O_PATH|unix.O_NOFOLLOW, unix.RESOLVE_NO_SYMLINKS)
	switch {
	case errors.Is(err, unix.EAGAIN), errors.Is(err, unix.EMFILE),
		errors.Is(err, unix.ENFILE), errors.Is(err, unix.ENOMEM), errors.Is(err, unix.EIO), errors.Is(err, unix.EINTR),
		errors.Is(err, unix.ESTALE), errors.Is(err, unix.ETIMEDOUT), errors.Is(err, unix.ENOTCONN):
		// Of these, the last three come from a file system that is not there for now.
		return false, fmt.Errorf("open executable in the root of the host: %w", err)
	case err != nil:
		return false, nil // there is no such path on the host, or none that we may walk
	}
	defer unix.Close(fd)
	var st unix.Statx_t
	if err := unix.Statx(fd, "", unix.AT_EMPTY_PATH|unix.AT_STATX_DONT_SYNC, unix.STATX_INO, &st); err != nil {
		return false, fmt.Errorf("stat executable in the root of the host: %w", err)
	}
	return peer.FileID{Dev: unix.Mkdev(st.Dev_major, st.Dev_minor), Ino: st.Ino} == file, nil
}
