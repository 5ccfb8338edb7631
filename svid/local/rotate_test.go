package local

import (
	"bytes"
	"context"
	"crypto"
	"crypto/x509"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"github.com/deputy-id/deputy/internal/durable"
	"github.com/deputy-id/deputy/svid"
	"github.com/deputy-id/deputy/svid/registry"
	"github.com/deputy-id/deputy/test/bubble"
)

// issued is an SVID of each kind, and when they end.
type issued struct {
	chain       []*x509.Certificate
	token, wit  svid.Token
	x509Expires time.Time
}

// Each event of a rotation has words of its own, and tells of the key that it is about.
func TestWhatTheLogSaysOfARotation(t *testing.T) {
	bubble.Test(t, func(t *testing.T) {
		var log bytes.Buffer
		a := open(t, Options{Log: hclog.New(&hclog.LoggerOptions{Output: &log, DisableTime: true})})
		begin := time.Now().UTC().Truncate(time.Second)
		at := func(d time.Duration) string { return begin.Add(d).Format(time.RFC3339) }
		first, sequence := a.state, a.state.Sequence
		line := func(message, kind string, sequence uint64, key, ends, more string) string {
			return fmt.Sprintf("[INFO]  %s: kind=%s sequence=%d key=%s ends=%s%s\n", message, kind, sequence, key, ends, more)
		}
		both := func(message string, sequence uint64, x, j *slot, ends, more string) string {
			return line(message, "X.509", sequence, x.ID, ends, more) + line(message, "JWT", sequence, j.ID, ends, more)
		}
		for _, step := range []struct {
			at   time.Duration
			want func() string
		}{
			{0, func() string {
				return both("first key made", sequence, first.X509.Active, first.JWT.Active, at(24*time.Hour), "")
			}},
			{6 * time.Hour, func() string { return "" }},
			{12 * time.Hour, func() string {
				return both("next key prepared", sequence+1, a.state.X509.Prepared, a.state.JWT.Prepared, at(36*time.Hour), " signs_from="+at(20*time.Hour))
			}},
			{20 * time.Hour, func() string {
				return both("next key signs", sequence+1, a.state.X509.Active, a.state.JWT.Active, at(36*time.Hour), "")
			}},
			{24 * time.Hour, func() string {
				next := both("next key prepared", sequence+2, a.state.X509.Prepared, a.state.JWT.Prepared, at(48*time.Hour), " signs_from="+at(32*time.Hour))
				gone := both("key dropped", sequence+2, first.X509.Active, first.JWT.Active, at(24*time.Hour), "")
				n, g := strings.SplitAfter(next, "\n"), strings.SplitAfter(gone, "\n")
				return n[0] + g[0] + n[1] + g[1]
			}},
		} {
			time.Sleep(time.Until(begin.Add(step.at)))
			if step.at > 0 {
				log.Reset()
			}
			if err := a.rotate(time.Now()); err != nil {
				t.Fatal(err)
			}
			if got, want := log.String(), step.want(); got != want {
				t.Errorf("after %s: got\n%swant\n%s", step.at, got, want)
			}
		}
	})
}

// Keys keep the life that they were made for; the configured one is the next's.
func TestAnotherCATTLCountsFromTheNextKeyOn(t *testing.T) {
	for _, c := range []struct{ ttl, prepared, signs time.Duration }{
		{20 * time.Minute, 23*time.Hour + 40*time.Minute + time.Second, 23*time.Hour + 59*time.Minute + 40*time.Second},
		{time.Hour, 23*time.Hour + time.Second, 23*time.Hour + 59*time.Minute},
		{13 * time.Hour, 12 * time.Hour, 20 * time.Hour},
		{48 * time.Hour, 12 * time.Hour, 20 * time.Hour},
	} {
		t.Run(c.ttl.String(), func(t *testing.T) {
			bubble.Test(t, func(t *testing.T) {
				dir := t.TempDir()
				first := open(t, Options{DataDir: dir, CATTL: 24 * time.Hour})
				begin, active := first.state.X509.Active.Created, first.state.X509.Active.ID
				first.Close()
				var log bytes.Buffer
				a := open(t, Options{DataDir: dir, CATTL: c.ttl, Log: hclog.New(&hclog.LoggerOptions{Output: &log})})
				ctx, cancel := context.WithCancel(t.Context())
				done := make(chan error)
				go func() { done <- a.Run(ctx) }()
				at := func(d time.Duration, prepared, signs bool) {
					t.Helper()
					time.Sleep(time.Until(begin.Add(d)))
					bubble.Wait()
					a.mu.Lock()
					x := a.state.X509
					a.mu.Unlock()
					if prepared != (x.Prepared != nil) || signs != (x.Active.ID != active) {
						t.Errorf("after %s: got prepared %t and another one that signs %t, want %t and %t", d, x.Prepared != nil, x.Active.ID != active, prepared, signs)
					}
				}
				at(c.prepared-2*time.Second, false, false)
				at(c.prepared+time.Second, true, false)
				at(c.signs-time.Second, true, false)
				cancel()
				<-done
				if strings.Contains(log.String(), "[WARN]") {
					t.Errorf("got warnings:\n%s", &log)
				}
				if err := a.rotate(begin.Add(c.signs + time.Second)); err != nil || a.state.X509.Active.ID == active {
					t.Errorf("after %s: got %v and the first key, want the next", c.signs, err)
				}
				if got := a.state.X509.Active.life(); got != c.ttl {
					t.Errorf("got a key that lives %s, want %s", got, c.ttl)
				}
			})
		})
	}
}

