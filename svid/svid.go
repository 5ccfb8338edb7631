// Package svid turns entries into X.509-, JWT- and WIT-SVIDs and keeps them
// fresh.
//
// An Authority signs; the Issuer is the signing itself, for authorities that
// hold a key on this machine; the Keeper holds what was issued for each
// process, renews it at half of its life and drops it when the process ends.
//
// It defends against two processes that share a private key, a rotation that
// loses a good SVID, and a certificate or token that the SPIFFE standards do
// not allow. It never sees where a selector comes from. Private keys stay in
// memory and out of logs and errors.
package svid

import (
	"context"
	"crypto"
	"crypto/x509"
	"errors"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/deputy-id/deputy/svid/registry"
)

// What a caller may branch on.
var (
	ErrNotReady = errors.New("authority is not ready")          // yet, or for now
	ErrOurs     = errors.New("bundle is our own")               // and no other trust domain's
	ErrNoBundle = errors.New("no bundle for this trust domain") // of a token
	ErrDenied   = errors.New("authority denies a signature")    // for this ID
)

// An Authority signs SVIDs for entries and publishes trust bundles. It is
// given rendered entries: Entry.SPIFFEID is what is signed.
type Authority interface {
	// X509 returns a chain for the public key of the signer: the leaf first,
	// then the intermediates, without the root.
	X509(context.Context, registry.Entry, crypto.Signer) ([]*x509.Certificate, error)
	// JWT returns a JWT-SVID for these audiences.
	JWT(context.Context, registry.Entry, []string) (Token, error)
	// Bundles returns the bundles and the channel that closes when they are stale.
	Bundles() (*Bundles, <-chan struct{})
}

// A Bundle is what one trust domain's SVIDs are verified with. It is immutable.
type Bundle struct {
	TrustDomain     spiffeid.TrustDomain
	X509Authorities []*x509.Certificate
	JWTAuthorities  map[string]crypto.PublicKey // by key ID
	WITAuthorities  map[string]crypto.PublicKey // likewise; no ID is in both
	RefreshHint     time.Duration               // 0: none
	Sequence        uint64

	encoded encodings
}

// Bundles are the bundle of our own trust domain and those of others. A value
// is immutable and carries what is computed from it.
type Bundles struct {
	Own       *Bundle
	Federated map[spiffeid.TrustDomain]*Bundle
}

// Of returns the bundle of a trust domain, own or federated.
func (b *Bundles) Of(td spiffeid.TrustDomain) (*Bundle, bool) {
	if b.Own != nil && b.Own.TrustDomain == td {
		return b.Own, true
	}
	f, ok := b.Federated[td]
	return f, ok
}

// X509 is an X.509-SVID with its key.
type X509 struct {
	Entry  registry.Entry // the one that it was issued under
	Chain  []*x509.Certificate
	Signer crypto.Signer
}

// JWT is a JWT-SVID.
type JWT struct {
	Entry   registry.Entry
	Token   string
	Expires time.Time
}

// SignatureAlgorithms are those that a JWT-SVID may be signed with
// (JWT-SVID §2.1).
var SignatureAlgorithms = []jose.SignatureAlgorithm{
	jose.RS256, jose.RS384, jose.RS512,
	jose.ES256, jose.ES384, jose.ES512,
	jose.PS256, jose.PS384, jose.PS512,
}
