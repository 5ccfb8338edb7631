package attestor

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/deputy-id/deputy/attestor/peer"
)

// DefaultMaxExecutable is the size, in bytes, above which an executable is not digested.
const DefaultMaxExecutable = 512 << 20

// maxDigestTime ends the reading of a file that does not come to an end: of a
// server that answers slowly or never.
const maxDigestTime = 2 * time.Minute

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

// A digesting is the one reading of a program's file. It goes on when those who
// asked have given up, so that a large file is read once and not once for each
// impatient call.
type digesting struct {
	done chan struct{} // closed when sum and err are set
	sum  string
	err  error
}

// digest returns the SHA-256 of the program's file, or none if it is too large.
func (e *Executables) digest(ctx context.Context, im *image) (string, error) {
	im.mu.Lock()
	d := im.digest
	if d == nil {
		d = &digesting{done: make(chan struct{})}
		im.digest = d
		im.process.Hold()
		go e.runDigest(im, d)
	}
	im.mu.Unlock()
	select {
	case <-d.done:
		return d.sum, d.err
	case <-ctx.Done():
		return "", fmt.Errorf("digest executable: %w", context.Cause(ctx))
	}
}

func (e *Executables) runDigest(im *image, d *digesting) {
	defer im.process.Close()
	ctx, cancel := context.WithTimeout(context.Background(), maxDigestTime)
	defer cancel()
	stop := make(chan struct{})
	defer close(stop)
	go func() { // what has exited needs no digest
		select {
		case <-im.process.Done():
			cancel()
		case <-stop:
		}
	}()
	d.sum, d.err = e.sum(ctx, im)
	if d.err != nil { // the next caller tries again
		im.mu.Lock()
		im.digest = nil
		im.mu.Unlock()
	}
	close(d.done)
}

func (e *Executables) sum(ctx context.Context, im *image) (string, error) {
	// To open a file can take as long as to read it, where a server stands behind it.
	by := client(im.process)
	leave, err := e.lookups.enter(ctx, by)
	if err != nil {
		return "", err
	}
	f, err := im.process.Open("exe")
	if err != nil {
		leave()
		return "", err
	}
	defer f.Close()
	v, err := e.examine(f, im.program)
	leave()
	if err != nil || v.silent {
		return "", err
	}
	if sum, ok := e.known(v); ok {
		return hex.EncodeToString(sum[:]), nil
	}

	leave, err = e.hashes.enter(ctx, by)
	if err != nil {
		return "", err
	}
	defer leave()
	const tries = 3 // it may be written while we read
	for range tries {
		sum, ok := e.known(v) // by who was before us
		if !ok {
			sum, err = hash(ctx, f, v.size)
		}
		if err != nil {
			return "", err
		}
		before := v
		if v, err = e.examine(f, im.program); err != nil || v.silent {
			return "", err
		}
		if v.fileVersion != before.fileVersion {
			continue
		}
		if before.shared {
			e.shared.store(v.fileVersion, sum)
		}
		return hex.EncodeToString(sum[:]), nil
	}
	return "", errors.New("digest executable: it is being written")
}

// A verdict is what is to be done about the digest of a file.
type verdict struct {
	fileVersion
	silent bool // there is none to be had
	shared bool // it holds for every process that runs this version
}

func (e *Executables) known(v verdict) (sum [sha256.Size]byte, ok bool) {
	if !v.shared {
		return sum, false
	}
	return e.shared.load(v.fileVersion)
}

// examine looks at the file that the program is to be.
func (e *Executables) examine(f *os.File, g *peer.Program) (verdict, error) {
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return verdict{}, fmt.Errorf("stat executable: %w", err)
	}
	if (peer.FileID{Dev: st.Dev, Ino: st.Ino}) != g.Executable() {
		return verdict{}, peer.ErrProgramChanged
	}
	var fs unix.Statfs_t
	if err := unix.Fstatfs(int(f.Fd()), &fs); err != nil {
		return verdict{}, fmt.Errorf("stat file system of executable: %w", err)
	}
	return verdict{
		fileVersion: versionOf(&st),
		// A user who serves a file system can give us another content than the
		// process got.
		silent: st.Size > e.maxSize || uint32(fs.Type) == unix.FUSE_SUPER_MAGIC,
		shared: shareable(&st, &fs, time.Now()),
	}, nil
}

// hash reads the file from its beginning to its end, which is expected at size.
func hash(ctx context.Context, f *os.File, size int64) (sum [sha256.Size]byte, err error) {
	h := sha256.New()
	buf := make([]byte, 256<<10)
	var at int64
	for at <= size {
		if err := ctx.Err(); err != nil {
			return sum, fmt.Errorf("digest executable: %w", err)
		}
		n, err := f.ReadAt(buf, at)
		h.Write(buf[:n])
		at += int64(n)
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return sum, fmt.Errorf("digest executable: %w", err)
		}
	}
	h.Sum(sum[:0])
	return sum, nil
}

// settled is how long ago a file must have changed for its times to be trusted:
// two changes within one tick of the clock leave the same time.
const settled = 2 * time.Second

// shareable reports whether the digest of a file holds for every process that
// runs this version of it: only root may write it, on a file system that notes
// each change, which did not happen just now. Not so on tmpfs, where a store
// through a mapping leaves no trace; on network file systems, whose server says
// what it likes; on overlayfs, below which either may be; and where set-user-ID
// is off, as on the disk that a user brought along.
func shareable(st *unix.Stat_t, fs *unix.Statfs_t, now time.Time) bool {
	// The group bits are the mask of an access list, so that they cover it too.
	if st.Mode&unix.S_IFMT != unix.S_IFREG || st.Uid != 0 || st.Mode&0o022 != 0 {
		return false
	}
	if now.Sub(time.Unix(st.Ctim.Unix())) < settled { // or in the future
		return false
	}
	if fs.Flags&unix.ST_NOSUID != 0 {
		return false
	}
	switch uint32(fs.Type) {
	case unix.EXT4_SUPER_MAGIC, unix.XFS_SUPER_MAGIC, unix.BTRFS_SUPER_MAGIC, unix.F2FS_SUPER_MAGIC,
		unix.EROFS_SUPER_MAGIC_V1, unix.SQUASHFS_MAGIC, zfsMagic:
		return true
	}
	return false
}

const zfsMagic = 0x2fc12fc1 // OpenZFS's; not in the kernel's headers

// selectable reports whether an entry could be written that asks for it.
func selectable(selector string) bool {
	_, err := ParseSelector(selector)
	return err == nil
}