// At every moment of a week, what is alive verifies by the bundle of now and
// by every bundle that is not older than a third of the CA's life.
func TestRotationNeverLeavesALiveSVIDUnverifiable(t *testing.T) {
	for name, o := range map[string]Options{
		"usual": {CATTL: 24 * time.Hour, X509TTL: 4 * time.Hour, JWTTTL: 4 * time.Hour, WIT: true},
		"short": {CATTL: 6 * time.Hour, WIT: true},
	} {
		t.Run(name, func(t *testing.T) {
			bubble.Test(t, func(t *testing.T) {
				ctx, cancel := context.WithCancel(t.Context())
				a := open(t, o)
				ended := make(chan error)
				go func() { ended <- a.Run(ctx) }()
				key, err := svid.ECP256.Generate()
				if err != nil {
					t.Fatal(err)
				}
				id := spiffeid.RequireFromPath(td, "/agent/x")
				const every = 10 * time.Minute
				keep := int(a.o.CATTL / 3 / every) // bundles back
				var bundles []*svid.Bundle
				var live []issued
				cas, jwts, wits := map[string]bool{}, map[string]bool{}, map[string]bool{}
				for start := time.Now(); time.Since(start) < 7*24*time.Hour; time.Sleep(every) {
					bubble.Wait()
					bundles = append(bundles, bundleOf(a))
					bundles = bundles[max(0, len(bundles)-keep):]
					if n := len(bundles); n > 1 && bundles[n-1].Sequence < bundles[n-2].Sequence {
						t.Fatalf("sequence went from %d to %d", bundles[n-2].Sequence, bundles[n-1].Sequence)
					}
					chain, err := a.MintX509(id, key.Public(), nil, 0)
					if err != nil {
						t.Fatal(err)
					}
					tok, err := a.MintJWT(id, []string{"a"}, 0)
					if err != nil {
						t.Fatal(err)
					}
					wit, err := a.WIT(ctx, registry.Entry{SPIFFEID: id}, key.Public())
					if err != nil {
						t.Fatal(err)
					}
					if life := min(time.Until(chain[0].NotAfter), time.Until(wit.Expires)); life < a.o.X509TTL-time.Second {
						t.Fatalf("SVID is cut to %v", life)
					}
					if life := time.Until(tok.Expires); life < a.o.JWTTTL-time.Second {
						t.Fatalf("token is cut to %v", life)
					}
					live = append(live, issued{chain, tok, wit, chain[0].NotAfter})
					now := time.Now()
					live = slices.DeleteFunc(live, func(i issued) bool { return !i.x509Expires.After(now) && !i.token.Expires.After(now) })
					cas[string(chain[0].AuthorityKeyId)] = true
					if n := len(bundleOf(a).X509Authorities); n > 3 {
						t.Fatalf("bundle has %d authorities, want 3 at most", n)
					}
					// The oldest and the newest bundle, by the oldest and the
					// newest SVID: what lies between is between.
					for _, b := range []*svid.Bundle{bundles[0], bundles[len(bundles)-1]} {
						for _, i := range []issued{live[0], live[len(live)-1]} {
							if i.x509Expires.After(now) {
								if _, _, err := x509svid.Verify(i.chain, b.SPIFFE().X509Bundle()); err != nil {
									t.Fatalf("%v after start, bundle %d: %v", time.Since(start), b.Sequence, err)
								}
								bound, err := svid.ValidateWIT(i.wit.Compact, &svid.Bundles{Own: b})
								if err != nil {
									t.Fatalf("%v after start, bundle %d: %v", time.Since(start), b.Sequence, err)
								}
								wits[bound.Claims["jti"].(string)] = true
							}
							if i.token.Expires.After(now) {
								got, err := jwtsvid.ParseAndValidate(i.token.Compact, b.SPIFFE().JWTBundle(), []string{"a"})
								if err != nil {
									t.Fatalf("%v after start, bundle %d: %v", time.Since(start), b.Sequence, err)
								}
								jwts[got.Claims["jti"].(string)] = true
							}
						}
					}
				}
				if len(jwts) == 0 || len(wits) == 0 {
					t.Errorf("got %d tokens, %d WIT-SVIDs that were verified", len(jwts), len(wits))
				}
				if want := int(7 * 24 * time.Hour / a.o.CATTL); len(cas) < want {
					t.Errorf("got %d CAs in a week, want %d at least", len(cas), want)
				}
				cancel()
				if err := <-ended; !errors.Is(err, context.Canceled) {
					t.Errorf("got %v, want the context's end", err)
				}
			})
		})
	}
}

