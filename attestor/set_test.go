package attestor

import (
	"context"
	"errors"
	"os"
	"regexp"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/hashicorp/go-hclog"

	"github.com/deputy-id/deputy/attestor/peer"
)

// A saying is an attestor that does what the test says, and counts.
type saying struct {
	asked atomic.Int32
	do    func(context.Context, *peer.Process) ([]Selector, error)
}

func (s *saying) Attest(ctx context.Context, p *peer.Process) ([]Selector, error) {
	s.asked.Add(1)
	return s.do(ctx, p)
}

func says(out ...Selector) *saying {
	return &saying{do: func(context.Context, *peer.Process) ([]Selector, error) { return out, nil }}
}

func failsWith(err error) *saying {
	return &saying{do: func(context.Context, *peer.Process) ([]Selector, error) { return nil, err }}
}

func from(a Attestor, prefixes ...string) Source {
	return Source{Name: "test", Prefixes: prefixes, Attestor: a}
}

func newTestSet(sources ...Source) *Set { return NewSet(hclog.NewNullLogger(), nil, sources...) }

func mustAttest(t *testing.T, s *Set, p *peer.Process) *Evidence {
	t.Helper()
	e, err := s.Attest(t.Context(), p)
	if err != nil {
		t.Fatal(err)
	}
	return e
}

var uid7 = Selector{"unix", "uid:7"}

func TestSetMergesSortedAndOnce(t *testing.T) {
	b := newBench(t)
	p := b.open(os.Getpid())
	s := newTestSet(
		from(says(Selector{"process", "leader:true"}, uid7), "unix:", "process:"),
		from(says(uid7, Selector{"cgroup", "unit:a.service"}), "unix:", "cgroup:"),
	)
	e := mustAttest(t, s, p)
	want := []Selector{{"cgroup", "unit:a.service"}, {"process", "leader:true"}, uid7}
	if diff := cmp.Diff(want, e.Selectors); diff != "" {
		t.Errorf("selectors (-want +got):\n%s", diff)
	}
	if len(e.Unknown) != 0 {
		t.Errorf("got %v unknown, want nothing", e.Unknown)
	}
	if e.Owner != "uid:0" {
		t.Errorf("got owner %q, want that of the UID", e.Owner)
	}
}

func TestSetDropsWhatASourceMayNotGive(t *testing.T) {
	b := newBench(t)
	s := newTestSet(from(says(uid7, Selector{"docker", "label:a:b"}, Selector{"unix", "user:a\nb"}, Selector{"unix:uid", "9"}), "unix:"))
	if diff := cmp.Diff([]Selector{uid7}, mustAttest(t, s, b.open(os.Getpid())).Selectors); diff != "" {
		t.Errorf("selectors (-want +got):\n%s", diff)
	}
}

func TestSetReportsWhatIsUnknown(t *testing.T) {
	b := newBench(t)
	p := b.open(os.Getpid())
	for name, test := range map[string]struct {
		source           Attestor
		unknown, certain Selector
	}{
		"an error, all that the source gives": {
			failsWith(errors.New("no")), Selector{"docker", "image_id:x"}, Selector{"unix", "uid:7"}},
		"an Unknown, what it names": {
			failsWith(&Unknown{Prefixes: []string{"docker:image_id:"}, Err: errors.New("no")}),
			Selector{"docker", "image_id:x"}, Selector{"docker", "label:x:y"}},
		"a panic, all": {
			&saying{do: func(context.Context, *peer.Process) ([]Selector, error) { panic("input") }},
			Selector{"docker", "image_id:x"}, Selector{"unix", "uid:7"}},
	} {
		t.Run(name, func(t *testing.T) {
			e := mustAttest(t, newTestSet(from(test.source, "docker:"), from(says(uid7), "unix:")), p)
			if !e.MayHave(test.unknown) {
				t.Errorf("got %s certain, want it unknown", test.unknown)
			}
			if e.MayHave(test.certain) {
				t.Errorf("got %s unknown, want it certain", test.certain)
			}
			if !e.Has(uid7) {
				t.Error("the other source's selectors are missing")
			}
		})
	}
}

