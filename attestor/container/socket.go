package container

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// A socket is the address of a runtime that only its owner can have put there.
type socket struct {
	path  string // absolute
	owner uint32 // UID that must own the socket and the way to it, beside root
}

// maxLinks bounds how many symbolic links the way to a socket may take.
const maxLinks = 16

// dial connects to the socket if nobody but its owner could have replaced it.
// It looks each time: what answered before a restart of the runtime says
// nothing about what answers after it.
func (s socket) dial(ctx context.Context) (net.Conn, error) {
	f, err := s.open()
	if err != nil {
		return nil, fmt.Errorf("check socket %s: %w", s.path, err)
	}
	defer f.Close()
	// By the descriptor, so that what was checked is what is connected to.
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", fmt.Sprintf("/proc/self/fd/%d", f.Fd()))
	if err != nil {
		var op *net.OpError // its text names a descriptor, which tells nobody anything
		if errors.As(err, &op) {
			err = op.Err
		}
		return nil, fmt.Errorf("connect to %s: %w", s.path, err)
	}
	return conn, nil
}

// open walks to the socket from the root and checks each step of the way. It
// returns an O_PATH handle of the socket.
func (s socket) open() (*os.File, error) {
	const flags = unix.O_PATH | unix.O_NOFOLLOW | unix.O_CLOEXEC
	openRoot := func() (*os.File, error) {
		fd, err := unix.Open("/", flags|unix.O_DIRECTORY, 0)
		if err != nil {
			return nil, fmt.Errorf("open /: %w", err)
		}
		return os.NewFile(uintptr(fd), "/"), nil
	}
	dir, err := openRoot()
	if err != nil {
		return nil, err
	}
	// The directories from the root to dir, so that ".." goes where we came from.
	way := []*os.File{dir}
	defer func() {
		for _, f := range way {
			f.Close()
		}
	}()
	rest := strings.Split(s.path, "/")
	for links := 0; len(rest) > 0; {
		name := rest[0]
		rest = rest[1:]
		switch name {
		case "", ".":
			continue
		case "..":
			if len(way) > 1 {
				way[len(way)-1].Close()
				way = way[:len(way)-1]
			}
			continue
		}
		fd, err := unix.Openat(int(way[len(way)-1].Fd()), name, flags, 0)
		if err != nil {
			return nil, fmt.Errorf("open %s: %w", name, err)
		}
		f := os.NewFile(uintptr(fd), name)
		kind, err := s.check(f)
		if err != nil {
			f.Close()
			return nil, fmt.Errorf("%s: %w", name, err)
		}
		switch kind {
		case unix.S_IFDIR:
			way = append(way, f)
		case unix.S_IFLNK:
			target, err := readlink(f)
			f.Close()
			if err != nil {
				return nil, fmt.Errorf("read link %s: %w", name, err)
			}
			if links++; links > maxLinks {
				return nil, fmt.Errorf("%s: %w", name, unix.ELOOP)
			}
			if strings.HasPrefix(target, "/") {
				for _, d := range way[1:] {
					d.Close()
				}
				way = way[:1]
			}
			rest = append(strings.Split(target, "/"), rest...)
		case unix.S_IFSOCK:
			if len(rest) > 0 {
				f.Close()
				return nil, fmt.Errorf("%s: %w", name, unix.ENOTDIR)
			}
			return f, nil
		}
	}
	return nil, errors.New("not a socket")
}

// check says what kind of file it is, and refuses what somebody but its owner
// could have put there.
func (s socket) check(f *os.File) (kind uint32, err error) {
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return 0, fmt.Errorf("stat: %w", err)
	}
	if st.Uid != 0 && st.Uid != s.owner {
		return 0, fmt.Errorf("owned by UID %d, which is not trusted with it", st.Uid)
	}
	kind = st.Mode & unix.S_IFMT
	switch kind {
	case unix.S_IFDIR:
		// In a sticky directory others may add names, but not take away ours.
		if st.Mode&0o022 != 0 && st.Mode&unix.S_ISVTX == 0 {
			return 0, fmt.Errorf("directory is writable by others (mode %#o)", st.Mode&0o7777)
		}
	case unix.S_IFLNK: // its mode means nothing
	case unix.S_IFSOCK:
		// Docker's group may write: its members are root's equals.
		if st.Mode&0o002 != 0 {
			return 0, fmt.Errorf("socket is writable by everybody (mode %#o)", st.Mode&0o7777)
		}
	default:
		return 0, errors.New("neither directory nor socket")
	}
	return kind, nil
}

func readlink(f *os.File) (string, error) {
	buf := make([]byte, unix.PathMax)
	n, err := unix.Readlinkat(int(f.Fd()), "", buf)
	if err != nil {
		return "", err
	}
	return string(buf[:n]), nil
}