func TestRestartKeepsTheBundle(t *testing.T) {
	bubble.Test(t, func(t *testing.T) {
		dir := t.TempDir()
		a := open(t, Options{DataDir: dir})
		verify(t, a, bundleOf(a))
		before := bundleOf(a)
		if err := a.Close(); err != nil {
			t.Fatal(err)
		}
		info, err := os.Stat(filepath.Join(dir, stateFile))
		if err != nil || info.Mode().Perm() != 0o600 {
			t.Fatalf("got %v, %v, want mode 600", info.Mode(), err)
		}
		b := open(t, Options{DataDir: dir})
		if !bundleOf(b).Equal(before) {
			t.Error("bundle differs after a restart")
		}
		verify(t, b, before)
		b.Close()

		// Off until the next key should long have signed: what is prepared
		// late is published first.
		time.Sleep(23 * time.Hour)
		c := open(t, Options{DataDir: dir})
		if got := bundleOf(c); len(got.X509Authorities) != 2 || got.Sequence <= before.Sequence {
			t.Errorf("got %d authorities, sequence %d, want the next key published", len(got.X509Authorities), got.Sequence)
		}
		verify(t, c, before)
		c.Close()

		// Off until all has ended, if the clock is right: what is not sure of
		// that goes as soon as nothing that it signed can be alive.
		time.Sleep(30 * 24 * time.Hour)
		d := open(t, Options{DataDir: dir})
		verify(t, d, bundleOf(d))
		time.Sleep(4 * time.Hour)
		if err := d.rotate(time.Now()); err != nil {
			t.Fatal(err)
		}
		if got := bundleOf(d); len(got.X509Authorities) != 1 || got.Sequence <= before.Sequence+1 {
			t.Errorf("got %d authorities, sequence %d, want a new key alone", len(got.X509Authorities), got.Sequence)
		}
		verify(t, d, bundleOf(d))
	})
}

func TestPreparedKeyThatWaitedSignsAfterARestart(t *testing.T) {
	bubble.Test(t, func(t *testing.T) {
		dir := t.TempDir()
		a := open(t, Options{DataDir: dir})
		time.Sleep(12 * time.Hour)
		if err := a.rotate(time.Now()); err != nil {
			t.Fatal(err)
		}
		published := bundleOf(a)
		if n := len(published.X509Authorities); n != 2 {
			t.Fatalf("got %d authorities, want the prepared one too", n)
		}
		a.Close()
		time.Sleep(10 * time.Hour)
		b := open(t, Options{DataDir: dir})
		if !bundleOf(b).Equal(published) {
			t.Error("activation changed the bundle")
		}
		verify(t, b, published)
		if b.state.X509.Active.ID != a.state.X509.Prepared.ID || len(b.state.X509.Old) != 1 || b.state.X509.Old[0].key != nil {
			t.Error("the prepared key does not sign, or the old one is still there")
		}
	})
}

func TestMemoryLeavesNoKeyBehind(t *testing.T) {
	bubble.Test(t, func(t *testing.T) {
		dir := t.TempDir()
		a := open(t, Options{DataDir: dir, Memory: true})
		first := bundleOf(a)
		if err := a.SetFederated(&svid.Bundle{TrustDomain: spiffeid.RequireTrustDomainFromString("b.example"), Sequence: 7}); err != nil {
			t.Fatal(err)
		}
		a.Close()
		if _, err := os.Stat(filepath.Join(dir, stateFile)); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("got %v, want no file of keys", err)
		}
		time.Sleep(5 * time.Second)
		b := open(t, Options{DataDir: dir, Memory: true})
		if got := bundleOf(b); got.Sequence <= first.Sequence || got.X509Authorities[0].Equal(first.X509Authorities[0]) {
			t.Errorf("got sequence %d after %d, want higher, and another key", got.Sequence, first.Sequence)
		}
		if all, _ := b.Bundles(); len(all.Federated) != 1 {
			t.Errorf("got %d federated bundles, want the one that was stored", len(all.Federated))
		}
	})
}