func TestSetKeepsWhatItGathered(t *testing.T) {
	b := newBench(t)
	p := b.open(os.Getpid())
	source := says(uid7)
	s := newTestSet(from(source, "unix:"))
	first := mustAttest(t, s, p)
	if again := mustAttest(t, s, p); again != first || source.asked.Load() != 1 {
		t.Errorf("asked %d times, same evidence: %v; want once, and the same", source.asked.Load(), again == first)
	}
	if _, err := s.Refresh(t.Context(), p); err != nil || source.asked.Load() != 2 {
		t.Errorf("refresh: %v, asked %d times in all, want twice", err, source.asked.Load())
	}
}

func TestSetGathersAgainAfterExec(t *testing.T) {
	b := newBench(t)
	r := start(t, self(t), nil)
	p := b.open(r.self)
	source := says(uid7)
	s := newTestSet(from(source, "unix:"))
	first := mustAttest(t, s, p)
	r.tell("exec /proc/self/exe")
	second := mustAttest(t, s, p)
	if second == first || source.asked.Load() != 2 {
		t.Errorf("got the evidence of the earlier program after an exec into the same file, asked %d times", source.asked.Load())
	}
	if second.Instance != first.Instance {
		t.Errorf("got instance %s after exec, want %s: it is the same process", second.Instance, first.Instance)
	}
}

func TestSetThrowsAwayWhatWasGatheredAcrossAnExec(t *testing.T) {
	b := newBench(t)
	r := start(t, self(t), nil)
	p := b.open(r.self)
	var source saying
	source.do = func(context.Context, *peer.Process) ([]Selector, error) {
		if source.asked.Load() == 1 {
			r.tell("exec /proc/self/exe")
			return []Selector{{"unix", "path:/privileged"}}, nil
		}
		return []Selector{{"unix", "path:/other"}}, nil
	}
	e := mustAttest(t, newTestSet(from(&source, "unix:")), p)
	if diff := cmp.Diff([]Selector{{"unix", "path:/other"}}, e.Selectors); diff != "" {
		t.Errorf("selectors (-want +got):\n%s", diff)
	}
}

func TestSetRefusesAProcessThatKeepsChanging(t *testing.T) {
	b := newBench(t)
	r := start(t, self(t), nil)
	p := b.open(r.self)
	source := &saying{do: func(context.Context, *peer.Process) ([]Selector, error) {
		r.tell("exec /proc/self/exe")
		return []Selector{uid7}, nil
	}}
	if e, err := newTestSet(from(source, "unix:")).Attest(t.Context(), p); err == nil || errors.Is(err, ErrGone) {
		t.Errorf("got %v, %v, want an error that is not its end", e, err)
	}
}

func TestSetSaysWhenTheProcessIsGone(t *testing.T) {
	b := newBench(t)
	r := start(t, self(t), nil)
	p := b.open(r.self)
	source := &saying{do: func(context.Context, *peer.Process) ([]Selector, error) {
		if err := syscall.Kill(r.self, syscall.SIGKILL); err != nil {
			t.Error(err)
		}
		<-p.Done()
		return []Selector{uid7}, nil
	}}
	s := newTestSet(from(source, "unix:"))
	for range 2 { // while gathering, and after
		if e, err := s.Attest(t.Context(), p); !errors.Is(err, ErrGone) {
			t.Errorf("got %v, %v, want ErrGone", e, err)
		}
	}
}

