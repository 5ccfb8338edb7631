package peer

import (
	"container/list"
	"errors"
	"fmt"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// What a Table keeps of processes that nobody holds. An agent that opens a
// connection per call comes back within the minute; the number bounds the
// descriptors (three each) that processes which do not come back may cost, and
// is lower where that would be more than a fifth of those that we may have.
const (
	idleTime  = 60 * time.Second
	idleMost  = 1024
	idleShare = 16 // of as many descriptors one process
)

// A Table holds every pinned process once, however many connections it has.
// A process that nobody holds any more is kept for a while, because its next
// connection is likely to be near; how many of those there are is bounded.
type Table struct {
	kernel   features
	userNS   FileID // the daemon's own
	watch    *exitWatch
	idleTime time.Duration
	idleMost int

	mu      sync.Mutex
	byID    map[uint64]*Process
	numbers map[incarnation]uint64 // IDs of the Table's own, where pidfds have none
	last    uint64                 // of those IDs
	idle    list.List              // of *Process that nobody holds, the longest idle first
	sweep   *time.Timer            // nil while none is idle
	closed  bool
}

// incarnation names a process where its pidfd does not: a PID is not given
// again within the clock tick in which its last owner started.
type incarnation struct {
	pid   int32
	start uint64
}

// NewTable returns an empty table. Legacy names the kernel features that are
// missing and what stands in for them, for the log; none are missing from 6.13 on.
func NewTable() (t *Table, legacy []string, err error) {
	kernel, legacy, err := probe()
	if err != nil {
		return nil, nil, err
	}
	t, err = newTable(kernel)
	return t, legacy, err
}

func newTable(kernel features) (*Table, error) {
	t := &Table{
		kernel:   kernel,
		idleTime: idleTime,
		idleMost: mostIdle(),
		byID:     make(map[uint64]*Process),
		numbers:  make(map[incarnation]uint64),
	}
	var st unix.Stat_t
	if err := unix.Stat("/proc/self/ns/user", &st); err != nil {
		return nil, fmt.Errorf("stat own user namespace: %w", err)
	}
	t.userNS = FileID{Dev: st.Dev, Ino: st.Ino}
	watch, err := newExitWatch(t.exited)
	if err != nil {
		return nil, err
	}
	t.watch = watch
	return t, nil
}

// mostIdle is idleMost, or what the limit of descriptors allows.
func mostIdle() int {
	var l unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &l); err != nil {
		return 1
	}
	return int(min(l.Cur/idleShare, idleMost))
}

// Open pins the process that has this PID now. The caller closes it.
func (t *Table) Open(pid int32) (*Process, error) {
	if pid <= 0 {
		return nil, fmt.Errorf("open process %d: %w", pid, ErrNoPID)
	}
	pidfd, err := unix.PidfdOpen(int(pid), 0)
	switch {
	case errors.Is(err, unix.ESRCH):
		return nil, fmt.Errorf("open process %d: %w", pid, ErrGone)
	case err != nil:
		return nil, fmt.Errorf("open process %d: pidfd_open: %w", pid, err)
	}
	return t.intern(pidfd, pid)
}

// intern returns the Process of a pidfd, which it takes over, with one hold
// more. pid is the process's number in our PID namespace.
func (t *Table) intern(pidfd int, pid int32) (*Process, error) {
	var id uint64
	if t.kernel.pidfdInode {
		var st unix.Stat_t
		if err := unix.Fstat(pidfd, &st); err != nil {
			unix.Close(pidfd)
			return nil, fmt.Errorf("stat pidfd of %d: %w", pid, err)
		}
		id = st.Ino
		if p := t.lookup(id); p != nil {
			unix.Close(pidfd)
			if err := p.Alive(); err != nil {
				p.Close()
				return nil, err
			}
			return p, nil
		}
	}
	fresh, err := newProcess(t, pidfd, pid)
	if err != nil {
		return nil, err
	}
	fresh.id = id
	p, err := t.insert(fresh)
	if p != fresh {
		fresh.release()
	}
	return p, err
}

// lookup returns the process of this ID with one hold more, or nil.
func (t *Table) lookup(id uint64) *Process {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.holdLocked(t.byID[id])
}