// occupy makes the replacement of a file fail as a full disk would: by a
// directory in its place. It returns what undoes that.
func occupy(t *testing.T, path string) func() {
	t.Helper()
	aside := path + ".aside"
	if err := os.Rename(path, aside); err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(filepath.Join(path, "full"), 0o700); err != nil {
		t.Fatal(err)
	}
	return func() {
		if err := errors.Join(os.RemoveAll(path), os.Rename(aside, path)); err != nil {
			t.Fatal(err)
		}
	}
}

func TestKeyThatCannotBeStoredIsNeitherPublishedNorUsed(t *testing.T) {
	bubble.Test(t, func(t *testing.T) {
		dir := t.TempDir()
		a := open(t, Options{DataDir: dir})
		ctx, cancel := context.WithCancel(t.Context())
		ended := make(chan struct{})
		go func() { a.Run(ctx); close(ended) }()
		before := bundleOf(a)
		release := occupy(t, filepath.Join(dir, stateFile))
		time.Sleep(23*time.Hour + 30*time.Minute)
		if bundleOf(a) != before {
			t.Error("a bundle was published that is not stored")
		}
		verify(t, a, before)
		time.Sleep(31 * time.Minute)
		key, _ := svid.ECP256.Generate()
		if _, err := a.MintX509(spiffeid.RequireFromPath(td, "/x"), key.Public(), nil, 0); !errors.Is(err, svid.ErrNotReady) {
			t.Errorf("got %v after the last key's end, want ErrNotReady", err)
		}
		release()
		time.Sleep(retryMost)
		bubble.Wait()
		verify(t, a, bundleOf(a))
		if bundleOf(a).Sequence != before.Sequence+1 {
			t.Errorf("got sequence %d after %d, want the next", bundleOf(a).Sequence, before.Sequence)
		}
		cancel()
		<-ended
	})
}

func TestStartWithAFullDiskSignsWithTheKeysThereAre(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("NOT TESTED: needs root to make a file that cannot be replaced")
	}
	bubble.Test(t, func(t *testing.T) {
		dir := t.TempDir()
		a := open(t, Options{DataDir: dir})
		before := bundleOf(a)
		a.Close()
		time.Sleep(13 * time.Hour) // the next key is due
		if err := setImmutable(filepath.Join(dir, stateFile), true); err != nil {
			t.Skipf("NOT TESTED: file system has no immutable files: %v", err)
		}
		defer setImmutable(filepath.Join(dir, stateFile), false)
		b := open(t, Options{DataDir: dir})
		if !bundleOf(b).Equal(before) {
			t.Error("a bundle was published that is not stored")
		}
		verify(t, b, before)
	})
}

func TestCrashInTheMiddleOfAWriteIsCleanedUp(t *testing.T) {
	dir := t.TempDir()
	a := open(t, Options{DataDir: dir})
	before := bundleOf(a)
	a.Close()
	left := filepath.Join(dir, ".tmp-"+stateFile+"-123")
	if err := os.WriteFile(left, []byte(`{"format":1,"x5`), 0o600); err != nil {
		t.Fatal(err)
	}
	b := open(t, Options{DataDir: dir})
	if !bundleOf(b).Equal(before) {
		t.Error("bundle differs after a crash")
	}
	if _, err := os.Stat(left); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("got %v, want the unfinished file gone", err)
	}
}

func TestDamagedOrForeignFilesAreRefusedAndKept(t *testing.T) {
	for _, file := range []string{stateFile, federatedFile} {
		for name, damage := range map[string]func([]byte) []byte{
			"empty":         func([]byte) []byte { return nil },
			"cut":           func(b []byte) []byte { return b[:len(b)/2] },
			"tail":          func(b []byte) []byte { return append(b, "{}"...) },
			"unknown key":   func(b []byte) []byte { return append([]byte(`{"x":1,`), b[1:]...) },
			"later format":  func(b []byte) []byte { return []byte(strings.Replace(string(b), `"format": 1`, `"format": 2`, 1)) },
			"trust domain":  func(b []byte) []byte { return []byte(strings.ReplaceAll(string(b), "example.org", "example.com")) },
			"binary":        func(b []byte) []byte { return []byte("\x00\xff\x00") },
			"another value": func(b []byte) []byte { return []byte(strings.Replace(string(b), "MII", "MIJ", 1)) },
		} {
			t.Run(file+" "+name, func(t *testing.T) {
				dir := t.TempDir()
				a := open(t, Options{DataDir: dir})
				b := bundleOf(open(t, Options{TrustDomain: other}))
				if err := a.SetFederated(b); err != nil {
					t.Fatal(err)
				}
				a.Close()
				path := filepath.Join(dir, file)
				data, err := os.ReadFile(path)
				if err != nil {
					t.Fatal(err)
				}
				bad := damage(data)
				if err := os.WriteFile(path, bad, 0o600); err != nil {
					t.Fatal(err)
				}
				_, err = Open(t.Context(), Options{TrustDomain: td, DataDir: dir})
				if err == nil || !strings.Contains(err.Error(), path) {
					t.Fatalf("got %v, want an error that names %s", err, path)
				}
				if now, err := os.ReadFile(path); err != nil || string(now) != string(bad) {
					t.Error("the damaged file was written")
				}
			})
		}
	}
}

