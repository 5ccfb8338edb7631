package registry

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/deputy-id/deputy/internal/watch"
)

// What a caller may branch on.
var (
	ErrNotFound = errors.New("entry not found")
	ErrExists   = errors.New("similar entry already exists") // one with the same SPIFFE ID, parent and selectors
	ErrFromFile = errors.New("entry comes from the configuration file")
	ErrInvalid  = errors.New("invalid entry") // wrapped with the reason
)

// A Store keeps entries and publishes a Set of them. Entries of the file live
// in memory and are replaced as a whole; those of the API are durable before a
// call returns; transient ones live in memory until they are removed. It is
// safe for concurrent use; the database is for one Store at a time.
type Store struct {
	td  spiffeid.TrustDomain
	log hclog.Logger

	sets   *watch.Value[*Set]
	expiry chan struct{} // an entry that will expire came in

	writer sync.Mutex            // held from reading the set that a change is made to until the next is published; guards what follows
	db     *database             // nil: everything in memory
	ends   map[version]time.Time // of entries that expire, by the monotonic clock
	lapsed map[version]struct{}  // those that have expired by the wall clock alone
}

// A version is an entry until it is changed.
type version struct {
	id       string
	revision int64
}

// Open opens or creates the database at path; an empty path keeps everything
// in memory. A database that is corrupt, or of another trust domain, is an
// error, and left as it is.
func Open(ctx context.Context, path string, td spiffeid.TrustDomain, log hclog.Logger) (*Store, error) {
	s := &Store{td: td, log: log, expiry: make(chan struct{}, 1)}
	var records []*record
	if path != "" {
		db, entries, err := openDatabase(ctx, path, td)
		if err != nil {
			return nil, err
		}
		s.db = db
		for _, e := range entries {
			records = append(records, newRecord(e, 0, false))
		}
		log.Debug("entries loaded", "path", path, "count", len(entries))
	}
	s.sets = watch.New(buildSet(records))
	s.expiry <- struct{}{}
	return s, nil
}

// Set returns the newest set and the channel that closes when it is stale.
func (s *Store) Set() (*Set, <-chan struct{}) { return s.sets.Load() }

// set is the newest set, for who needs no notice.
func (s *Store) set() *Set {
	set, _ := s.sets.Load()
	return set
}

// ReplaceFile puts these in the place of all entries that come from the file.
// Their IDs are made from their content; of those that were there before, the
// creation time stays. When one is invalid, or two are similar, nothing
// changes.
func (s *Store) ReplaceFile(entries []Entry) error {
	now := time.Now()
	fresh := make([]*record, 0, len(entries))
	seen := make(map[kinship]bool, len(entries))
	for i, e := range entries {
		e.ID = ""
		e, err := e.Check(s.td)
		if err != nil {
			return fmt.Errorf("entry %q: %w", entries[i].Path, err)
		}
		k := kin(&e)
		if seen[k] {
			return fmt.Errorf("entry %q: %w in the file", e.Path, ErrExists)
		}
		seen[k] = true
		e.ID, e.FromFile, e.CreatedAt, e.ExpiresAt, e.Revision = fileID(&e), true, now, time.Time{}, 0
		fresh = append(fresh, newRecord(e, i, false))
	}

	s.writer.Lock()
	defer s.writer.Unlock()
	set := s.set()
	var before []string
	for _, r := range set.order {
		if r.FromFile {
			before = append(before, r.ID)
		} else {
			// Sets that are out there go on reading the old record.
			fresh = append(fresh, newRecord(r.Entry, 0, r.transient))
		}
	}
	for i, r := range fresh[:len(entries)] {
		if old := set.ids.get(r.ID); old != nil {
			fresh[i].CreatedAt = old.CreatedAt
		}
	}
	if slices.EqualFunc(before, fresh[:len(entries)], func(id string, r *record) bool { return id == r.ID }) {
		return nil // nobody needs waking
	}
	s.sets.Store(buildSet(fresh))
	return nil
}

// Create stores a new entry and returns it with ID, revision and creation time
// filled in. With ErrExists it returns the entry that is there.
func (s *Store) Create(ctx context.Context, e Entry) (Entry, error) {
	return s.create(ctx, e, false)
}

// CreateTransient is Create without the database: for an entry that must end
// with something that does not outlive the daemon.
func (s *Store) CreateTransient(ctx context.Context, e Entry) (Entry, error) {
	return s.create(ctx, e, true)
}

func (s *Store) create(ctx context.Context, e Entry, transient bool) (Entry, error) {
	e, err := e.Check(s.td)
	if err != nil {
		return Entry{}, err
	}
	switch {
	case e.ID == "":
		e.ID = newID()
	case strings.HasPrefix(e.ID, fileIDPrefix):
		return Entry{}, Faults{{Field: "id", Reason: "entry IDs that begin with " + fileIDPrefix + " belong to the configuration file"}}
	}
	e.FromFile, e.Revision, e.CreatedAt = false, 0, time.Now().Round(0)

	s.writer.Lock()
	defer s.writer.Unlock()
	set := s.set()
	if there := set.kin.get(kin(&e)); there != nil {
		return there.clone(), ErrExists
	}
	if there := set.ids.get(e.ID); there != nil {
		return there.clone(), fmt.Errorf("entry ID %s is taken: %w", e.ID, ErrExists)
	}
	if !transient && s.db != nil {
		if err := s.db.put(ctx, &e); err != nil {
			return Entry{}, fmt.Errorf("store entry: %w", err)
		}
	}
	s.publish(set.with(newRecord(e, 0, transient)), &e)
	return e.clone(), nil
}

