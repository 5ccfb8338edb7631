package svid

import (
	"context"

	"github.com/hashicorp/go-hclog"

	"github.com/deputy-id/deputy/svid/registry"
)

// A Holder is who SVIDs are kept for: a process, as far as this package needs
// to know of it.
type Holder struct {
	ID   uint64          // no other process ever has it
	Gone <-chan struct{} // closes when what is kept for it is to be dropped
}

// A Keeper issues SVIDs through an Authority, one key and certificate per
// holder and entry, and keeps each until half of its life, less or more a
// tenth at random. It has no goroutine per SVID: a snapshot grows stale, and
// whoever still wants it asks again. It is safe for concurrent use and never
// signs under a lock.
type Keeper struct{}

// KeeperOptions of a Keeper.
type KeeperOptions struct {
	KeyType KeyType // of the workloads' keys
	JWTs    int     // cached JWT-SVIDs per holder at most; 0: 64
	Log     hclog.Logger
}

// A KeyType names a kind of private key.
type KeyType string

// The kinds of private keys.
const (
	ECP256  KeyType = "ec-p256"
	ECP384  KeyType = "ec-p384"
	RSA2048 KeyType = "rsa-2048"
)

// NewKeeper returns a keeper that issues through the authority.
func NewKeeper(a Authority, o KeeperOptions) *Keeper { panic("unbuilt") }

// X509Context is the X.509-SVIDs of one holder with the bundles to verify
// others: the full state. It is immutable; the same pointer comes back until
// it is stale.
type X509Context struct {
	SVIDs   []X509
	Bundles *Bundles
	stale   chan struct{}
}

// Stale is closed when an SVID is due for renewal, a bundle changed, or the
// holder is gone.
func (c *X509Context) Stale() <-chan struct{} { return c.stale }

// X509 returns the holder's SVIDs under these entries, in their order, and
// issues those that are missing or due. When a renewal fails the good SVID is
// kept, a warning logged, and the snapshot is stale again after a backoff; the
// error comes out only when an SVID is missing or has expired. Of two entries
// with the same hint the later is left out.
func (k *Keeper) X509(ctx context.Context, h Holder, entries []registry.Entry) (*X509Context, error) {
	panic("unbuilt")
}

// JWT returns a JWT-SVID under the entry for this set of audiences (their
// order does not matter), cached until half of its life unless the entry asks
// for a fresh one.
func (k *Keeper) JWT(ctx context.Context, h Holder, e registry.Entry, audience []string) (JWT, error) {
	panic("unbuilt")
}