func (t *Table) holdLocked(p *Process) *Process {
	if p == nil {
		return nil
	}
	p.holds++
	if p.idle != nil {
		t.idle.Remove(p.idle)
		p.idle = nil
	}
	return p
}

// insert adds a process with one hold, or returns the one that another
// goroutine added meanwhile.
func (t *Table) insert(p *Process) (*Process, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.closed {
		return nil, errors.New("table is closed")
	}
	if p.id == 0 {
		key := incarnation{p.pid, p.start}
		if p.id = t.numbers[key]; p.id == 0 {
			t.last++
			p.id = t.last
			t.numbers[key] = p.id
		}
	}
	if old := t.holdLocked(t.byID[p.id]); old != nil {
		return old, nil
	}
	if err := t.watch.add(p.pidfd, p.id); err != nil {
		t.forgetLocked(p)
		return nil, fmt.Errorf("watch process %d: %w", p.pid, err)
	}
	t.byID[p.id] = p
	p.holds = 1
	return p, nil
}

// hold adds a holder to a process that has one.
func (t *Table) hold(p *Process) {
	t.mu.Lock()
	defer t.mu.Unlock()
	p.holds++
}

// drop takes a holder away. A process without one is kept for a while, unless
// it has exited.
func (t *Table) drop(p *Process) error {
	t.mu.Lock()
	if p.holds == 0 {
		t.mu.Unlock()
		return errors.New("process is closed")
	}
	var out []*Process
	if p.holds--; p.holds == 0 {
		if p.exited || t.closed {
			out = append(out, t.removeLocked(p))
		} else {
			p.idleSince = time.Now()
			p.idle = t.idle.PushBack(p)
			if t.idle.Len() > t.idleMost {
				out = append(out, t.removeLocked(t.idle.Front().Value.(*Process)))
			}
			if t.sweep == nil {
				t.sweep = time.AfterFunc(t.idleTime, t.expire)
			}
		}
	}
	t.mu.Unlock()
	for _, p := range out {
		p.release()
	}
	return nil
}

// expire lets go of processes that have been idle for long enough.
func (t *Table) expire() {
	var out []*Process
	t.mu.Lock()
	t.sweep = nil
	for e := t.idle.Front(); e != nil && !t.closed; e = t.idle.Front() {
		p := e.Value.(*Process)
		if left := t.idleTime - time.Since(p.idleSince); left > 0 {
			t.sweep = time.AfterFunc(left, t.expire)
			break
		}
		out = append(out, t.removeLocked(p))
	}
	t.mu.Unlock()
	for _, p := range out {
		p.release()
	}
}

// exited is told by the watch, once for each process.
func (t *Table) exited(id uint64) {
	t.mu.Lock()
	p := t.byID[id]
	if p == nil {
		t.mu.Unlock()
		return
	}
	p.exited = true
	unheld := p.holds == 0
	if unheld {
		t.removeLocked(p)
	}
	t.mu.Unlock()
	p.finish()
	if unheld {
		p.release()
	}
}

// removeLocked takes a process out of the table; the caller releases it
// without the lock.
func (t *Table) removeLocked(p *Process) *Process {
	if p.idle != nil {
		t.idle.Remove(p.idle)
		p.idle = nil
	}
	delete(t.byID, p.id)
	t.forgetLocked(p)
	return p
}

// forgetLocked drops the number that the Table gave to a process of its own.
func (t *Table) forgetLocked(p *Process) {
	if !t.kernel.pidfdInode {
		delete(t.numbers, incarnation{p.pid, p.start})
	}
}

// Close lets go of every process that nobody holds, and ends the table's
// goroutine. No Open may follow.
func (t *Table) Close() error {
	var out []*Process
	t.mu.Lock()
	if t.closed {
		t.mu.Unlock()
		return nil
	}
	t.closed = true
	for e := t.idle.Front(); e != nil; e = t.idle.Front() {
		out = append(out, t.removeLocked(e.Value.(*Process)))
	}
	if t.sweep != nil {
		t.sweep.Stop()
		t.sweep = nil
	}
	t.mu.Unlock()
	for _, p := range out {
		p.release()
	}
	return t.watch.close()
}
