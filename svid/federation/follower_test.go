package federation

import (
	"context"
	"crypto"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/deputy-id/deputy/svid"
	"github.com/deputy-id/deputy/test/bubble"
)

// A scene is a follower of one trust domain in a bubble.
type scene struct {
	*Follower
	net    *network
	store  *memory
	log    *record
	web    *ca
	server *ca // of theirs
	r      Relationship

	mu     sync.Mutex
	answer http.HandlerFunc
	at     []time.Time // when it was asked
}

// inScene runs a test with a follower that runs; by is the profile.
func inScene(t *testing.T, had []*svid.Bundle, test func(t *testing.T, s *scene)) {
	bubble.Test(t, func(t *testing.T) {
		s := &scene{net: newNetwork(), log: &record{}, web: newCA(t), server: newCA(t)}
		s.store = newMemory(bundle(t, ours, 1, 0, newCA(t)), had...)
		s.Follower = NewFollower(s.store, s.log.log())
		s.Follower.dial = s.net.dial
		s.r = Relationship{TrustDomain: theirs, URL: "https://theirs.example/", Roots: s.web.file(t)}
		s.come(t)
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		done := make(chan error, 1)
		go func() { done <- s.Run(ctx) }()
		test(t, s)
		cancel()
		if err := <-done; !errors.Is(err, context.Canceled) {
			t.Errorf("Run: got %v, want what the context says", err)
		}
	})
}

// come puts the host on the network.
func (s *scene) come(t *testing.T) {
	s.net.serve(t, "theirs.example", s.web.server(t, "theirs.example"), func(w http.ResponseWriter, r *http.Request) {
		s.mu.Lock()
		s.at = append(s.at, time.Now())
		h := s.answer
		s.mu.Unlock()
		h(w, r)
	})
}

func (s *scene) set(h http.HandlerFunc) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.answer = h
}

func (s *scene) asked() []time.Time {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.at)
}

func (s *scene) status(t *testing.T) Status {
	t.Helper()
	all := s.Relationships()
	if len(all) != 1 {
		t.Fatalf("got %d relationships, want one", len(all))
	}
	return all[0]
}

func failing(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusInternalServerError) }

// The hint says how often, within bounds; none is never asked later than it says.
func TestPollsByTheRefreshHint(t *testing.T) {
	for _, c := range []struct{ hint, most time.Duration }{
		{time.Minute, time.Minute},
		{2 * time.Second, 2 * time.Second},
		{0, 5 * time.Minute},
		{-time.Second, 5 * time.Minute},
		{time.Second / 2, time.Second},
		{28 * 24 * time.Hour, time.Hour},
	} {
		t.Run(c.hint.String(), func(t *testing.T) {
			inScene(t, nil, func(t *testing.T, s *scene) {
				b := bundle(t, theirs, 4, max(c.hint, 0), s.server)
				s.set(fixed(t, b))
				data, err := b.Marshal()
				if err != nil {
					t.Fatal(err)
				}
				there, err := svid.ParseBundle(theirs, data)
				if err != nil {
					t.Fatal(err)
				}
				s.store.SetFederated(there)
				s.Follow([]Relationship{s.r})
				time.Sleep(20 * c.most)
				at := s.asked()
				if len(at) < 20 || len(at) > 24 {
					t.Errorf("asked %d times in 20 intervals of %s", len(at), c.most)
				}
				even := true
				for i := range at[1:] {
					gap := at[i+1].Sub(at[i])
					if gap > c.most || gap < c.most*9/10-time.Millisecond {
						t.Errorf("asked again after %s, want from nine tenths of %s to all", gap, c.most)
					}
					even = even && gap == at[1].Sub(at[0])
				}
				if even {
					t.Error("asked at even intervals, with all other followers")
				}
				if s.store.sets != 1 {
					t.Errorf("stored %d times what did not change", s.store.sets-1)
				}
			})
		})
	}
}