func TestSecondDaemonOnADirectoryIsRefused(t *testing.T) {
	dir := t.TempDir()
	open(t, Options{DataDir: dir})
	if _, err := Open(t.Context(), Options{TrustDomain: td, DataDir: dir}); !errors.Is(err, durable.ErrLocked) {
		t.Errorf("got %v, want ErrLocked", err)
	}
}

// The wall clock is what a step is given, so a step into the past is a clock
// that was set back.
func TestClockThatIsSetBackLosesNothing(t *testing.T) {
	for name, back := range map[string]time.Duration{"little": 30 * time.Minute, "much": 90 * 24 * time.Hour} {
		t.Run(name, func(t *testing.T) {
			a := open(t, Options{DataDir: t.TempDir()})
			before, was := bundleOf(a), a.state
			then := time.Now().Add(-back)
			for range 3 {
				if err := a.rotate(then); err != nil {
					t.Fatal(err)
				}
			}
			after := bundleOf(a)
			for _, c := range before.X509Authorities {
				if !slices.ContainsFunc(after.X509Authorities, c.Equal) {
					t.Error("an authority was lost")
				}
			}
			if !a.state.X509.Active.usable(then) || !a.state.JWT.Active.usable(then) {
				t.Error("nothing can sign")
			}
			switch same := a.state == was; {
			case same != (name == "little"):
				t.Errorf("got the same keys %v", same)
			case !same && after.Sequence != before.Sequence+1:
				t.Errorf("got sequence %d after %d, want the next", after.Sequence, before.Sequence)
			}
		})
	}
}

// A clock that is wrong for a while, also over a restart, puts other keys to
// use and takes none away: afterwards the first ones sign again.
func TestClockThatWasWrongForAWhileLosesNothing(t *testing.T) {
	const year = 365 * 24 * time.Hour
	for name, wrong := range map[string]time.Duration{"ahead": 10 * year, "behind": -50 * year, "a day ahead": 25 * time.Hour} {
		t.Run(name, func(t *testing.T) {
			o := Options{DataDir: t.TempDir()}
			a := open(t, o)
			// The next keys are prepared already, so that they are at stake too.
			now := time.Now().Add(13 * time.Hour)
			step := func(at time.Time) {
				t.Helper()
				if err := a.rotate(at); err != nil {
					t.Fatal(err)
				}
				if !a.state.X509.Active.usable(at.Round(0)) || !a.state.JWT.Active.usable(at.Round(0)) {
					t.Fatal("nothing can sign")
				}
			}
			step(now)
			before, was := bundleOf(a), a.state
			kept := func() {
				t.Helper()
				after := bundleOf(a)
				for _, c := range before.X509Authorities {
					if !slices.ContainsFunc(after.X509Authorities, c.Equal) {
						t.Error("an X.509 authority was lost")
					}
				}
				for id := range before.JWTAuthorities {
					if after.JWTAuthorities[id] == nil {
						t.Error("a JWT authority was lost")
					}
				}
			}
			for range 3 {
				step(now.Add(wrong))
				kept()
			}
			a.Close()
			a = open(t, o) // at the right time, near enough
			kept()
			step(now)
			kept()
			if got, want := a.state.X509.Active.ID, was.X509.Active.ID; got != want {
				t.Errorf("got CA %s, want %s as before", got, want)
			}
			if got, want := a.state.JWT.Active.ID, was.JWT.Active.ID; got != want {
				t.Errorf("got JWT key %s, want %s as before", got, want)
			}
			if got, want := a.state.X509.Prepared.ID, was.X509.Prepared.ID; got != want {
				t.Errorf("got prepared CA %s, want %s as before", got, want)
			}
			verify(t, a, bundleOf(a))
		})
	}
}

