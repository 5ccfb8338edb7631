package svid

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/deputy-id/deputy/svid/registry"
)

// ErrGone says that the holder ended: nothing is issued for it any more.
var ErrGone = errors.New("holder is gone")

const (
	retryFirst = time.Second // after a failed renewal, doubled at each further one
	retryMost  = time.Minute
	// sweepEvery is how often the wall clock is looked at: timers do not see
	// it jump, nor the machine sleep.
	sweepEvery = 15 * time.Second
	tokensKept = 64
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
//
// A goroutine per holder waits for its end, and one more watches bundles and
// clock for as long as there is a holder; so a Keeper needs no Close.
type Keeper struct {
	authority Authority
	keys      *keySource
	tokens    int
	log       hclog.Logger
	subsets   subsets
	emptied   chan struct{} // the last holder went
	// generation is part of what a cached token is found by.
	generation atomic.Uint64

	mu       sync.RWMutex // guards what follows
	holders  map[uint64]*held
	watching bool
}

// KeeperOptions of a Keeper.
type KeeperOptions struct {
	KeyType KeyType // of the workloads' keys
	JWTs    int     // cached JWT-SVIDs per holder at most; 0: 64
	Log     hclog.Logger
}

// NewKeeper returns a keeper that issues through the authority.
func NewKeeper(a Authority, o KeeperOptions) *Keeper {
	if o.JWTs <= 0 {
		o.JWTs = tokensKept
	}
	if o.Log == nil {
		o.Log = hclog.NewNullLogger()
	}
	return &Keeper{
		authority: a,
		keys:      newKeySource(o.KeyType),
		tokens:    o.JWTs,
		log:       o.Log,
		emptied:   make(chan struct{}, 1),
		holders:   make(map[uint64]*held),
	}
}

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
// with the same hint the later is left out. The caller must not change the
// slice afterwards.
func (k *Keeper) X509(ctx context.Context, h Holder, entries []registry.Entry) (*X509Context, error) {
	for {
		kept, err := k.hold(h)
		if err != nil {
			return nil, err
		}
		kept.mu.Lock()
		if c := kept.current(entries); c != nil {
			kept.mu.Unlock()
			return c, nil
		}
		if other := kept.renewal; other != nil {
			kept.mu.Unlock()
			select {
			case <-other:
				continue
			case <-ctx.Done():
				return nil, ctx.Err()
			}
		}
		done := make(chan struct{})
		kept.renewal = done
		leaves := kept.leaves
		kept.mu.Unlock()
		return k.renew(ctx, kept, entries, leaves, done)
	}
}

// renew makes the next snapshot and closes done.
func (k *Keeper) renew(ctx context.Context, kept *held, entries []registry.Entry, old []leaf, done chan struct{}) (*X509Context, error) {
	defer func() {
		kept.mu.Lock()
		kept.renewal = nil
		kept.mu.Unlock()
		close(done)
	}()
	served := distinctHints(entries)
	leaves, err := renewAll(ctx, k.log, "X.509-SVID", served, old, k.issue)
	if err != nil {
		// What was issued beside the one that failed need not be issued again.
		kept.mu.Lock()
		if !kept.gone {
			kept.leaves = leaves
		}
		kept.mu.Unlock()
		return nil, err
	}
	federated := federatedWith(served)
	bundles, err := k.bundles(federated)
	if err != nil {
		return nil, err
	}
	c := &X509Context{Bundles: bundles, SVIDs: make([]X509, len(leaves)), stale: make(chan struct{})}
	for i := range leaves {
		c.SVIDs[i] = leaves[i].X509
	}
	kept.mu.Lock()
	defer kept.mu.Unlock()
	if kept.gone {
		return nil, ErrGone
	}
	kept.retire()
	kept.given, kept.others, kept.snapshot, kept.leaves = entries, federated, c, leaves
	if at, ok := nextRenewal(leaves); ok {
		kept.timer = time.AfterFunc(time.Until(at), func() {
			kept.mu.Lock()
			defer kept.mu.Unlock()
			if kept.snapshot == c {
				kept.retire()
			}
		})
	}
	// The watcher may have passed this holder before the snapshot was here.
	if newest, err := k.bundles(federated); err == nil && !newest.same(bundles) {
		kept.retire()
	}
	return c, nil
}

// issue asks the authority for one SVID on a new key.
func (k *Keeper) issue(ctx context.Context, e registry.Entry) (leaf, error) {
	if err := ctx.Err(); err != nil {
		return leaf{}, err
	}
	key, err := k.keys.take()
	if err != nil {
		return leaf{}, err
	}
	issued := time.Now()
	chain, err := k.authority.X509(ctx, e, key)
	if err != nil {
		return leaf{}, err
	}
	if len(chain) == 0 {
		return leaf{}, errors.New("authority returned no certificate")
	}
	l := leaf{X509{Entry: e, Chain: chain, Signer: key}, newTerm(chain[0].NotBefore, issued, chain[0].NotAfter)}
	if l.life <= 0 {
		return leaf{}, errors.New("authority returned a certificate that has expired")
	}
	return l, nil
}

// subsets shares the restricted bundles between holders, and with them what is
// computed from each.
type subsets struct {
	mu  sync.Mutex // guards what follows
	of  *Bundles
	set map[string]*Bundles // by the trust domains, joined by commas
}

// bundles returns our own bundle and those of the trust domains, the same
// pointer for the same question.
func (k *Keeper) bundles(federated []spiffeid.TrustDomain) (*Bundles, error) {
	all, _ := k.authority.Bundles()
	if all == nil || all.Own == nil {
		return nil, fmt.Errorf("trust bundle: %w", ErrNotReady)
	}
	names := make([]string, len(federated))
	for i, td := range federated {
		names[i] = td.Name()
	}
	key := strings.Join(names, ",")
	s := &k.subsets
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.of != all {
		s.of, s.set = all, make(map[string]*Bundles)
	}
	b, ok := s.set[key]
	if !ok {
		b = all.Restrict(federated)
		s.set[key] = b
	}
	return b, nil
}

// federatedWith returns the trust domains that some entry federates with,
// sorted, each once.
func federatedWith(entries []registry.Entry) []spiffeid.TrustDomain {
	var tds []spiffeid.TrustDomain
	for i := range entries {
		tds = append(tds, entries[i].FederatesWith...)
	}
	slices.SortFunc(tds, spiffeid.TrustDomain.Compare)
	return slices.Compact(tds)
}

// distinctHints leaves out entries whose hint an earlier one has (Workload API §5.2.1).
func distinctHints(entries []registry.Entry) []registry.Entry {
	seen := make(map[string]bool)
	kept := make([]registry.Entry, 0, len(entries))
	for _, e := range entries {
		if e.Hint != "" && seen[e.Hint] {
			continue
		}
		seen[e.Hint] = true
		kept = append(kept, e)
	}
	return kept
}

// sameService reports whether both entries lead to the same message.
func sameService(a, b *registry.Entry) bool {
	return sameCertificate(a, b) && a.Hint == b.Hint && slices.Equal(a.FederatesWith, b.FederatesWith)
}

// sameCertificate reports whether one certificate serves both entries. It goes
// by content: an entry may be deleted, and another created with its ID.
func sameCertificate(a, b *registry.Entry) bool {
	return a.ID == b.ID && a.SPIFFEID == b.SPIFFEID && a.X509TTL == b.X509TTL && slices.Equal(a.DNSNames, b.DNSNames)
}

// backoff before the attempt after this many failures, ±10 %.
func backoff(failures int) time.Duration {
	d := retryMost
	if n := failures - 1; n < 6 {
		d = retryFirst << n
	}
	return time.Duration(float64(d) * (0.9 + 0.2*rand.Float64()))
}