// What is fetched takes the place of what there is, or does not.
func TestWhatIsTaken(t *testing.T) {
	a, b := newCA(t), newCA(t)
	had := bundle(t, theirs, 7, time.Minute, a, b)
	fewer := &svid.Bundle{TrustDomain: theirs, Sequence: 8, X509Authorities: had.X509Authorities[:1]}
	mine := bundle(t, ours, 1, 0, newCA(t))
	withOurKey := bundle(t, theirs, 9, 0, a)
	withOurKey.JWTAuthorities = map[string]crypto.PublicKey{"other-name": mine.JWTAuthorities["key"]}
	thirds := bundle(t, third, 1, 0, newCA(t))
	for _, c := range []struct {
		name string
		got  *svid.Bundle
		want error
		logs string // "": nothing but that it was followed
	}{
		{name: "the first", got: had},
		{name: "fewer keys", got: fewer, logs: "gone=2"},
		{name: "no keys at all", got: &svid.Bundle{TrustDomain: theirs, Sequence: 8}, logs: "[WARN]  bundle is empty"},
		{name: "only another hint", got: &svid.Bundle{TrustDomain: theirs, Sequence: 7, RefreshHint: time.Hour, X509Authorities: had.X509Authorities, JWTAuthorities: had.JWTAuthorities}},
		{name: "other keys under the same number", got: without(had, 7), logs: "same sequence number"},
		{name: "other keys without a number", got: without(had, 0)},
		{name: "an older number", got: without(had, 6), want: ErrOlder},
		{name: "an older number and no keys", got: &svid.Bundle{TrustDomain: theirs, Sequence: 6}, want: ErrOlder},
		{name: "our own bundle", got: &svid.Bundle{TrustDomain: theirs, Sequence: 9, X509Authorities: mine.X509Authorities, JWTAuthorities: mine.JWTAuthorities}, want: svid.ErrOurs},
		{name: "a JWT key of ours under another name", got: withOurKey, want: svid.ErrOurs},
		{name: "a JWT key of ours for WIT-SVIDs", got: &svid.Bundle{TrustDomain: theirs, Sequence: 9, X509Authorities: had.X509Authorities, WITAuthorities: mine.JWTAuthorities}, want: svid.ErrOurs},
		{name: "WIT keys alone", got: &svid.Bundle{TrustDomain: theirs, Sequence: 9, WITAuthorities: thirds.JWTAuthorities}, logs: "[INFO]  bundle followed"},
		{name: "a WIT key more under the same number", got: &svid.Bundle{TrustDomain: theirs, Sequence: 7, X509Authorities: had.X509Authorities, JWTAuthorities: had.JWTAuthorities, WITAuthorities: thirds.JWTAuthorities}, logs: "same sequence number"},
		{name: "a root of ours", got: &svid.Bundle{TrustDomain: theirs, Sequence: 9, X509Authorities: mine.X509Authorities}},
		{name: "a third's keys", got: &svid.Bundle{TrustDomain: theirs, Sequence: 9, X509Authorities: thirds.X509Authorities, JWTAuthorities: thirds.JWTAuthorities}},
	} {
		t.Run(c.name, func(t *testing.T) {
			m := newMemory(mine, thirds)
			if c.name != "the first" {
				m = newMemory(mine, had, thirds)
			}
			log := &record{}
			f := NewFollower(m, log.log())
			f.Follow([]Relationship{{TrustDomain: theirs}})
			before := m.of(theirs)
			changed, err := f.take(t.Context(), f.tracks[theirs], c.got)
			if !errors.Is(err, c.want) || c.want == nil && err != nil {
				t.Fatalf("got %v, want %v", err, c.want)
			}
			if changed != (c.want == nil) {
				t.Errorf("got changed: %t", changed)
			}
			want := c.got
			if c.want != nil {
				want = before
			}
			if got := m.of(theirs); got != want {
				t.Errorf("got %+v in force, want %+v", got, want)
			}
			if m.of(third) != thirds {
				t.Error("another trust domain's bundle changed")
			}
			if all, _ := m.Bundles(); all.Own != mine {
				t.Error("our own bundle changed")
			}
			if got := log.String(); !strings.Contains(got, c.logs) || c.logs == "" && strings.Contains(got, "[WARN]") {
				t.Errorf("got log %q, want %q in it", got, c.logs)
			}
		})
	}
}

// What an operator sets while a bundle is on its way is what that is held
// against.
func TestAnOperatorIsNotOvertaken(t *testing.T) {
	had := bundle(t, theirs, 7, time.Minute, newCA(t))
	revoked := &svid.Bundle{TrustDomain: theirs, Sequence: 100}
	m := newMemory(bundle(t, ours, 1, 0, newCA(t)), had)
	f := NewFollower(m, (&record{}).log())
	f.Follow([]Relationship{{TrustDomain: theirs}})
	m.first = func() { m.SetFederated(revoked) }
	if changed, err := f.take(t.Context(), f.tracks[theirs], without(had, 8)); changed || !errors.Is(err, ErrOlder) {
		t.Errorf("got %t, %v, want %v", changed, err, ErrOlder)
	}
	if got := m.of(theirs); got != revoked {
		t.Errorf("got sequence %d in force, want what the operator set", got.Sequence)
	}

	m = newMemory(bundle(t, ours, 1, 0, newCA(t)))
	f = NewFollower(m, (&record{}).log())
	f.Follow([]Relationship{{TrustDomain: theirs, Bootstrap: had}})
	m.first = func() { m.SetFederated(revoked) }
	f.bootstrap(f.tracks[theirs])
	if got := m.of(theirs); got != revoked {
		t.Errorf("got sequence %d in force, want what the operator set before the bootstrap bundle", got.Sequence)
	}
}

