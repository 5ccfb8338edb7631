package attestor

import (
	"container/list"
	"crypto/sha256"
	"sync"

	"golang.org/x/sys/unix"
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