// What a clock that was wrong left behind goes when the monotonic clock says
// that it ended, too.
func TestKeysOfAWrongClockAreDropped(t *testing.T) {
	bubble.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		a := open(t, Options{})
		for _, wrong := range []time.Duration{10 * 365 * 24 * time.Hour, -10 * 365 * 24 * time.Hour, 0} {
			if err := a.rotate(time.Now().Add(wrong)); err != nil {
				t.Fatal(err)
			}
		}
		if got := len(bundleOf(a).X509Authorities); got != 3 {
			t.Fatalf("got %d authorities, want the first and those of the two wrong times", got)
		}
		ended := make(chan error)
		go func() { ended <- a.Run(ctx) }()
		time.Sleep(3 * 24 * time.Hour)
		bubble.Wait()
		for _, s := range append(a.state.X509.all(), a.state.JWT.all()...) {
			if d := time.Since(s.Created).Abs(); d > 2*24*time.Hour {
				t.Errorf("key of %s is still there at %s", s.Created, time.Now())
			}
		}
		cancel()
		<-ended
	})
}

func TestOptionsThatCannotBe(t *testing.T) {
	for name, o := range map[string]Options{
		"no trust domain":      {},
		"CA life too short":    {TrustDomain: td, CATTL: 29 * time.Second},
		"TTL over a sixth":     {TrustDomain: td, CATTL: time.Hour, X509TTL: 11 * time.Minute},
		"TTL too short":        {TrustDomain: td, JWTTTL: time.Second},
		"unknown key type":     {TrustDomain: td, KeyType: "ed25519"},
		"half an upstream":     {TrustDomain: td, Upstream: Upstream{Cert: "x"}},
		"directory is no path": {TrustDomain: td, DataDir: "/dev/null/x"},
	} {
		t.Run(name, func(t *testing.T) {
			if a, err := Open(t.Context(), o); err == nil {
				a.Close()
				t.Error("got no error, want one")
			}
		})
	}
}

