package endpoint

import (
	"context"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/time/rate"
)

// Limits keep one client from starving the rest. Those of an owner hold for
// all processes of one container, unit or user slice, or else of one UID,
// together.
type Limits struct {
	Connections      int // of all
	OwnerConnections int
	Streams          int // of all
	OwnerStreams     int
	OwnerNames       int // bytes that the names which an owner's streams ask for take
	Messages         int // bytes of all messages that are announced and not dealt with
	OwnerMessages    int
	ConnStreams      int // open at a time on one connection; more wait at the client
	Challenges       int // unanswered ones of a UID at a time
	Attestations     int // of an owner at a time; more wait
	Mints            int // of an owner in a second
}

// connDescriptors is what a connection costs when each is of another process:
// its socket, and of the process the pidfd, the directory and the memory.
const connDescriptors = 4

// DefaultLimits are made for a process that may have so many descriptors open
// and runs on so many CPUs. A quarter of the descriptors, at least 64, is kept
// back for the database, the runtimes and the administrators, and another
// quarter for processes that are pinned without a connection.
func DefaultLimits(descriptors uint64, cpus int) Limits {
	reserve := max(descriptors/4, 64) + descriptors/4
	free := descriptors - min(reserve, descriptors)
	conns := int(min(free/connDescriptors, 65536))
	return Limits{
		Connections:      max(conns, 16),
		OwnerConnections: max(conns*3/4, 8),
		Streams:          65536,
		OwnerStreams:     32768,
		OwnerNames:       64 << 20,
		Messages:         128 << 20,
		OwnerMessages:    32 << 20,
		ConnStreams:      1024,
		Challenges:       64,
		Attestations:     32,
		Mints:            20000 * max(cpus, 1),
	}
}

// budget holds the accounts. An account that nobody uses is kept for a minute,
// so that leaving and coming back does not refill it.
type budget struct {
	limits Limits

	streams  atomic.Int64
	messages atomic.Int64 // bytes

	mu       sync.Mutex // guards what follows
	conns    int
	accounts map[string]*account
	swept    time.Time
}

// An account is what one owner uses.
type account struct {
	name    string
	mints   *rate.Limiter
	denials *rate.Limiter // lines in the log
	unsaid  atomic.Int64  // denials that were not logged

	attesting chan struct{}
	challenge chan struct{}
	streams   atomic.Int64
	names     atomic.Int64 // bytes
	messages  atomic.Int64 // bytes
	pins      atomic.Int64 // processes that are held for it
	decoding  sync.Mutex   // of long messages

	// Under budget.mu.
	conns int // attributed to this account
	users int // links and seats that refer to it
	idle  time.Time
}

func newBudget(l Limits) *budget {
	return &budget{limits: l, accounts: make(map[string]*account)}
}

func uidOwner(uid uint32) string { return fmt.Sprintf("uid:%d", uid) }

// use returns the account of an owner for a while; the caller gives it back.
// The caller holds b.mu.
func (b *budget) use(name string) *account {
	a, ok := b.accounts[name]
	if !ok {
		b.sweep()
		a = &account{
			name:      name,
			mints:     rate.NewLimiter(rate.Limit(b.limits.Mints), b.limits.Mints),
			denials:   rate.NewLimiter(1, 5),
			attesting: make(chan struct{}, b.limits.Attestations),
			challenge: make(chan struct{}, b.limits.Challenges),
		}
		b.accounts[name] = a
	}
	a.users++
	return a
}

func (b *budget) giveBack(a *account) {
	if a.users--; a.users == 0 {
		a.idle = time.Now()
	}
}

func (b *budget) sweep() {
	now := time.Now()
	if now.Sub(b.swept) < time.Minute {
		return
	}
	b.swept = now
	for name, a := range b.accounts {
		if a.users == 0 && now.Sub(a.idle) > time.Minute {
			delete(b.accounts, name)
		}
	}
}

// admit takes a connection of a UID. What else it belongs to is found out
// later; see move.
func (b *budget) admit(uid uint32) (release func(), err error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.conns >= b.limits.Connections {
		return nil, fmt.Errorf("%w: %d connections are open", errBudget, b.conns)
	}
	a := b.use(uidOwner(uid))
	if a.conns >= b.limits.OwnerConnections {
		b.giveBack(a)
		return nil, fmt.Errorf("%w: UID %d has %d connections open", errBudget, uid, a.conns)
	}
	b.conns++
	a.conns++
	return sync.OnceFunc(func() {
		b.mu.Lock()
		defer b.mu.Unlock()
		b.conns--
		a.conns--
		b.giveBack(a)
	}), nil
}

// hold lends the account of an owner until it is given back.
func (b *budget) hold(owner string) (a *account, leave func()) {
	b.mu.Lock()
	defer b.mu.Unlock()
	a = b.use(owner)
	return a, func() {
		b.mu.Lock()
		defer b.mu.Unlock()
		b.giveBack(a)
	}
}

