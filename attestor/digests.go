package attestor

import (
	"container/list"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/deputy-id/deputy/attestor/peer"
)

// A fileVersion names the content of a file for as long as whoever may write
// it cannot do so without a trace in it.
type fileVersion struct {
	dev, ino     uint64
	size         int64
	mtime, ctime unix.Timespec
}

func versionOf(st *unix.Stat_t) fileVersion {
	return fileVersion{dev: st.Dev, ino: st.Ino, size: st.Size, mtime: st.Mtim, ctime: st.Ctim}
}

// maxDigests bounds the digests that are shared between processes: more than
// there are programs on a host that ask for an identity.
const maxDigests = 4096

// digests keeps the digests of files that nobody but root can change, the
// least recently used forgotten first.
type digests struct {
	mu   sync.Mutex
	at   map[fileVersion]*list.Element
	used list.List // of digestOf, the most recently used first
}

type digestOf struct {
	file fileVersion
	sum  [sha256.Size]byte
}

func (d *digests) load(v fileVersion) (sum [sha256.Size]byte, ok bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	e := d.at[v]
	if e == nil {
		return sum, false
	}
	d.used.MoveToFront(e)
	return e.Value.(digestOf).sum, true
}

func (d *digests) store(v fileVersion, sum [sha256.Size]byte) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if e := d.at[v]; e != nil {
		e.Value = digestOf{v, sum}
		d.used.MoveToFront(e)
		return
	}
	if d.at == nil {
		d.at = make(map[fileVersion]*list.Element)
	}
	d.at[v] = d.used.PushFront(digestOf{v, sum})
	if d.used.Len() > maxDigests {
		last := d.used.Back()
		d.used.Remove(last)
		delete(d.at, last.Value.(digestOf).file)
	}
}

// maxDigestTime ends the reading of a file that does not come to an end: of a
// server that answers slowly or never.
const maxDigestTime = 2 * time.Minute

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