// A follower that looks as often as it is told sees a new key at least three
// times before it signs.
func TestRefreshHintFitsTheRotation(t *testing.T) {
	for _, c := range []struct{ ttl, hint, want time.Duration }{
		{30 * time.Second, 0, 2 * time.Second},
		{time.Hour, 0, 4 * time.Minute},
		{24 * time.Hour, 0, 5 * time.Minute},
		{24 * time.Hour, time.Hour, time.Hour},
		{24 * time.Hour, 3 * time.Hour, 0},
		{24 * time.Hour, time.Millisecond, 0},
	} {
		a, err := Open(t.Context(), Options{TrustDomain: td, CATTL: c.ttl, RefreshHint: c.hint})
		if c.want == 0 {
			if err == nil {
				t.Errorf("CA life %s: hint of %s was taken", c.ttl, c.hint)
			}
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		got := bundleOf(a).RefreshHint
		ca := a.state.X509.Active
		made := ca.prepareAt(a.o.CATTL)
		early := ca.activateAt(&slot{Created: made, Expires: made.Add(a.o.CATTL)}).Sub(made)
		if got != c.want || early < 3*got {
			t.Errorf("CA life %s, hint %s: got %s, want %s; a new key is published for %s", c.ttl, c.hint, got, c.want, early)
		}
		a.Close()
	}
}

// Others take no bundle with a lower number than the last, so an authority whose
// directory was lost may not count from the start again.
func TestSequenceGrowsOverALostDirectory(t *testing.T) {
	bubble.Test(t, func(t *testing.T) {
		dir := t.TempDir()
		a := open(t, Options{DataDir: dir})
		before := bundleOf(a).Sequence
		a.Close()
		if err := os.Remove(filepath.Join(dir, stateFile)); err != nil {
			t.Fatal(err)
		}
		time.Sleep(2 * time.Second)
		a = open(t, Options{DataDir: dir})
		if got := bundleOf(a).Sequence; got <= before {
			t.Errorf("got %d after %d, want more", got, before)
		}
	})
}

func TestTTLIsCutToWhatTheAuthorityAllows(t *testing.T) {
	a := open(t, Options{CATTL: time.Hour})
	key, err := svid.ECP256.Generate()
	if err != nil {
		t.Fatal(err)
	}
	for ask, want := range map[time.Duration]time.Duration{
		0: 10 * time.Minute, time.Second: 5 * time.Second, time.Minute: time.Minute, 24 * time.Hour: 10 * time.Minute,
	} {
		chain, err := a.MintX509(spiffeid.RequireFromPath(td, "/x"), key.Public(), nil, ask)
		if err != nil {
			t.Fatal(err)
		}
		if got := time.Until(chain[0].NotAfter); got > want || got < want-2*time.Second {
			t.Errorf("asked for %v: got %v, want %v", ask, got, want)
		}
	}
}

func TestFederatedBundles(t *testing.T) {
	dir := t.TempDir()
	a := open(t, Options{DataDir: dir})
	own := bundleOf(a)
	_, stale := a.Bundles()
	b := bundleOf(open(t, Options{TrustDomain: other}))
	if err := a.SetFederated(b); err != nil {
		t.Fatal(err)
	}
	<-stale
	if bundleOf(a) != own {
		t.Error("our own bundle changed")
	}
	if err := a.SetFederated(&svid.Bundle{TrustDomain: td}); !errors.Is(err, ErrOwnTrustDomain) {
		t.Errorf("got %v, want ErrOwnTrustDomain", err)
	}
	release := occupy(t, filepath.Join(dir, federatedFile))
	if err := a.DeleteFederated(other); err == nil {
		t.Error("got no error, want one of the disk")
	}
	if all, _ := a.Bundles(); all.Federated[other] != b {
		t.Error("a change was published that is not stored")
	}
	release()
	a.Close()
	a = open(t, Options{DataDir: dir})
	if all, _ := a.Bundles(); !all.Federated[other].Equal(b) {
		t.Errorf("got %+v after a restart, want %+v", all.Federated[other], b)
	}
	if err := a.DeleteFederated(other); err != nil {
		t.Fatal(err)
	}
	if err := a.DeleteFederated(other); !errors.Is(err, ErrNotFederated) {
		t.Errorf("got %v, want ErrNotFederated", err)
	}
}

// Nothing makes our own bundle another trust domain's, whichever of our keys it
// has; a root that we only hang under is not ours.
func TestOwnBundleIsNoOtherTrustDomains(t *testing.T) {
	p := newPKI(t, nil)
	a := open(t, Options{WIT: true})
	before := open(t, Options{})
	own, theirs := bundleOf(a), bundleOf(open(t, Options{TrustDomain: other, WIT: true}))
	for _, c := range []struct {
		name string
		set  *svid.Bundle
		ours bool
	}{
		{name: "another's", set: theirs},
		{name: "ours", set: own, ours: true},
		{name: "our CA alone", set: &svid.Bundle{X509Authorities: own.X509Authorities}, ours: true},
		{name: "our CA among theirs", set: &svid.Bundle{X509Authorities: slices.Concat(theirs.X509Authorities, own.X509Authorities)}, ours: true},
		{name: "a CA that was ours", set: &svid.Bundle{X509Authorities: bundleOf(before).X509Authorities}, ours: true},
		{name: "our JWT keys alone", set: &svid.Bundle{JWTAuthorities: own.JWTAuthorities}, ours: true},
		{name: "our WIT keys as JWT keys", set: &svid.Bundle{JWTAuthorities: own.WITAuthorities}, ours: true},
		{name: "no keys", set: &svid.Bundle{}},
		{name: "a stranger's root", set: &svid.Bundle{X509Authorities: []*x509.Certificate{p.root}}},
	} {
		t.Run(c.name, func(t *testing.T) {
			b := &svid.Bundle{TrustDomain: other, X509Authorities: c.set.X509Authorities, JWTAuthorities: c.set.JWTAuthorities, WITAuthorities: c.set.WITAuthorities}
			had, _ := a.Bundles()
			err := a.SetFederated(b)
			if got := errors.Is(err, svid.ErrOurs); got != c.ours || !c.ours && err != nil {
				t.Fatalf("got %v, want refused: %t", err, c.ours)
			}
			now, _ := a.Bundles()
			if c.ours && now.Federated[other] != had.Federated[other] || !c.ours && now.Federated[other] != b {
				t.Errorf("got %+v in force", now.Federated[other])
			}
		})
	}
}

// Trust domains may hang under one root, which makes neither bundle the other's.
func TestRootOfSeveralTrustDomainsIsNobodysOwn(t *testing.T) {
	p := newPKI(t, nil)
	var log bytes.Buffer
	a := open(t, Options{Upstream: p.files, Log: hclog.New(&hclog.LoggerOptions{Output: &log})})
	theirs := bundleOf(open(t, Options{TrustDomain: other, Upstream: p.files}))
	if err := a.SetFederated(theirs); err != nil {
		t.Fatal(err)
	}
	if want := "shares an X.509 authority with ours"; !strings.Contains(log.String(), want) {
		t.Errorf("got log %q, want %q", &log, want)
	}
	own := bundleOf(a)
	if err := a.SetFederated(&svid.Bundle{TrustDomain: other, X509Authorities: own.X509Authorities, JWTAuthorities: own.JWTAuthorities}); !errors.Is(err, svid.ErrOurs) {
		t.Errorf("our bundle under that root: got %v, want ErrOurs", err)
	}
}

func FuzzDecodeState(f *testing.F) {
	a := open(f, Options{CATTL: time.Hour, WIT: true})
	for _, at := range []time.Duration{0, 31 * time.Minute, 51 * time.Minute} {
		if err := a.rotate(time.Now().Add(at)); err != nil {
			f.Fatal(err)
		}
		data, err := a.state.encode(td)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(data)
	}
	off := open(f, Options{CATTL: time.Hour})
	data, err := off.state.encode(td)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(data)
	f.Add([]byte(`{"format":1,"trust_domain":"example.org","sequence":1,"x509":{"active":{}},"jwt":{"active":null}}`))
	f.Add([]byte(strings.Replace(string(data), `"jwt":`, `"wit":{"active":null,"old":[]},"jwt":`, 1)))
	f.Fuzz(func(t *testing.T, data []byte) {
		s, err := decodeState(data, td)
		if err != nil {
			return
		}
		// What is accepted must be usable and survive being written.
		again, err := s.encode(td)
		if err != nil {
			t.Fatal(err)
		}
		if s2, err := decodeState(again, td); err != nil || !s2.equal(s) {
			t.Errorf("got %v after a round trip", err)
		}
		s.next(time.Now(), time.Hour)
	})
}

// Who changes a bundle knows the one that is changed.
func TestFederatedBundlesAreUpdatedOneAfterTheOther(t *testing.T) {
	a := open(t, Options{DataDir: t.TempDir()})
	other := spiffeid.RequireTrustDomainFromString("b.example")
	const n = 16
	var all sync.WaitGroup
	for range n {
		all.Go(func() {
			err := a.UpdateFederated(other, func(had *svid.Bundle) (*svid.Bundle, error) {
				next := &svid.Bundle{TrustDomain: other, Sequence: 1}
				if had != nil {
					next.Sequence = had.Sequence + 1
				}
				return next, nil
			})
			if err != nil {
				t.Error(err)
			}
		})
	}
	all.Wait()
	bundles, stale := a.Bundles()
	had := bundles.Federated[other]
	if had.Sequence != n {
		t.Errorf("got %d updates in force, want %d", had.Sequence, n)
	}
	refused := errors.New("refused")
	for _, next := range []func(*svid.Bundle) (*svid.Bundle, error){
		func(had *svid.Bundle) (*svid.Bundle, error) { return had, nil },
		func(*svid.Bundle) (*svid.Bundle, error) { return nil, refused },
	} {
		if err := a.UpdateFederated(other, next); err != nil && !errors.Is(err, refused) {
			t.Error(err)
		}
	}
	select {
	case <-stale:
		t.Error("something was published although nothing changed")
	default:
	}
	if err := a.UpdateFederated(td, nil); !errors.Is(err, ErrOwnTrustDomain) {
		t.Errorf("got %v, want ErrOwnTrustDomain", err)
	}
}

func FuzzDecodeFederated(f *testing.F) {
	f.Add([]byte(`{"format":1,"trust_domain":"example.org","trust_domains":{"b.example":{"keys":[],"spiffe_sequence":1}}}`))
	f.Add([]byte(`{"format":1,"trust_domain":"example.org","trust_domains":{"b.example":null}}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		m, err := decodeFederated(data, td)
		if err != nil {
			return
		}
		if _, err := encodeFederated(m, td); err != nil {
			t.Fatal(err)
		}
	})
}

// What is stored can be read again, or the next start would fail.
func TestBundlesThatAreTooLargeTogetherAreRefused(t *testing.T) {
	dir := t.TempDir()
	a := open(t, Options{DataDir: dir})
	ca := bundleOf(open(t, Options{TrustDomain: other})).X509Authorities[0]
	var err error
	for i := 0; i < 10 && err == nil; i++ {
		err = a.SetFederated(&svid.Bundle{
			TrustDomain:     spiffeid.RequireTrustDomainFromString(fmt.Sprintf("td%d.example", i)),
			JWTAuthorities:  map[string]crypto.PublicKey{strings.Repeat("k", maxFile/4): ca.PublicKey},
			X509Authorities: []*x509.Certificate{ca},
		})
	}
	if err == nil {
		t.Error("got no error, want one of the size")
	}
	a.Close()
	open(t, Options{DataDir: dir})
}

func TestKeyThatWasPreparedLateSignsBeforeTheOldOneEnds(t *testing.T) {
	bubble.Test(t, func(t *testing.T) {
		a := open(t, Options{})
		first := a.state.X509.Active.ID
		time.Sleep(23 * time.Hour)
		for _, step := range []struct {
			wait time.Duration
			same bool
		}{{0, true}, {35 * time.Minute, true}, {2 * time.Minute, false}} {
			time.Sleep(step.wait)
			if err := a.rotate(time.Now()); err != nil {
				t.Fatal(err)
			}
			if got := a.state.X509.Active.ID == first; got != step.same {
				t.Errorf("%v later: got the old key %v, want %v", step.wait, got, step.same)
			}
		}
	})
}
