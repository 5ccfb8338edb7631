// Package registry says which identities a process is entitled to. An Entry
// maps selectors to a SPIFFE ID; a Set is an immutable collection of entries,
// indexed by selector, that Match asks; the Store keeps entries (from the
// configuration file, and from the API in SQLite) and publishes the next Set
// when one changes.
//
// It defends against an entry that is matched by less than all of its
// selectors, by evidence that is unknown, or through a template value that was
// made to look like another's. It never sees a key.
package registry

import (
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/deputy-id/deputy/attestor"
)

// An Entry says that a process with all of these selectors has this identity.
// Entries of a Set are shared: nobody may change one.
type Entry struct {
	ID        string              // "file-<hash>" for one of the file, else a UUID or the caller's choice
	Path      string              // path of the SPIFFE ID as configured; it may be a template
	SPIFFEID  spiffeid.ID         // the ID itself; zero in an entry whose path is a template, or that is not rendered yet
	ParentID  spiffeid.ID         // this node, or /spire/server
	Selectors []attestor.Selector // sorted, each once, at least one

	X509TTL time.Duration // 0: the authority's default
	JWTTTL  time.Duration // 0: the authority's default

	DNSNames      []string // the first becomes the certificate's common name
	Hint          string
	FederatesWith []spiffeid.TrustDomain
	Audiences     []string // the only audiences that JWT-SVIDs may have; none: any
	Instance      bool     // each process is a principal of its own
	AllowTraced   bool     // a traced process is served
	JWTFresh      bool     // never serve a JWT-SVID from the cache

	CreatedAt time.Time
	ExpiresAt time.Time // zero: never
	Revision  int64
	FromFile  bool
}
