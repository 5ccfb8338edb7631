package svid

import (
	"context"
	"fmt"
	"sync"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"github.com/deputy-id/deputy/svid/registry"
)

// selfTime bounds how long a handshake waits for the daemon's own SVID.
const selfTime = 5 * time.Second

// A Self is the daemon's own X.509-SVID and the bundles that it verifies
// others with, for the TLS of its listeners. It is go-spiffe's x509svid.Source
// and x509bundle.Source, renews like any SVID, and is safe for concurrent use.
// A caller closes it.
type Self struct {
	authority Authority
	keeper    *Keeper
	holder    Holder
	entry     []registry.Entry
	close     func()
}

// NewSelf returns the identity of this ID, which the authority must sign for
// (local.Authority.Node).
func NewSelf(a Authority, id spiffeid.ID, log hclog.Logger) *Self {
	gone := make(chan struct{})
	return &Self{
		authority: a,
		keeper:    NewKeeper(a, KeeperOptions{Log: log}),
		holder:    Holder{Gone: gone},
		entry:     []registry.Entry{{ID: "self", SPIFFEID: id}},
		close:     sync.OnceFunc(func() { close(gone) }),
	}
}

// Close drops the key.
func (s *Self) Close() error {
	s.close()
	return nil
}

// GetX509SVID implements go-spiffe's x509svid.Source.
func (s *Self) GetX509SVID() (*x509svid.SVID, error) {
	ctx, cancel := context.WithTimeout(context.Background(), selfTime)
	defer cancel()
	c, err := s.keeper.X509(ctx, s.holder, s.entry)
	if err != nil {
		return nil, fmt.Errorf("X.509-SVID of the daemon: %w", err)
	}
	x := c.SVIDs[0]
	return &x509svid.SVID{ID: x.Entry.SPIFFEID, Certificates: x.Chain, PrivateKey: x.Signer}, nil
}

// GetX509BundleForTrustDomain implements go-spiffe's x509bundle.Source, for our
// own trust domain and those that it knows the bundles of. Who of them may
// connect is the listener's to say.
func (s *Self) GetX509BundleForTrustDomain(td spiffeid.TrustDomain) (*x509bundle.Bundle, error) {
	all, _ := s.authority.Bundles()
	if all == nil || all.Own == nil {
		return nil, fmt.Errorf("trust bundle: %w", ErrNotReady)
	}
	b, ok := all.Of(td)
	if !ok {
		return nil, fmt.Errorf("%s: %w", td, ErrNoBundle)
	}
	return x509bundle.FromX509Authorities(td, b.X509Authorities), nil
}

var (
	_ x509svid.Source   = (*Self)(nil)
	_ x509bundle.Source = (*Self)(nil)
)
