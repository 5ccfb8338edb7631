package svid

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/deputy-id/deputy/svid/registry"
)

// A tokenKey names what a cached JWT-SVID was minted for: a digest, since
// audiences may be long.
type tokenKey [sha256.Size]byte

// A token is a cached JWT-SVID, judged by both clocks as a leaf is.
type token struct {
	JWT
	issued   time.Time
	life     time.Duration
	failures int
	retry    time.Time
}

// fresh reports whether the token may be served without asking the authority.
func (t *token) fresh(now time.Time) bool {
	if !t.valid(now) {
		return false
	}
	if t.failures > 0 && now.Before(t.retry) {
		return true
	}
	// Verifiers refuse a token from the future, so one from before the clock
	// jumped back is of no use.
	return !passed(t.issued, t.life/2, now) && !now.Round(0).Before(t.issued.Round(0).Add(-leeway))
}

func (t *token) valid(now time.Time) bool { return !passed(t.issued, t.life, now) }

// JWT returns a JWT-SVID under the entry for this set of audiences (their
// order does not matter), cached until half of its life unless the entry asks
// for a fresh one. When minting fails, a cached one that is valid still serves.
func (k *Keeper) JWT(ctx context.Context, h Holder, e registry.Entry, audience []string) (JWT, error) {
	audience = slices.Compact(slices.Sorted(slices.Values(audience)))
	if e.JWTFresh {
		select {
		case <-h.Gone:
			return JWT{}, ErrGone
		default:
		}
		t, err := k.mint(ctx, e, audience)
		if err != nil {
			return JWT{}, err
		}
		return t.JWT, nil
	}
	key := keyOf(&e, audience, k.generation.Load())
	for {
		kept, err := k.hold(h)
		if err != nil {
			return JWT{}, err
		}
		kept.mu.Lock()
		cached := kept.tokens[key]
		if cached != nil && cached.fresh(time.Now()) {
			t := cached.JWT
			kept.mu.Unlock()
			t.Entry = e
			return t, nil
		}
		if other, ok := kept.minting[key]; ok {
			kept.mu.Unlock()
			select {
			case <-other:
				continue
			case <-ctx.Done():
				return JWT{}, ctx.Err()
			}
		}
		done := make(chan struct{})
		if kept.minting == nil {
			kept.minting = make(map[tokenKey]chan struct{})
		}
		kept.minting[key] = done
		kept.mu.Unlock()
		return k.remint(ctx, kept, key, cached, e, audience, done)
	}
}

// ForgetTokens has every token from now on minted anew: what the authority says
// in one is no longer what it said. Those that were handed out live on.
func (k *Keeper) ForgetTokens() { k.generation.Add(1) }

// remint mints and caches, or falls back to the cached token; it closes done.
func (k *Keeper) remint(ctx context.Context, kept *held, key tokenKey, cached *token, e registry.Entry, audience []string, done chan struct{}) (JWT, error) {
	defer func() {
		kept.mu.Lock()
		delete(kept.minting, key)
		kept.mu.Unlock()
		close(done)
	}()
	t, err := k.mint(ctx, e, audience)
	if err != nil {
		// What the authority denies it would not have signed now either.
		if ctx.Err() != nil || cached == nil || !cached.valid(time.Now()) || errors.Is(err, ErrDenied) {
			return JWT{}, err
		}
		again := *cached
		again.Entry = e
		again.failures++
		wait := backoff(again.failures)
		again.retry = time.Now().Add(wait)
		k.log.Warn("minting failed, serving the cached JWT-SVID", "entry", e.ID, "spiffe_id", e.SPIFFEID.String(),
			"expires", again.Expires, "retry_in", wait.Round(time.Millisecond), "error", err)
		t = &again
	}
	kept.mu.Lock()
	defer kept.mu.Unlock()
	if kept.gone {
		return JWT{}, ErrGone
	}
	kept.cache(key, t, k.tokens)
	return t.JWT, nil
}

// evictFrom is how many cached tokens are looked at for one to evict: a caller
// that never asks for an audience twice must not pay for a look at all.
const evictFrom = 8

// cache stores a token; where there is no room it evicts, of a few that map
// order has picked at random, the one that ends first. The caller holds mu.
func (h *held) cache(key tokenKey, t *token, room int) {
	if h.tokens == nil {
		h.tokens = make(map[tokenKey]*token)
	}
	if _, ok := h.tokens[key]; !ok && len(h.tokens) >= room {
		var first tokenKey
		var end time.Time
		looked := 0
		for k, t := range h.tokens {
			if end.IsZero() || t.Expires.Before(end) {
				first, end = k, t.Expires
			}
			if looked++; looked == evictFrom {
				break
			}
		}
		delete(h.tokens, first)
	}
	h.tokens[key] = t
}

func (k *Keeper) mint(ctx context.Context, e registry.Entry, audience []string) (*token, error) {
	issued := time.Now()
	t, err := k.authority.JWT(ctx, e, audience)
	if err != nil {
		return nil, fmt.Errorf("issue JWT-SVID for entry %s: %w", e.ID, err)
	}
	return &token{
		JWT:    JWT{Entry: e, Token: t.Compact, Expires: t.Expires},
		issued: issued,
		life:   t.Expires.Sub(issued),
	}, nil
}

func keyOf(e *registry.Entry, audience []string, generation uint64) tokenKey {
	buf := binary.AppendUvarint(nil, generation)
	for _, s := range append([]string{e.ID, e.SPIFFEID.String()}, audience...) {
		buf = binary.AppendUvarint(buf, uint64(len(s)))
		buf = append(buf, s...)
	}
	buf = binary.AppendVarint(buf, int64(e.JWTTTL))
	buf = binary.AppendVarint(buf, e.Revision)
	return sha256.Sum256(buf)
}