// Update lets change edit a copy of the stored entry and stores the result
// under the next revision. ID, creation time and origin stay; the SPIFFE ID
// follows Path. An error of change comes back as it is.
func (s *Store) Update(ctx context.Context, id string, change func(*Entry) error) (Entry, error) {
	s.writer.Lock()
	defer s.writer.Unlock()
	set := s.set()
	old, err := stored(set, id)
	if err != nil {
		return Entry{}, err
	}
	e := old.clone()
	if err := change(&e); err != nil {
		return Entry{}, err
	}
	e.ID, e.CreatedAt, e.FromFile = old.ID, old.CreatedAt, false
	if e, err = e.Check(s.td); err != nil {
		return Entry{}, err
	}
	if there := set.kin.get(kin(&e)); there != nil && there != old {
		return there.clone(), ErrExists
	}
	e.Revision = old.Revision + 1
	if !old.transient && s.db != nil {
		if err := s.db.put(ctx, &e); err != nil {
			return Entry{}, fmt.Errorf("store entry: %w", err)
		}
	}
	s.publish(set.without(old).with(newRecord(e, 0, old.transient)), &e)
	return e.clone(), nil
}

// Delete removes an entry and returns what it was.
func (s *Store) Delete(ctx context.Context, id string) (Entry, error) {
	s.writer.Lock()
	defer s.writer.Unlock()
	set := s.set()
	old, err := stored(set, id)
	if err != nil {
		return Entry{}, err
	}
	if !old.transient && s.db != nil {
		if err := s.db.delete(ctx, id); err != nil {
			return Entry{}, fmt.Errorf("delete entry: %w", err)
		}
	}
	s.sets.Store(set.without(old))
	return old.clone(), nil
}

// Get returns one entry, of either origin.
func (s *Store) Get(ctx context.Context, id string) (Entry, error) {
	e, ok := s.set().Entry(id)
	if !ok {
		return Entry{}, ErrNotFound
	}
	return e.clone(), nil
}

// stored returns a record that the API may change.
func stored(set *Set, id string) (*record, error) {
	r := set.ids.get(id)
	switch {
	case r == nil:
		return nil, ErrNotFound
	case r.FromFile:
		return nil, ErrFromFile
	}
	return r, nil
}

// publish makes the set with the entry e the newest one. The caller holds
// writer, and the database has the entry.
func (s *Store) publish(set *Set, e *Entry) {
	s.sets.Store(set)
	if e.ExpiresAt.IsZero() {
		return
	}
	select {
	case s.expiry <- struct{}{}:
	default: // Run has been told already
	}
}

// Run removes entries as they expire, until the context ends. The time of day
// decides what is served, so it looks at least every minute, should the clock be
// set; but a clock that is ahead for a while costs no entry: one is removed only
// when it has expired by the monotonic clock too.
func (s *Store) Run(ctx context.Context) error {
	for {
		next := s.expire(ctx, time.Now())
		var due <-chan time.Time
		if !next.IsZero() {
			due = time.After(min(time.Until(next), time.Minute))
		}
		select {
		case <-ctx.Done():
			return nil
		case <-due:
		case <-s.expiry:
		}
	}
}

// expire removes what has expired and returns when that is to be done again,
// zero for not before another entry comes.
func (s *Store) expire(ctx context.Context, now time.Time) (next time.Time) {
	s.writer.Lock()
	defer s.writer.Unlock()
	before := s.set()
	set := before
	var gone []string
	ends, lapsed := make(map[version]time.Time), make(map[version]struct{})
	for _, r := range before.order {
		if r.ExpiresAt.IsZero() {
			continue
		}
		v := version{r.ID, r.Revision}
		end, known := s.ends[v]
		if !known {
			end = time.Now().Add(max(r.ExpiresAt.Sub(now), 0))
		}
		at := r.ExpiresAt
		if !r.live(now) {
			if !time.Now().Before(end) {
				set = set.without(r)
				if !r.transient {
					gone = append(gone, r.ID)
				}
				continue
			}
			at, lapsed[v] = end, struct{}{}
		}
		ends[v] = end
		if next.IsZero() || at.Before(next) {
			next = at
		}
	}
	if set == before && !maps.Equal(lapsed, s.lapsed) {
		same := *before
		set = &same // the entries are these, but who has them is to look again
	}
	s.ends, s.lapsed = ends, lapsed
	if set == before {
		return next
	}
	// Unlike other changes this one goes ahead even if the disk is full: the
	// entry has ended whatever the database says, and Open leaves it out.
	if s.db != nil && len(gone) > 0 {
		if err := s.db.delete(ctx, gone...); err != nil && ctx.Err() == nil {
			s.log.Warn("expired entries stay in the database", "count", len(gone), "error", err)
		}
	}
	s.sets.Store(set)
	if n := before.Len() - set.Len(); n > 0 {
		s.log.Info("entries expired", "count", n)
	}
	return next
}

// Close closes the database.
func (s *Store) Close() error {
	s.writer.Lock()
	defer s.writer.Unlock()
	if s.db == nil {
		return nil
	}
	return s.db.close()
}

// newID returns a random UUID (RFC 9562 §5.4).
func newID() string {
	var b [16]byte
	rand.Read(b[:])
	b[6] = b[6]&0x0f | 0x40
	b[8] = b[8]&0x3f | 0x80
	return fmt.Sprintf("%x-%x-%x-%x-%x", b[:4], b[4:6], b[6:8], b[8:10], b[10:])
}