func TestABundleThatIsNotStoredIsNotInForce(t *testing.T) {
	inScene(t, nil, func(t *testing.T, s *scene) {
		s.store.fails = errors.New("disk full")
		s.set(fixed(t, bundle(t, theirs, 4, time.Minute, s.server)))
		s.Follow([]Relationship{s.r})
		time.Sleep(time.Second)
		if st := s.status(t); st.Err == nil || !strings.Contains(st.Err.Error(), "disk full") || st.Bundle != nil {
			t.Errorf("got %+v, want the disk's error and no bundle", st)
		}
		s.store.mu.Lock()
		s.store.fails = nil
		s.store.mu.Unlock()
		time.Sleep(retryFirst)
		if st := s.status(t); st.Err != nil || st.Bundle == nil {
			t.Errorf("got %+v, want the bundle", st)
		}
	})
}

// Before the first bundle it is tried again soon; afterwards at the next turn.
func TestAfterAFailure(t *testing.T) {
	inScene(t, nil, func(t *testing.T, s *scene) {
		s.set(failing)
		s.Follow([]Relationship{s.r})
		time.Sleep(36 * time.Second) // 0, 5, 15, 35
		if got := len(s.asked()); got != 4 {
			t.Errorf("asked %d times in the first 36 s, want 4", got)
		}
		b := bundle(t, theirs, 4, time.Minute, s.server)
		s.set(fixed(t, b))
		time.Sleep(40 * time.Second)
		if st := s.status(t); st.Err != nil || st.Failures != 0 || !st.Bundle.Equal(b) || time.Since(st.Fetched) > 40*time.Second {
			t.Fatalf("got %+v, want the bundle", st)
		}
		s.set(failing)
		before := len(s.asked())
		time.Sleep(10 * time.Minute)
		if got := len(s.asked()) - before; got < 10 || got > 12 {
			t.Errorf("asked %d times in 10 min of failures, want once a minute", got)
		}
		st := s.status(t)
		if !st.Bundle.Equal(b) || !st.Stale || st.Err == nil || st.Next.Before(time.Now()) || time.Until(st.Next) > time.Minute {
			t.Errorf("got %+v, want the last good bundle, stale", st)
		}
	})
}

// A stale bundle is reported ever more rarely and, once it may lack keys, as an error.
func TestUrgencyGrows(t *testing.T) {
	inScene(t, nil, func(t *testing.T, s *scene) {
		s.set(fixed(t, bundle(t, theirs, 4, time.Minute, s.server)))
		s.r.URL += "?token=secret"
		s.Follow([]Relationship{s.r})
		time.Sleep(time.Second)
		s.set(failing)
		lines := func(level string) (n int) {
			for line := range strings.Lines(s.log.String()) {
				if strings.Contains(line, level) {
					n++
				}
			}
			return n
		}
		time.Sleep(4*time.Minute - 10*time.Second)
		if lines("[WARN]") == 0 || lines("[ERROR]") > 0 {
			t.Errorf("within five turns: got\n%s\nwant warnings alone", s.log)
		}
		time.Sleep(90 * time.Second)
		if lines("[ERROR]") != 1 || !strings.Contains(s.log.String(), "https://theirs.example/") || !strings.Contains(s.log.String(), "x509_authorities_end=") {
			t.Errorf("after five turns: got\n%s\nwant an error with the URL", s.log)
		}
		time.Sleep(1000 * time.Minute)
		if n := lines("[ERROR]"); n < 7 || n > 9 {
			t.Errorf("got %d errors in a thousand turns, want one at each doubling", n)
		}
		if strings.Contains(s.log.String(), "secret") {
			t.Errorf("the log has the query of the URL:\n%s", s.log)
		}
		s.set(fixed(t, bundle(t, theirs, 5, time.Minute, s.server)))
		time.Sleep(time.Minute)
		if !strings.Contains(s.log.String(), "answers again") {
			t.Errorf("got\n%s\nwant a word that it is over", s.log)
		}
	})
}

