package container

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/deputy-id/deputy/attestor/peer"
)

// paths confirms what the processes of one container run. In a mount namespace
// of its own a process can put anything at any path, so a path counts only if
// it names the very file in the root of the container's init. Once confirmed it
// is kept for as long as the process runs that program: an upgrade by rename
// must not cost a running one its identity.
type paths struct {
	init *peer.Process
	walk chan struct{} // one at a time: a volume's file system may never answer

	mu    sync.Mutex
	known map[*peer.Program]*confirmed
	sweep int // number at which those of ended processes are dropped
}

type confirmed struct {
	process *peer.Process
	path    string
}

const minSweep = 256

func newPaths(init *peer.Process) *paths {
	return &paths{init: init, walk: make(chan struct{}, 1), known: make(map[*peer.Program]*confirmed), sweep: minSweep}
}

// of returns the path of what the process runs, or none. The path is walked in
// a goroutine that ends when the kernel lets it.
func (s *paths) of(ctx context.Context, p *peer.Process) (string, error) {
	g, err := p.Program()
	if err != nil {
		return "", fmt.Errorf("confirm path in container: %w", err)
	}
	s.mu.Lock()
	k := s.known[g]
	s.mu.Unlock()
	if k != nil {
		return k.path, nil
	}
	select {
	case s.walk <- struct{}{}:
	case <-ctx.Done():
		return "", fmt.Errorf("confirm path in container: %w", context.Cause(ctx))
	}
	type result struct {
		path string
		err  error
	}
	done := make(chan result, 1)
	p, init := p.Hold(), s.init.Hold()
	go func() {
		defer init.Close()
		defer p.Close()
		defer func() { <-s.walk }()
		path, err := confirm(init, p, g)
		if err == nil && path != "" {
			s.keep(g, &confirmed{process: p, path: path})
		}
		done <- result{path, err}
	}()
	select {
	case r := <-done:
		if r.err != nil {
			return "", fmt.Errorf("confirm path in container: %w", r.err)
		}
		return r.path, nil
	case <-ctx.Done():
		return "", fmt.Errorf("confirm path in container: %w", context.Cause(ctx))
	}
}

func (s *paths) keep(g *peer.Program, k *confirmed) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.known) >= s.sweep {
		for g, k := range s.known {
			if k.process.Alive() != nil || g.Current() != nil {
				delete(s.known, g)
			}
		}
		s.sweep = max(minSweep, 2*len(s.known))
	}
	s.known[g] = k
}

// confirm returns the path that the kernel gives for the program, if in the
// root of the init it is that file.
func confirm(init, p *peer.Process, g *peer.Program) (string, error) {
	link, err := p.Readlink("exe")
	if err != nil {
		return "", err
	}
	if !strings.HasPrefix(link, "/") {
		return "", nil
	}
	same, err := names(init, link, g.Executable())
	if err != nil || !same {
		return "", err
	}
	// The link could have been another program's.
	return link, g.Current()
}

// names reports whether the path, in the root of the init and without
// following any link, names that file.
func names(init *peer.Process, path string, file peer.FileID) (bool, error) {
	root, err := init.Open("root")
	if err != nil {
		return false, err
	}
	defer root.Close()
	const tries = 8 // EAGAIN: a directory on the way was renamed, which somebody may keep doing
	var fd int
	for range tries {
		fd, err = unix.Openat2(int(root.Fd()), strings.TrimLeft(path, "/"), &unix.OpenHow{
			Flags:   unix.O_PATH | unix.O_NOFOLLOW | unix.O_CLOEXEC,
			Resolve: unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_MAGICLINKS | unix.RESOLVE_NO_SYMLINKS,
		})
		if !errors.Is(err, unix.EAGAIN) && !errors.Is(err, unix.EINTR) {
			break
		}
	}
	switch {
	case errors.Is(err, unix.ENOENT), errors.Is(err, unix.ENOTDIR), errors.Is(err, unix.ELOOP), errors.Is(err, unix.ENAMETOOLONG),
		errors.Is(err, unix.EACCES), errors.Is(err, unix.EPERM):
		return false, nil // there is no such path there, or none that we may walk
	case err != nil:
		return false, fmt.Errorf("open executable in root of the container: %w", err)
	}
	defer unix.Close(fd)
	var st unix.Statx_t
	if err := unix.Statx(fd, "", unix.AT_EMPTY_PATH|unix.AT_STATX_DONT_SYNC, unix.STATX_INO, &st); err != nil {
		return false, fmt.Errorf("stat executable in root of the container: %w", err)
	}
	return peer.FileID{Dev: unix.Mkdev(st.Dev_major, st.Dev_minor), Ino: st.Ino} == file, nil
}
