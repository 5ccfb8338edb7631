package svid

import (
	"crypto/x509"
	"time"
)

// Holders is for how many holders something is kept.
func Holders(k *Keeper) int {
	k.mu.RLock()
	defer k.mu.RUnlock()
	return len(k.holders)
}

// Tokens is how many tokens are cached for a holder.
func Tokens(k *Keeper, id uint64) int {
	k.mu.RLock()
	defer k.mu.RUnlock()
	h := k.holders[id]
	h.mu.Lock()
	defer h.mu.Unlock()
	return len(h.tokens)
}

// LeafDue and LeafExpired judge a certificate that was issued at one time, to
// be renewed at half of its life, at another.
func LeafDue(c *x509.Certificate, issued, now time.Time) bool {
	l := leafOf(c, issued)
	return l.due(now)
}
func LeafExpired(c *x509.Certificate, issued, now time.Time) bool {
	l := leafOf(c, issued)
	return l.expired(now)
}

func leafOf(c *x509.Certificate, issued time.Time) *leaf {
	life := c.NotAfter.Sub(issued)
	return &leaf{X509{Chain: []*x509.Certificate{c}}, term{begins: c.NotBefore, issued: issued, life: life, renew: life / 2}}
}

// TokenFresh judges a token of five minutes.
func TokenFresh(issued, now time.Time) bool {
	t := token{issued: issued, life: 5 * time.Minute}
	return t.fresh(now)
}