// There is no last good bundle at first.
func TestTheWrongServerAtFirst(t *testing.T) {
	inScene(t, nil, func(t *testing.T, s *scene) {
		s.net.serve(t, "theirs.example", newCA(t).server(t, "theirs.example"), fixed(t, bundle(t, theirs, 9, time.Minute, newCA(t))))
		s.Follow([]Relationship{s.r})
		time.Sleep(time.Second)
		if log := s.log.String(); !strings.Contains(log, "[ERROR] bundle endpoint is not believed, and there is no bundle yet: ") {
			t.Errorf("got\n%s\nwant an error that says so", log)
		}
	})
}

func TestTheWrongServerIsAnErrorAtOnce(t *testing.T) {
	inScene(t, nil, func(t *testing.T, s *scene) {
		b := bundle(t, theirs, 4, time.Minute, s.server)
		s.set(fixed(t, b))
		s.Follow([]Relationship{s.r})
		time.Sleep(time.Second)
		s.net.serve(t, "theirs.example", newCA(t).server(t, "theirs.example"), fixed(t, bundle(t, theirs, 9, time.Minute, newCA(t))))
		time.Sleep(time.Minute)
		st := s.status(t)
		if !errors.Is(st.Err, ErrWrongServer) || !st.Bundle.Equal(b) {
			t.Errorf("got %+v, want the last good bundle and ErrWrongServer", st)
		}
		if log := s.log.String(); !strings.Contains(log, "[ERROR] bundle endpoint is not believed, the last good bundle stays: ") || !strings.Contains(log, "url=https://theirs.example/") {
			t.Errorf("got\n%s\nwant an error that names the URL", log)
		}
	})
}

// A follower of a server with an X509-SVID keeps up with its CAs: each bundle
// verifies the server that brings the next.
func TestFollowsARotatingServer(t *testing.T) {
	inScene(t, nil, func(t *testing.T, s *scene) {
		const id = "spiffe://theirs.example/spire/server"
		signing, next := s.server, newCA(t)
		current := bundle(t, theirs, 1, time.Minute, signing)
		first := current
		var mu sync.Mutex
		s.net.serve(t, "theirs.example", signing.server(t, id), answer(t, func() *svid.Bundle { mu.Lock(); defer mu.Unlock(); return current }))
		s.Follow([]Relationship{{TrustDomain: theirs, URL: "https://theirs.example", EndpointID: spiffeid.RequireFromString(id), Bootstrap: first}})
		time.Sleep(time.Second)
		for turn := range uint64(5) {
			mu.Lock()
			current = bundle(t, theirs, 2*turn+2, time.Minute, signing, next) // announced
			mu.Unlock()
			time.Sleep(3 * time.Minute)
			mu.Lock()
			current = bundle(t, theirs, 2*turn+3, time.Minute, next) // signs, the old one is gone
			want := current
			mu.Unlock()
			s.net.serve(t, "theirs.example", next.server(t, id), answer(t, func() *svid.Bundle { mu.Lock(); defer mu.Unlock(); return current }))
			time.Sleep(3 * time.Minute)
			if st := s.status(t); st.Err != nil || !st.Bundle.Equal(want) {
				t.Fatalf("turn %d: got %+v, want the new CA's bundle", turn, st)
			}
			signing, next = next, newCA(t)
		}
		// A restart begins with what is stored, not with the file of long ago.
		stored := s.store.of(theirs)
		f := NewFollower(s.store, s.log.log())
		f.Follow([]Relationship{{TrustDomain: theirs, Bootstrap: first}})
		f.bootstrap(f.tracks[theirs])
		if s.store.of(theirs) != stored {
			t.Error("the bootstrap bundle took the place of the one that was stored")
		}
	})
}

