package svid_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/deputy-id/deputy/svid"
	"github.com/deputy-id/deputy/svid/registry"
	"github.com/deputy-id/deputy/test/bubble"
)

// holder returns a holder and what ends it.
func holder(id uint64) (svid.Holder, func()) {
	gone := make(chan struct{})
	return svid.Holder{ID: id, Gone: gone}, sync.OnceFunc(func() { close(gone) })
}

func isStale(c *svid.X509Context) bool {
	select {
	case <-c.Stale():
		return true
	default:
		return false
	}
}

func fetch(t *testing.T, k *svid.Keeper, h svid.Holder, entries ...registry.Entry) *svid.X509Context {
	t.Helper()
	c, err := k.X509(t.Context(), h, entries)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func inBubble(t *testing.T, f func(t *testing.T, a *authority, k *svid.Keeper, h svid.Holder, end func())) {
	t.Helper()
	bubble.Test(t, func(t *testing.T) {
		a := newAuthority(t, svid.ECP256)
		h, end := holder(1)
		defer end()
		f(t, a, svid.NewKeeper(a, svid.KeeperOptions{JWTs: 4}), h, end)
	})
}

func TestKeeperRenewsAtHalfLifeAndNotBefore(t *testing.T) {
	inBubble(t, func(t *testing.T, a *authority, k *svid.Keeper, h svid.Holder, _ func()) {
		c := fetch(t, k, h, entry("a"), entry("b"))
		if again := fetch(t, k, h, entry("a"), entry("b")); again != c {
			t.Error("got another snapshot while nothing changed")
		}
		start := time.Now()
		<-c.Stale()
		if d := time.Since(start); d < 27*time.Minute || d > 33*time.Minute {
			t.Errorf("stale after %v, want 30 min ± 10 %%", d)
		}
		next := fetch(t, k, h, entry("a"), entry("b"))
		changed := 0
		for i := range next.SVIDs {
			if next.SVIDs[i].Signer != c.SVIDs[i].Signer {
				changed++
			}
		}
		if changed == 0 || isStale(next) {
			t.Errorf("%d keys changed, stale %v: want a new key in a fresh snapshot", changed, isStale(next))
		}
	})
}

func TestKeeperSharesNoKey(t *testing.T) {
	inBubble(t, func(t *testing.T, a *authority, k *svid.Keeper, h svid.Holder, _ func()) {
		h2, end2 := holder(2)
		defer end2()
		keys := map[string]bool{}
		for _, h := range []svid.Holder{h, h2} {
			for _, s := range fetch(t, k, h, entry("a"), entry("b")).SVIDs {
				der, err := s.KeyDER()
				if err != nil {
					t.Fatal(err)
				}
				keys[string(der)] = true
			}
		}
		if len(keys) != 4 {
			t.Errorf("got %d keys for two holders with two entries, want 4", len(keys))
		}
	})
}

func TestKeeperIssuesAnewWhatTheEntryChanges(t *testing.T) {
	base := entry("a")
	for name, tt := range map[string]struct {
		change           func(*registry.Entry)
		snapshot, anyKey bool // changed
	}{
		"nothing":        {func(*registry.Entry) {}, false, false},
		"selectors only": {func(e *registry.Entry) { e.Revision++ }, false, false},
		"SPIFFE ID":      {func(e *registry.Entry) { e.SPIFFEID = spiffeid.RequireFromPath(td, "/b") }, true, true},
		"DNS names":      {func(e *registry.Entry) { e.DNSNames = []string{"x"} }, true, true},
		"TTL":            {func(e *registry.Entry) { e.X509TTL = time.Minute }, true, true},
		"another entry":  {func(e *registry.Entry) { e.ID = "b" }, true, true},
		"hint":           {func(e *registry.Entry) { e.Hint = "h" }, true, false},
		"federation":     {func(e *registry.Entry) { e.FederatesWith = []spiffeid.TrustDomain{other} }, true, false},
	} {
		t.Run(name, func(t *testing.T) {
			inBubble(t, func(t *testing.T, a *authority, k *svid.Keeper, h svid.Holder, _ func()) {
				c := fetch(t, k, h, base)
				e := base
				tt.change(&e)
				next := fetch(t, k, h, e)
				if got := next != c; got != tt.snapshot {
					t.Errorf("got new snapshot %v, want %v", got, tt.snapshot)
				}
				if got := next.SVIDs[0].Signer != c.SVIDs[0].Signer; got != tt.anyKey {
					t.Errorf("got new key %v, want %v", got, tt.anyKey)
				}
				if tt.snapshot && !isStale(c) {
					t.Error("the snapshot before is not stale")
				}
			})
		})
	}
}

func TestKeeperForgetsAnEntryThatIsNoLongerGiven(t *testing.T) {
	inBubble(t, func(t *testing.T, a *authority, k *svid.Keeper, h svid.Holder, _ func()) {
		c := fetch(t, k, h, entry("a"), entry("b"))
		if left := fetch(t, k, h, entry("b")); len(left.SVIDs) != 1 || left.SVIDs[0].Signer != c.SVIDs[1].Signer {
			t.Error("the entry that stays did not keep its key alone")
		}
		if back := fetch(t, k, h, entry("a"), entry("b")); back.SVIDs[0].Signer == c.SVIDs[0].Signer {
			t.Error("the entry that came back has its old key")
		}
	})
}

func TestKeeperLeavesOutTheLaterOfTwoHints(t *testing.T) {
	inBubble(t, func(t *testing.T, a *authority, k *svid.Keeper, h svid.Holder, _ func()) {
		x, y, z := entry("x"), entry("y"), entry("z")
		x.Hint, y.Hint = "h", "h"
		y.FederatesWith = []spiffeid.TrustDomain{other}
		c := fetch(t, k, h, x, y, z)
		if len(c.SVIDs) != 2 || c.SVIDs[0].Entry.ID != "x" || c.SVIDs[1].Entry.ID != "z" || a.signed.Load() != 2 {
			t.Errorf("got %d SVIDs, %d signatures, want x and z", len(c.SVIDs), a.signed.Load())
		}
		time.Sleep(time.Minute) // the watcher passes
		if isStale(c) {
			t.Error("snapshot is stale, although nothing changed")
		}
	})
}

func TestKeeperKeepsTheGoodSVIDWhenRenewalFails(t *testing.T) {
	bubble.Test(t, func(t *testing.T) {
		var log bytes.Buffer
		a := newAuthority(t, svid.ECP256)
		k := svid.NewKeeper(a, svid.KeeperOptions{Log: hclog.New(&hclog.LoggerOptions{Output: &log, Level: hclog.Info})})
		h, end := holder(1)
		defer end()
		c := fetch(t, k, h, entry("a"))
		expires := c.SVIDs[0].Chain[0].NotAfter
		a.fail(errDown)
		<-c.Stale()
		tries := 0
		for {
			next, err := k.X509(t.Context(), h, []registry.Entry{entry("a")})
			if err != nil {
				if !errors.Is(err, errDown) || time.Now().Before(expires) {
					t.Fatalf("got %v at %v, want the server's error from %v on", err, time.Now(), expires)
				}
				break
			}
			if next == c || next.SVIDs[0].Signer != c.SVIDs[0].Signer {
				t.Fatal("got the stale snapshot or another key")
			}
			tries++
			asked := time.Now()
			<-next.Stale()
			if wait := time.Since(asked); wait < 900*time.Millisecond && time.Now().Before(expires) || wait > 66*time.Second {
				t.Fatalf("try %d: next after %v", tries, wait)
			}
			c = next
		}
		// 1 + 2 + … + 32 s, then a minute each for the rest of half an hour.
		if tries < 25 || tries > 45 {
			t.Errorf("got %d tries in half an hour, want about 35", tries)
		}
		if n := strings.Count(log.String(), "[WARN]"); n != tries {
			t.Errorf("got %d warnings for %d tries", n, tries)
		}
		a.fail(nil)
		if got := fetch(t, k, h, entry("a")); got.SVIDs[0].Signer == c.SVIDs[0].Signer {
			t.Error("got the expired SVID, want a new one")
		}
	})
}

func TestKeeperKeepsWhatWasIssuedBesideAFailure(t *testing.T) {
	inBubble(t, func(t *testing.T, a *authority, k *svid.Keeper, h svid.Holder, _ func()) {
		bad := entry("bad")
		bad.SPIFFEID = spiffeid.RequireFromPath(other, "/x")
		for range 3 {
			if _, err := k.X509(t.Context(), h, []registry.Entry{entry("a"), bad}); err == nil {
				t.Fatal("got no error, want one")
			}
		}
		fetch(t, k, h, entry("a"))
		if n := a.signed.Load(); n != 1 {
			t.Errorf("got %d signatures, want 1", n)
		}
		a.fail(fmt.Errorf("start: %w", svid.ErrNotReady))
		if _, err := k.X509(t.Context(), h, []registry.Entry{entry("b")}); !errors.Is(err, svid.ErrNotReady) {
			t.Errorf("got %v, want ErrNotReady", err)
		}
	})
}

func TestKeeperStaleWhenABundleThatMattersChanges(t *testing.T) {
	inBubble(t, func(t *testing.T, a *authority, k *svid.Keeper, h svid.Holder, _ func()) {
		h2, end2 := holder(2)
		defer end2()
		h3, end3 := holder(3)
		defer end3()
		e := entry("a")
		e.FederatesWith = []spiffeid.TrustDomain{other}
		alone, allied := fetch(t, k, h, entry("a")), fetch(t, k, h2, e)
		if again := fetch(t, k, h3, e); again.Bundles != allied.Bundles {
			t.Error("two holders with the same trust domains do not share their bundles")
		}
		bubble.Wait()
		b, _ := a.Bundles()
		a.bundles.Store(&svid.Bundles{Own: b.Own, Federated: map[spiffeid.TrustDomain]*svid.Bundle{other: {TrustDomain: other}}})
		bubble.Wait()
		if isStale(alone) || !isStale(allied) {
			t.Errorf("federated bundle: stale %v, %v, want false, true", isStale(alone), isStale(allied))
		}
		next := fetch(t, k, h2, e)
		if _, ok := next.Bundles.Of(other); !ok || next.SVIDs[0].Signer != allied.SVIDs[0].Signer {
			t.Error("got no federated bundle, or another key")
		}
		if fetch(t, k, h, entry("a")) != alone {
			t.Error("got another snapshot, though it federates with nobody")
		}
		b, _ = a.Bundles()
		a.bundles.Store(&svid.Bundles{Own: &svid.Bundle{TrustDomain: td, Sequence: 2}, Federated: maps.Clone(b.Federated)})
		bubble.Wait()
		if !isStale(alone) || !isStale(next) {
			t.Errorf("own bundle: stale %v, %v, want both", isStale(alone), isStale(next))
		}
	})
}

func TestKeeperForgetsAHolderThatIsGone(t *testing.T) {
	inBubble(t, func(t *testing.T, a *authority, k *svid.Keeper, h svid.Holder, end func()) {
		c := fetch(t, k, h, entry("a"))
		if svid.Holders(k) != 1 {
			t.Fatalf("got %d holders, want 1", svid.Holders(k))
		}
		end()
		<-c.Stale()
		bubble.Wait()
		if svid.Holders(k) != 0 {
			t.Errorf("got %d holders, want none", svid.Holders(k))
		}
		if _, err := k.X509(t.Context(), h, []registry.Entry{entry("a")}); !errors.Is(err, svid.ErrGone) {
			t.Errorf("got %v, want ErrGone", err)
		}
		for _, fresh := range []bool{false, true} {
			e := entry("a")
			e.JWTFresh = fresh
			if _, err := k.JWT(t.Context(), h, e, []string{"x"}); !errors.Is(err, svid.ErrGone) {
				t.Errorf("got %v, want ErrGone", err)
			}
		}
		// One more comes after the watcher had ended.
		h2, end2 := holder(2)
		defer end2()
		c = fetch(t, k, h2, entry("a"))
		bubble.Wait()
		a.bundles.Store(&svid.Bundles{Own: &svid.Bundle{TrustDomain: td}})
		<-c.Stale()
	})
}

func TestKeeperSignsOnceForManyCallersAndSideBySideForHolders(t *testing.T) {
	inBubble(t, func(t *testing.T, a *authority, k *svid.Keeper, h svid.Holder, _ func()) {
		a.gate = make(chan struct{})
		h2, end2 := holder(2)
		defer end2()
		var wg sync.WaitGroup
		got := make([]*svid.X509Context, 100)
		for i := range got {
			wg.Go(func() { got[i] = fetch(t, k, h, entry("a")) })
		}
		wg.Go(func() { fetch(t, k, h2, entry("a")) })
		// One caller gives up while it waits for another's signature.
		ctx, cancel := context.WithCancel(t.Context())
		wg.Go(func() {
			bubble.Wait()
			cancel()
		})
		if _, err := k.X509(ctx, h, []registry.Entry{entry("a")}); !errors.Is(err, context.Canceled) {
			t.Errorf("got %v, want context.Canceled", err)
		}
		a.gate <- struct{}{} // both holders' signatures are under way
		a.gate <- struct{}{}
		close(a.gate)
		wg.Wait()
		for _, c := range got {
			if c != got[0] {
				t.Fatal("callers got different snapshots")
			}
		}
		if n := a.signed.Load(); n != 2 {
			t.Errorf("got %d signatures, want 2", n)
		}
	})
}

func TestKeeperRSAKeysComeFromThePool(t *testing.T) {
	a := newAuthority(t, svid.ECP256)
	k := svid.NewKeeper(a, svid.KeeperOptions{KeyType: svid.RSA2048})
	h, end := holder(1)
	defer end()
	c := fetch(t, k, h, entry("a"), entry("b"))
	if c.SVIDs[0].Signer == c.SVIDs[1].Signer || c.SVIDs[0].Chain[0].PublicKeyAlgorithm.String() != "RSA" {
		t.Error("want two RSA keys")
	}
}

func TestKeeperCachesTokensPerAudienceSet(t *testing.T) {
	inBubble(t, func(t *testing.T, a *authority, k *svid.Keeper, h svid.Holder, _ func()) {
		mint := func(e registry.Entry, aud ...string) svid.JWT {
			t.Helper()
			j, err := k.JWT(t.Context(), h, e, aud)
			if err != nil {
				t.Fatal(err)
			}
			return j
		}
		e := entry("a")
		first := mint(e, "x", "y")
		if mint(e, "y", "x", "y").Token != first.Token {
			t.Error("order and repetition of audiences matter, want not")
		}
		if mint(e, "x").Token == first.Token || mint(e, "xy").Token == first.Token {
			t.Error("another set of audiences got the same token")
		}
		changed := e
		changed.Revision++
		if mint(changed, "x", "y").Token == first.Token {
			t.Error("another revision got the same token")
		}
		fresh := e
		fresh.JWTFresh = true
		if one, another := mint(fresh, "x", "y"), mint(fresh, "x", "y"); one.Token == another.Token {
			t.Error("fresh tokens are equal")
		}
		time.Sleep(150*time.Second - time.Millisecond)
		if mint(e, "x", "y").Token != first.Token {
			t.Error("got another token before half of its life")
		}
		time.Sleep(time.Millisecond)
		second := mint(e, "x", "y")
		if second.Token == first.Token {
			t.Error("got the same token after half of its life")
		}
		a.fail(errDown)
		time.Sleep(160 * time.Second)
		if mint(e, "x", "y").Token != second.Token {
			t.Error("got another token while the server is down")
		}
		time.Sleep(140 * time.Second)
		if _, err := k.JWT(t.Context(), h, e, []string{"x", "y"}); !errors.Is(err, errDown) {
			t.Errorf("got %v, want the server's error for an expired token", err)
		}
		a.fail(nil)
		before := a.minted.Load()
		for i := range 8 {
			mint(e, fmt.Sprint(i))
		}
		if n := svid.Tokens(k, h.ID); n != 4 || a.minted.Load() != before+8 {
			t.Errorf("got %d cached tokens, want 4", n)
		}
	})
}

func TestKeeperMintsAnewWhatItForgot(t *testing.T) {
	inBubble(t, func(t *testing.T, a *authority, k *svid.Keeper, h svid.Holder, _ func()) {
		mint := func() (string, error) {
			j, err := k.JWT(t.Context(), h, entry("a"), []string{"x"})
			return j.Token, err
		}
		first, err := mint()
		if err != nil {
			t.Fatal(err)
		}
		k.ForgetTokens()
		second, err := mint()
		if err != nil || second == first {
			t.Errorf("got %v and the same token: %t, want another", err, second == first)
		}
		if third, err := mint(); err != nil || third != second {
			t.Errorf("got %v and the same token: %t, want the cached one", err, third == second)
		}
		k.ForgetTokens()
		a.fail(errDown)
		if _, err := mint(); !errors.Is(err, errDown) {
			t.Errorf("got %v, want the server's error and no forgotten token", err)
		}
	})
}

// A failure is bridged with the cached token; a denial is an answer.
func TestKeeperServesNoTokenThatIsDeniedNow(t *testing.T) {
	inBubble(t, func(t *testing.T, a *authority, k *svid.Keeper, h svid.Holder, _ func()) {
		if _, err := k.JWT(t.Context(), h, entry("a"), []string{"x"}); err != nil {
			t.Fatal(err)
		}
		time.Sleep(160 * time.Second)
		a.fail(fmt.Errorf("by the rules: %w", svid.ErrDenied))
		if _, err := k.JWT(t.Context(), h, entry("a"), []string{"x"}); !errors.Is(err, svid.ErrDenied) {
			t.Errorf("got %v, want ErrDenied", err)
		}
	})
}
