package registry

import (
	"context"
	"errors"

	"github.com/hashicorp/go-hclog"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
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
// call returns; transient ones live in memory until they are removed.
type Store struct{}

// Open opens or creates the database at path; an empty path keeps everything
// in memory. A database that is corrupt, or of another trust domain, is an
// error, and left as it is.
func Open(ctx context.Context, path string, td spiffeid.TrustDomain, log hclog.Logger) (*Store, error) {
	panic("unbuilt")
}

// Set returns the newest set and the channel that closes when it is stale.
func (s *Store) Set() (*Set, <-chan struct{}) { panic("unbuilt") }

// ReplaceFile puts these in the place of all entries that come from the file.
func (s *Store) ReplaceFile(entries []Entry) error { panic("unbuilt") }

// Create stores a new entry and returns it with ID, revision and creation time
// filled in. With ErrExists it returns the entry that is there.
func (s *Store) Create(ctx context.Context, e Entry) (Entry, error) { panic("unbuilt") }

// CreateTransient is Create without the database: for an entry that must end
// with something that does not outlive the daemon.
func (s *Store) CreateTransient(ctx context.Context, e Entry) (Entry, error) { panic("unbuilt") }

// Update lets change edit the stored entry and stores the result under the next revision.
func (s *Store) Update(ctx context.Context, id string, change func(*Entry) error) (Entry, error) {
	panic("unbuilt")
}

// Delete removes an entry and returns what it was.
func (s *Store) Delete(ctx context.Context, id string) (Entry, error) { panic("unbuilt") }

// Get returns one entry, of either origin.
func (s *Store) Get(ctx context.Context, id string) (Entry, error) { panic("unbuilt") }

// Run removes entries as they expire, until the context ends.
func (s *Store) Run(ctx context.Context) error { panic("unbuilt") }

// Close closes the database.
func (s *Store) Close() error { panic("unbuilt") }