func TestSetForgetsEndedProcesses(t *testing.T) {
	b := newBench(t)
	s := newTestSet(from(says(uid7), "unix:"))
	r := start(t, self(t), nil)
	p := b.open(r.self)
	mustAttest(t, s, p)
	if err := syscall.Kill(r.self, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	<-p.Done()
	mustAttest(t, s, b.open(os.Getpid()))
	s.mu.Lock()
	s.sweepLocked()
	_, held := s.processes[p.ID()]
	left := len(s.processes)
	s.mu.Unlock()
	if held || left != 1 {
		t.Errorf("got %d records, of the ended process: %v; want the living one's alone", left, held)
	}
}

// A resting is a Basis that the test ends.
type resting struct {
	done   chan struct{}
	closed atomic.Bool
}

func (r *resting) Done() <-chan struct{} { return r.done }
func (r *resting) Close() error          { r.closed.Store(true); return nil }

func TestEvidenceEndsWithWhatItRestsOn(t *testing.T) {
	b := newBench(t)
	p := b.open(os.Getpid())
	rests := []*resting{{done: make(chan struct{})}, {done: make(chan struct{})}}
	var source saying
	source.do = func(ctx context.Context, _ *peer.Process) ([]Selector, error) {
		RestOn(ctx, rests[source.asked.Load()-1])
		return []Selector{uid7}, nil
	}
	s := newTestSet(from(&source, "unix:"))
	first := mustAttest(t, s, p)
	if again := mustAttest(t, s, p); again != first {
		t.Error("gathered again although nothing ended")
	}
	close(rests[0].done)
	if again := mustAttest(t, s, p); again == first {
		t.Error("kept evidence whose basis has ended")
	}
	if !rests[0].closed.Load() || rests[1].closed.Load() {
		t.Errorf("closed: %v, %v; want the first basis alone", rests[0].closed.Load(), rests[1].closed.Load())
	}
}

func TestClosedSetLetsGoOfWhatEvidenceRestsOn(t *testing.T) {
	b := newBench(t)
	p := b.open(os.Getpid())
	r := &resting{done: make(chan struct{})}
	var source saying
	source.do = func(ctx context.Context, _ *peer.Process) ([]Selector, error) {
		RestOn(ctx, r)
		return []Selector{uid7}, nil
	}
	s := newTestSet(from(&source, "unix:"))
	mustAttest(t, s, p)
	if r.closed.Load() {
		t.Fatal("closed while the evidence is kept")
	}
	s.Close()
	if !r.closed.Load() {
		t.Error("the basis is held by a set that is closed")
	}
}

func TestBasisOutsideOfASetIsClosedAtOnce(t *testing.T) {
	r := &resting{done: make(chan struct{})}
	RestOn(t.Context(), r)
	if !r.closed.Load() {
		t.Error("nobody will close the basis")
	}
}

func TestSetGathersOnceForAllThatAsk(t *testing.T) {
	b := newBench(t)
	p := b.open(os.Getpid())
	release := make(chan struct{})
	source := &saying{do: func(context.Context, *peer.Process) ([]Selector, error) {
		<-release
		return []Selector{uid7}, nil
	}}
	s := newTestSet(from(source, "unix:"))
	hasty, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := s.Attest(hasty, p); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v of a caller that gave up, want its context's error", err)
	}
	var wg sync.WaitGroup
	for range 20 {
		wg.Go(func() {
			if e, err := s.Attest(t.Context(), p); err != nil || !e.Has(uid7) {
				t.Errorf("got %v, %v", e, err)
			}
		})
	}
	close(release)
	wg.Wait()
	if n := source.asked.Load(); n != 1 {
		t.Errorf("asked %d times, want once: the caller that gave up had begun it", n)
	}
}

func TestSetGathersAgainForAGreaterDemand(t *testing.T) {
	b := newBench(t)
	p := b.open(os.Getpid())
	var want atomic.Bool
	source := says(uid7)
	s := NewSet(hclog.NewNullLogger(), func() Demand { return Demand{ExecutableDigest: want.Load()} }, from(source, "unix:"))
	first := mustAttest(t, s, p)
	want.Store(true)
	second := mustAttest(t, s, p)
	if second == first || !second.Demand.ExecutableDigest {
		t.Error("got evidence without the digest that is wanted by now")
	}
	want.Store(false)
	if mustAttest(t, s, p) != second {
		t.Error("threw away evidence that covers more than is wanted")
	}
}

func TestUnknownIsAskedForAgainSoon(t *testing.T) {
	b := newBench(t)
	p := b.open(os.Getpid())
	source := failsWith(errors.New("restarting"))
	s := newTestSet(from(source, "docker:"))
	for range 10 {
		mustAttest(t, s, p)
	}
	if n := source.asked.Load(); n != 1 {
		t.Errorf("asked %d times in a burst, want once", n)
	}
	s.record(p).kept.Load().until = time.Now() // a second later
	source.do = says(Selector{"docker", "image_id:x"}).do
	if e := mustAttest(t, s, p); !e.Has(Selector{"docker", "image_id:x"}) || len(e.Unknown) != 0 {
		t.Errorf("got %+v, want what is known again", e)
	}
	if left := time.Until(s.record(p).kept.Load().until); left < 50*time.Second || left > keepFor {
		t.Errorf("known evidence serves for %v, want up to a minute", left)
	}
}