// A bundle that trusts nobody is not undone by the file that was there at first.
func TestBootstrapUndoesNoRevocation(t *testing.T) {
	const id = "spiffe://theirs.example/spire/server"
	empty := &svid.Bundle{TrustDomain: theirs, Sequence: 9}
	inScene(t, []*svid.Bundle{empty}, func(t *testing.T, s *scene) {
		s.net.serve(t, "theirs.example", s.server.server(t, id), fixed(t, bundle(t, theirs, 10, 0, s.server)))
		s.Follow([]Relationship{{TrustDomain: theirs, URL: "https://theirs.example", EndpointID: spiffeid.RequireFromString(id), Bootstrap: bundle(t, theirs, 1, 0, s.server)}})
		time.Sleep(time.Minute)
		if st := s.status(t); !errors.Is(st.Err, ErrNoTrust) || st.Bundle != empty {
			t.Errorf("got %+v, want the empty bundle and ErrNoTrust", st)
		}
		// An operator says what is right; it is fetched at once.
		if err := s.store.SetFederated(bundle(t, theirs, 9, 0, s.server)); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Second)
		if st := s.status(t); st.Err != nil || st.Bundle.Sequence != 10 {
			t.Errorf("got %+v, want the bundle of the endpoint", st)
		}
	})
}

// A mirror of a third trust domain can be verified once that one's bundle is there.
func TestAMirrorWaitsForItsOwnTrustDomain(t *testing.T) {
	inScene(t, nil, func(t *testing.T, s *scene) {
		thirds := newCA(t)
		const id = "spiffe://third.example/mirror"
		s.net.serve(t, "theirs.example", thirds.server(t, id), fixed(t, bundle(t, theirs, 1, 0, s.server)))
		s.Follow([]Relationship{{TrustDomain: theirs, URL: "https://theirs.example", EndpointID: spiffeid.RequireFromString(id)}})
		time.Sleep(time.Hour + time.Second)
		if st := s.status(t); !errors.Is(st.Err, ErrNoTrust) {
			t.Fatalf("got %+v, want ErrNoTrust", st)
		}
		if log := s.log.String(); !strings.Contains(log, "[ERROR] bundle endpoint cannot be verified: ") || !strings.Contains(log, "deputy bundle set third.example") || strings.Contains(log, "last good") {
			t.Errorf("got\n%s\nwant it said what to do, and nothing of a bundle that is not there", log)
		}
		if err := s.store.SetFederated(bundle(t, third, 1, 0, thirds)); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Millisecond)
		if st := s.status(t); st.Err != nil || st.Bundle == nil {
			t.Errorf("got %+v, want the bundle at once", st)
		}
	})
}

func TestRefresh(t *testing.T) {
	inScene(t, nil, func(t *testing.T, s *scene) {
		s.set(fixed(t, bundle(t, theirs, 4, time.Hour, s.server)))
		s.Follow([]Relationship{s.r})
		time.Sleep(time.Minute)
		next := bundle(t, theirs, 5, time.Hour, newCA(t))
		s.set(fixed(t, next))
		if err := s.Refresh(t.Context(), theirs); err != nil || !s.store.of(theirs).Equal(next) {
			t.Errorf("got %v and %+v, want the new bundle", err, s.store.of(theirs))
		}
		s.set(failing)
		if err := s.Refresh(t.Context(), theirs); err == nil || !strings.Contains(err.Error(), "500") {
			t.Errorf("got %v, want the endpoint's answer", err)
		}
		if err := s.Refresh(t.Context(), third); !errors.Is(err, ErrNotFollowed) {
			t.Errorf("got %v, want ErrNotFollowed", err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		s.set(func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() })
		if err := s.Refresh(ctx, theirs); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("got %v, want the caller's own deadline", err)
		}
	})
}

// Relationships come, change and go while others go on.
func TestFollowIsReloaded(t *testing.T) {
	inScene(t, nil, func(t *testing.T, s *scene) {
		s.set(fixed(t, bundle(t, theirs, 4, time.Minute, s.server)))
		var thirds atomic.Int64
		s.net.serve(t, "third.example", s.web.server(t, "third.example"), func(w http.ResponseWriter, r *http.Request) {
			thirds.Add(1)
			w.Write([]byte(`{"keys":[],"spiffe_refresh_hint":60}`))
		})
		other := Relationship{TrustDomain: third, URL: "https://third.example/", Roots: s.r.Roots}
		s.Follow([]Relationship{s.r})
		time.Sleep(10 * time.Minute)
		if got, n := s.status(t), len(s.asked()); n < 10 || got.Err != nil {
			t.Fatalf("asked %d times, %+v", n, got)
		}
		before := len(s.asked())
		s.Follow([]Relationship{other, s.r})
		time.Sleep(10 * time.Second)
		if len(s.asked()) > before+1 || thirds.Load() != 1 || len(s.Relationships()) != 2 {
			t.Errorf("one more: asked %d times more, %d times the new one", len(s.asked())-before, thirds.Load())
		}
		// In flight when it ends: what comes is not stored.
		held := make(chan struct{})
		s.set(func(w http.ResponseWriter, r *http.Request) {
			<-held
			fixed(t, bundle(t, theirs, 99, time.Minute, s.server))(w, r)
		})
		time.Sleep(time.Minute)
		s.Follow([]Relationship{other})
		close(held)
		time.Sleep(10 * time.Minute)
		if b := s.store.of(theirs); b == nil || b.Sequence != 4 {
			t.Errorf("got %+v, want the last bundle while it was followed", b)
		}
		if s.Follows(theirs) || !s.Follows(third) || thirds.Load() < 10 {
			t.Errorf("got %d fetches of the one that stayed", thirds.Load())
		}
		if !strings.Contains(s.log.String(), "no longer followed") {
			t.Errorf("got\n%s\nwant a warning of the bundle that stays", s.log)
		}
	})
}

