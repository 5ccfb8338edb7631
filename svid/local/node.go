package local

import (
	"context"
	"crypto"
	"crypto/x509"
	"errors"
	"fmt"

	"github.com/deputy-id/deputy/svid"
	"github.com/deputy-id/deputy/svid/registry"
)

// node is the authority as it signs for the daemon itself, and for nobody else.
type node struct{ a *Authority }

// Node returns the authority that signs the daemon's own X.509-SVID, under
// registry.NodeID whatever the entry says: for svid.NewSelf.
func (a *Authority) Node() svid.Authority { return node{a} }

// X509 implements svid.Authority.
func (n node) X509(_ context.Context, e registry.Entry, key crypto.Signer) ([]*x509.Certificate, error) {
	if id := registry.NodeID(n.a.o.TrustDomain); e.SPIFFEID != id {
		return nil, fmt.Errorf("sign certificate for %s: not this node (%s)", e.SPIFFEID, id)
	}
	i, err := n.a.issuer()
	if err != nil {
		return nil, err
	}
	return i.NodeX509(key.Public(), n.a.limit(e.X509TTL, n.a.o.X509TTL))
}

// JWT implements svid.Authority: a node has no tokens.
func (n node) JWT(context.Context, registry.Entry, []string) (svid.Token, error) {
	return svid.Token{}, errors.New("sign token: the node's own ID has none")
}

// Bundles implements svid.Authority.
func (n node) Bundles() (*svid.Bundles, <-chan struct{}) { return n.a.Bundles() }