// claim takes a connection of an owner that has no UID.
func (b *budget) claim(owner string, most int) (a *account, release func(), err error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	a = b.use(owner)
	if a.conns >= most {
		b.giveBack(a)
		return nil, nil, fmt.Errorf("%w: %d connections of %s are open", errBudget, a.conns, owner)
	}
	a.conns++
	return a, sync.OnceFunc(func() {
		b.mu.Lock()
		defer b.mu.Unlock()
		a.conns--
		b.giveBack(a)
	}), nil
}

// A seat is one connection's place in an account.
type seat struct {
	b    *budget
	uid  *account // where admit counted it
	mu   sync.Mutex
	now  atomic.Pointer[account] // where it counts
	left bool
}

func (b *budget) seat(uid uint32) *seat {
	b.mu.Lock()
	defer b.mu.Unlock()
	s := &seat{b: b, uid: b.use(uidOwner(uid))}
	s.now.Store(s.uid)
	return s
}

func (s *seat) account() *account { return s.now.Load() }

// move makes the connection count for this owner instead: a container's root
// must not use up what the host's has.
func (s *seat) move(owner string) error {
	if owner == "" || s.now.Load().name == owner {
		return nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.b.mu.Lock()
	defer s.b.mu.Unlock()
	old := s.now.Load()
	if s.left || old.name == owner {
		return nil
	}
	a := s.b.use(owner)
	if a.conns >= s.b.limits.OwnerConnections {
		s.b.giveBack(a)
		return fmt.Errorf("%w: %d connections of the same origin are open", errBudget, a.conns)
	}
	a.conns++
	old.conns--
	if old != s.uid {
		s.b.giveBack(old)
	}
	s.now.Store(a)
	return nil
}

// leave undoes move, so that the release of admit finds its count.
func (s *seat) leave() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.b.mu.Lock()
	defer s.b.mu.Unlock()
	if s.left {
		return
	}
	s.left = true
	if a := s.now.Load(); a != s.uid {
		a.conns--
		s.b.giveBack(a)
		s.uid.conns++
	}
	s.b.giveBack(s.uid)
}

// stream takes a stream; the caller calls end if there is no error.
func (b *budget) stream(a *account) error {
	switch {
	case b.streams.Add(1) > int64(b.limits.Streams):
		b.streams.Add(-1)
		return fmt.Errorf("%w: too many streams are open", errBudget)
	case a.streams.Add(1) > int64(b.limits.OwnerStreams):
		b.end(a)
		return fmt.Errorf("%w: too many streams of the same origin are open", errBudget)
	}
	return nil
}

func (b *budget) end(a *account) {
	b.streams.Add(-1)
	a.streams.Add(-1)
}

// expect takes so many bytes for a message; the caller calls forget if there
// is no error. Its owner's are looked at first: what one asks for in vain must
// not be in the way of others for a moment.
func (b *budget) expect(a *account, bytes int) error {
	if a.messages.Add(int64(bytes)) > int64(b.limits.OwnerMessages) {
		a.messages.Add(-int64(bytes))
		return fmt.Errorf("%w: messages of the same origin are too long together", errBudget)
	}
	if b.messages.Add(int64(bytes)) > int64(b.limits.Messages) {
		b.forget(a, bytes)
		return fmt.Errorf("%w: messages of all are too long together", errBudget)
	}
	return nil
}

func (b *budget) forget(a *account, bytes int) {
	b.messages.Add(-int64(bytes))
	a.messages.Add(-int64(bytes))
}

// remember takes so many bytes more for names; fewer than none are given back.
func (a *account) remember(bytes int, most int) error {
	if a.names.Add(int64(bytes)) > int64(most) && bytes > 0 {
		a.names.Add(-int64(bytes))
		return fmt.Errorf("%w: streams of the same origin ask for too many names", errBudget)
	}
	return nil
}

// enter waits for a place in a channel that counts.
func enter(ctx context.Context, places chan struct{}) error {
	select {
	case places <- struct{}{}:
		return nil
	default:
	}
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	select {
	case places <- struct{}{}:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("%w: too many of the same origin wait", errBudget)
	}
}

// patience is how long a call, or a connection, waits for its turn: longer
// than those who have it and say nothing.
const patience = challengeTime + time.Second

// mint takes n signatures. A call that has something to go on with waits.
func (a *account) mint(ctx context.Context, n int, wait bool) error {
	if a.mints.AllowN(time.Now(), n) {
		return nil
	}
	if !wait || a.mints.WaitN(ctx, min(n, a.mints.Burst())) != nil {
		return fmt.Errorf("%w: too many SVIDs a second", errBudget)
	}
	return nil
}