func TestSourceThatNeverComesBackIsAskedOnce(t *testing.T) {
	b := newBench(t)
	p := b.open(os.Getpid())
	stuck := make(chan struct{})
	source := &saying{do: func(context.Context, *peer.Process) ([]Selector, error) { <-stuck; return nil, nil }}
	s := newSource(from(source, "docker:"))
	ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
	defer cancel()
	if a := s.ask(ctx, p); !errors.Is(a.err, context.DeadlineExceeded) {
		t.Errorf("got %v, want the deadline", a.err)
	}
	if a := s.ask(t.Context(), p); !errors.Is(a.err, errBusy) {
		t.Errorf("got %v, want that it is still busy", a.err)
	}
	close(stuck)
	if n := source.asked.Load(); n != 1 {
		t.Errorf("asked %d times, want once", n)
	}
}

func TestForeignUserNamespaceGetsNeitherPathNorLeader(t *testing.T) {
	b := newBench(t)
	r := start(t, self(t), &syscall.SysProcAttr{
		Cloneflags:  syscall.CLONE_NEWUSER,
		UidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: 0, Size: 1}},
		GidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: 0, Size: 1}},
	})
	p := b.open(r.self)
	s := newTestSet(from(says(
		uid7, Selector{"unix", "path:/x"}, Selector{"unix", "sha256:" + id1},
		Selector{"process", "leader:true"}, Selector{"process", "host:true"}, Selector{"process", "parent_path:/x"},
		Selector{"process", "parent_sha256:" + id1}, Selector{"process", "ancestor_path:/x"},
		Selector{"process", "exec:a"}, Selector{"container", "path:/x"}, Selector{"container", "id:" + id1},
	), "unix:", "process:", "container:"), from(failsWith(errors.New("no")), "process:leader:"))
	e := mustAttest(t, s, p)
	want := []Selector{{"container", "id:" + id1}, {"process", "exec:a"}, uid7}
	if diff := cmp.Diff(want, e.Selectors); diff != "" {
		t.Errorf("selectors (-want +got):\n%s", diff)
	}
	if e.MayHave(leaderSelector) {
		t.Error("got leader unknown, want it certain that it is none")
	}
}

func TestInstanceNamesOneRun(t *testing.T) {
	b := newBench(t)
	s := newTestSet()
	first := mustAttest(t, s, b.open(start(t, self(t), nil).self)).Instance
	second := mustAttest(t, s, b.open(start(t, self(t), nil).self)).Instance
	if first == second || !regexp.MustCompile(`^[a-z2-7]{26}$`).MatchString(first) {
		t.Errorf("got %q and %q, want two different names of 26 base32 digits", first, second)
	}
}

func TestTracedByAnotherThreadThanTheFirst(t *testing.T) {
	b := newBench(t)
	r := start(t, self(t), nil)
	p := b.open(r.self)
	if got, err := traced(p, time.Now().Add(time.Minute)); got || err != nil {
		t.Errorf("got %v, %v of an untraced process", got, err)
	}
	if got, err := traced(p, time.Now().Add(-time.Second)); !got || err != nil {
		t.Errorf("got %v, %v although nothing could be looked at in time, want yes", got, err)
	}
	tasks, err := p.ReadDir("task")
	if err != nil {
		t.Fatal(err)
	}
	i := slices.IndexFunc(tasks, func(e os.DirEntry) bool { return e.Name() != itoa(r.self) })
	if i < 0 {
		t.Fatal("a Go program with one thread")
	}
	traceFor(t, atoi(t, tasks[i].Name()), func() {
		if e := mustAttest(t, newTestSet(), p); !e.Traced {
			t.Error("got untraced, want traced")
		}
	})
}

// The fast path: what a fetch costs on an open connection.
func BenchmarkAttestUnchanged(b *testing.B) {
	table, _, err := peer.NewTable()
	if err != nil {
		b.Fatal(err)
	}
	defer table.Close()
	p, err := table.Open(int32(os.Getpid()))
	if err != nil {
		b.Fatal(err)
	}
	defer p.Close()
	s := newTestSet(from(says(uid7), "unix:"))
	if _, err := s.Attest(b.Context(), p); err != nil {
		b.Fatal(err)
	}
	// As on a host whose names are v2's; this one's test may run in v2's root.
	s.record(p).kept.Load().look.cgroup = nil
	b.ReportAllocs()
	for b.Loop() {
		if _, err := s.Attest(b.Context(), p); err != nil {
			b.Fatal(err)
		}
	}
}
