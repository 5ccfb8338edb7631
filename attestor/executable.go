package attestor

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/deputy-id/deputy/attestor/peer"
)

// DefaultMaxExecutable is the size, in bytes, above which an executable is not digested.
const DefaultMaxExecutable = 512 << 20

// Executables says which file a process runs: its path, if that is the file's
// name on the host, and its digest. What it found is kept for as long as the
// process runs that program, because an upgrade that renames another file over
// the path must not cost a running daemon its identity. It is safe for
// concurrent use, and shared between the attestors that need it.
type Executables struct {
	host    *Host
	maxSize int64

	lookups turnstile[string] // by client: paths being opened
	hashes  turnstile[string] // by client: files being read
	shared  digests

	mu     sync.Mutex
	images map[uint64]*image // by process ID
	sweep  int               // number of images at which those of ended processes are dropped
}

// NewExecutables returns executables on that host. Files of more than
// maxSize bytes have no digest; 0 stands for DefaultMaxExecutable, and with a
// negative number none has.
func NewExecutables(host *Host, maxSize int64) *Executables {
	if maxSize == 0 {
		maxSize = DefaultMaxExecutable
	}
	return &Executables{host: host, maxSize: maxSize, images: make(map[uint64]*image), sweep: minSweep}
}

// An executable is what one look at a process gave. An empty field beside a
// nil error is no evidence: nothing to be had by asking again.
type executable struct {
	path    string
	pathErr error
	sum     string // SHA-256, 64 hexadecimal digits
	sumErr  error
}

// look says what the process runs; its digest only if wanted. The error is that
// of both: the process is gone, or could not be looked at.
func (e *Executables) look(ctx context.Context, p *peer.Process, digest bool) (executable, error) {
	const tries = 3 // it may execute another program while we look
	var err error
	for range tries {
		var x executable
		if x, err = e.lookOnce(ctx, p, digest); !errors.Is(err, peer.ErrProgramChanged) {
			return x, err
		}
	}
	return executable{}, err
}

func (e *Executables) lookOnce(ctx context.Context, p *peer.Process, digest bool) (executable, error) {
	// Whoever owns a user namespace arranges the files and even the exe link of
	// what is in it. A process cannot come back from there, so it is the look
	// afterwards that counts; the one before saves the work.
	if foreign, err := p.ForeignUserNamespace(); foreign || err != nil {
		return executable{}, err
	}
	g, err := p.Program()
	if err != nil {
		return executable{}, err
	}
	im := e.image(p, g)
	var x executable
	x.path, x.pathErr = e.path(ctx, im)
	if digest {
		x.sum, x.sumErr = e.digest(ctx, im)
	}
	if err := g.Current(); err != nil {
		return executable{}, err
	}
	if foreign, err := p.ForeignUserNamespace(); foreign || err != nil {
		return executable{}, err
	}
	return x, nil
}

// An image is what was found out about one program of one process.
type image struct {
	process *peer.Process
	program *peer.Program

	mu     sync.Mutex
	path   string // confirmed; empty before
	link   string // what the kernel called it when the path was confirmed
	digest *digesting
}

// minSweep is the number of images below which none is looked for to drop.
const minSweep = 1024

// image returns what is known of the program g that the process runs.
func (e *Executables) image(p *peer.Process, g *peer.Program) *image {
	e.mu.Lock()
	old := e.images[p.ID()]
	e.mu.Unlock()
	if old != nil && old.process == p && old.program == g {
		return old
	}
	fresh := &image{process: p, program: g}
	if old != nil && old.process != p && old.process.StartTime() == p.StartTime() {
		// The process was let go of between two connections, and with it the
		// means to tell that it ran one program all the time. The file stands in
		// for that, under the name it had: a running program's inode is not given
		// to another file, and what the process might have executed meanwhile to
		// come back to it is that same file.
		if fresh.program.Executable() == old.program.Executable() {
			old.mu.Lock()
			fresh.path, fresh.link = old.path, old.link
			old.mu.Unlock()
			if link, err := p.Readlink("exe"); err != nil || (link != fresh.link && link != fresh.link+deleted) {
				fresh.path, fresh.link = "", ""
			}
		}
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	if now := e.images[p.ID()]; now != nil && now != old && now.process == p && now.program == g {
		return now // another caller was faster
	}
	e.images[p.ID()] = fresh
	if len(e.images) > e.sweep {
		e.dropEnded()
	}
	return fresh
}

// dropEnded drops what is known of processes that have ended. One that is only
// let go of is not to lose its path by that; whether it still is there is asked
// by its number, which at worst keeps an image too long. The caller has mu.
func (e *Executables) dropEnded() {
	for id, im := range e.images {
		select {
		case <-im.process.Done():
			if errors.Is(unix.Kill(int(im.process.PID()), 0), unix.ESRCH) {
				delete(e.images, id)
			}
		default:
		}
	}
	e.sweep = max(minSweep, 2*len(e.images))
}

// deleted is what the kernel appends to the name of a file that has none any more.
const deleted = " (deleted)"

// path returns the program's path on the host, or none. A path may lead into a
// file system whose server does not answer, so it is walked in a goroutine that
// ends when the kernel lets it, one for each client at a time.
func (e *Executables) path(ctx context.Context, im *image) (string, error) {
	im.mu.Lock()
	path := im.path
	im.mu.Unlock()
	if path != "" {
		return path, nil
	}
	leave, err := e.lookups.enter(ctx, client(im.process))
	if err != nil {
		return "", fmt.Errorf("wait to confirm path of executable: %w", err)
	}
	type result struct {
		path string
		err  error
	}
	done := make(chan result, 1)
	p := im.process.Hold()
	go func() {
		defer p.Close()
		defer leave()
		path, err := e.confirm(im)
		done <- result{path, err}
	}()
	select {
	case r := <-done:
		return r.path, r.err
	case <-ctx.Done():
		return "", fmt.Errorf("confirm path of executable: %w", context.Cause(ctx))
	}
}

// client names whose share a process's files are read on: that of its container,
// unit or user slice, else of its user.
func client(p *peer.Process) string {
	if place, err := PlaceOf(p); err == nil {
		return place.Owner
	}
	info, err := p.Info()
	if err != nil {
		return "" // it has ended; it shares with others that have
	}
	return "uid:" + decimal(info.UID)
}

func (e *Executables) confirm(im *image) (string, error) {
	link, err := im.process.Readlink("exe")
	if err != nil {
		return "", err
	}
	// A name that is no absolute path, or no selector, is nothing to go by. A
	// name that ends in " (deleted)" is tried as it stands: a file may be called so.
	if !strings.HasPrefix(link, "/") || !selectable("unix:path:"+link) {
		return "", nil
	}
	same, err := e.host.names(link, im.program.Executable())
	if err != nil || !same {
		return "", err
	}
	// The link could have been another program's.
	if err := im.program.Current(); err != nil {
		return "", err
	}
	im.mu.Lock()
	defer im.mu.Unlock()
	im.path, im.link = link, link
	return link, nil
}