// One that hangs and one that floods take nothing from the others.
func TestOthersAreNotDisturbed(t *testing.T) {
	inScene(t, nil, func(t *testing.T, s *scene) {
		var all []Relationship
		for i := range 20 {
			td := spiffeid.RequireTrustDomainFromString(fmt.Sprintf("bad%d.example", i))
			h := func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() }
			if i%2 == 0 {
				h = func(w http.ResponseWriter, _ *http.Request) { w.Write(make([]byte, 2<<20)) }
			}
			s.net.serve(t, td.Name(), s.web.server(t, td.Name()), h)
			all = append(all, Relationship{TrustDomain: td, URL: "https://" + td.Name(), Roots: s.r.Roots})
		}
		s.set(fixed(t, bundle(t, theirs, 4, 10*time.Second, s.server)))
		s.Follow(append(all, s.r))
		time.Sleep(10 * time.Minute)
		if n := len(s.asked()); n < 60 || s.store.of(theirs) == nil {
			t.Errorf("asked %d times in 60 turns", n)
		}
		if all, _ := s.store.Bundles(); len(all.Federated) != 1 {
			t.Errorf("got %d bundles, want one", len(all.Federated))
		}
	})
}

// A bundle that changes all the time wakes the host's streams no more often
// than once in a while.
func TestChangesAreSpaced(t *testing.T) {
	inScene(t, nil, func(t *testing.T, s *scene) {
		var n atomic.Uint64
		s.set(answer(t, func() *svid.Bundle { return bundle(t, theirs, n.Add(1), time.Second, s.server) }))
		s.Follow([]Relationship{s.r})
		time.Sleep(time.Minute)
		if got := n.Load(); got < 10 || got > 13 {
			t.Errorf("took %d bundles in a minute, want one in %s", got, pause)
		}
	})
}

// After a start, and when an operator tries, failures come faster than turns: it
// is time that makes a bundle stale.
func TestQuickFailuresAreNotStale(t *testing.T) {
	inScene(t, []*svid.Bundle{bundle(t, theirs, 4, 5*time.Minute, newCA(t))}, func(t *testing.T, s *scene) {
		s.set(failing)
		s.Follow([]Relationship{s.r})
		for range 10 {
			s.Refresh(t.Context(), theirs)
		}
		time.Sleep(17 * time.Minute)
		if st := s.status(t); st.Stale || st.Failures < 10 || strings.Contains(s.log.String(), "[ERROR]") {
			t.Errorf("got %+v, want failures and no more\n%s", st, s.log)
		}
		time.Sleep(10 * time.Minute)
		if st := s.status(t); !st.Stale || !strings.Contains(s.log.String(), "[ERROR] bundle is stale") {
			t.Errorf("got %+v, want it stale\n%s", st, s.log)
		}
	})
}

// What a stranger's certificate says does not reach a terminal as it is.
func TestErrorsAreHarmless(t *testing.T) {
	inScene(t, nil, func(t *testing.T, s *scene) {
		s.net.serve(t, "theirs.example", s.web.server(t, "evil\x1b[31m\nexample"), failing)
		s.Follow([]Relationship{s.r})
		time.Sleep(time.Second)
		st := s.status(t)
		if !errors.Is(st.Err, ErrWrongServer) || !strings.Contains(st.Err.Error(), "evil?[31m?example") {
			t.Errorf("got %q, want the name without its control characters", st.Err)
		}
		if strings.ContainsAny(s.log.String(), "\x1b") {
			t.Errorf("got log %q", s.log)
		}
	})
}

func TestLogIsBounded(t *testing.T) {
	if got := clip(strings.Repeat("ü", 1000)); len(got) > 310 {
		t.Errorf("got %d bytes", len(got))
	}
}
