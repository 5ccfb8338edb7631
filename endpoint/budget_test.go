package endpoint

import (
	"context"
	"fmt"
	"net"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/deputy-id/deputy/svid/local"
)

func limits(change func(*Limits)) func(*Config, *local.Options) {
	return func(c *Config, _ *local.Options) {
		c.Limits = DefaultLimits(20000, 2)
		change(&c.Limits)
	}
}

func TestDefaultLimitsKeepAReserve(t *testing.T) {
	for _, descriptors := range []uint64{256, 1024, 20000, 1 << 20} {
		l := DefaultLimits(descriptors, 2)
		if l.OwnerConnections >= l.Connections {
			t.Errorf("%d descriptors: one owner may have %d of %d connections, want fewer", descriptors, l.OwnerConnections, l.Connections)
		}
		// A connection of a process of its own takes four.
		if taken := 4 * uint64(l.Connections); descriptors >= 1024 && taken > descriptors*3/4 {
			t.Errorf("%d descriptors: %d connections take %d, want a quarter kept back", descriptors, l.Connections, taken)
		}
		if l.OwnerMessages >= l.Messages/2 {
			t.Errorf("%d descriptors: one owner's messages may take %d of %d bytes, want fewer", descriptors, l.OwnerMessages, l.Messages)
		}
	}
	if l := DefaultLimits(20000, 2); l.OwnerStreams < 10000 || l.OwnerConnections < 100 || l.ConnStreams < 100 {
		t.Errorf("got %+v, want room for 10,000 streams of 100 processes of one owner", l)
	}
}

func TestConnectionsOverTheBudgetAreRefusedWithTheReason(t *testing.T) {
	w := start(t, limits(func(l *Limits) { l.OwnerConnections = 3 }))
	w.entry("/a", nil, mine)
	for range 3 {
		recv(t, x509Stream(t, w.workloadAPI()), "/a")
	}
	_, err := x509Stream(t, w.workloadAPI()).Recv()
	// The end of the connection and that of the call are on their way at once.
	if c := status.Code(err); c != codes.Unavailable && c != codes.ResourceExhausted || !strings.Contains(err.Error(), "over budget") {
		t.Errorf("got %v, want a refusal with the reason", err)
	}
}

// What the names of many streams take would be much, although each asks for
// few enough.
func TestNamesOverTheBudgetAreRefused(t *testing.T) {
	names := make([]string, 100)
	for i := range names {
		names[i] = fmt.Sprintf("spiffe://test.example/%d", i)
	}
	w := start(t, limits(func(l *Limits) { l.OwnerNames = 40_000 })) // two times 100 names
	w.entry("/a", nil, mine)
	s, d := w.sotw(names...), w.delta("default")
	s.recv()
	d.recv("default")
	d.subscribe(names...)
	d.recv()
	over := w.delta(names...)
	_, err := over.st.Recv()
	wantCode(t, err, codes.ResourceExhausted)
	over = w.deltaFrom(&discoveryv3.DeltaDiscoveryRequest{InitialResourceVersions: map[string]string{strings.Repeat("n", 10_000): "1"}})
	_, err = over.st.Recv()
	wantCode(t, err, codes.ResourceExhausted)
	few := w.sotw("default") // which are still to be had
	few.recv("default")

	s.ask("default") // gives back what it does not ask for any more
	s.recv("default")
	again := w.delta(names...)
	again.recv()
	for _, st := range []interface{ CloseSend() error }{few.st, again.st, d.st, s.st} {
		if err := st.CloseSend(); err != nil {
			t.Fatal(err)
		}
	}
	a := w.onlyLink().seat.account()
	eventually(t, "what the streams held is given back", func() bool { return a.names.Load() == 0 })
}

// Nobody but the log says that somebody tried to be another.
func TestConnectionThatFailsTheChallengeIsLogged(t *testing.T) {
	w := start(t)
	c, err := net.Dial("unix", w.socket)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, err := c.Write([]byte("GET / HTTP/1.1\r\n\r\n")); err != nil {
		t.Fatal(err)
	}
	line := fmt.Sprintf("[INFO]  workload denied: method=connect pid=%d uid=%d reason=", os.Getpid(), os.Geteuid())
	eventually(t, "the log has a line", func() bool { return strings.Contains(w.log.String(), line) })
}

func TestAdministratorsComeInWhateverTheBudget(t *testing.T) {
	w := start(t, limits(func(l *Limits) { l.Connections, l.OwnerConnections = 1, 1 }))
	w.entry("/a", nil, mine)
	recv(t, x509Stream(t, w.workloadAPI()), "/a")
	w.mu.Lock()
	for _, s := range w.sessions {
		s.place = func() string { return "owner" } // where the stream's connection is counted
	}
	w.mu.Unlock()
	for range 3 {
		if err := count(entryv1.NewEntryClient(w.dial(w.admin))); err != nil {
			t.Errorf("got %v, want an answer", err)
		}
	}
}

func TestConnectionIsGivenBack(t *testing.T) {
	w := start(t, limits(func(l *Limits) { l.OwnerConnections = 1 }))
	w.entry("/a", nil, mine)
	for range 5 {
		c := w.dial(w.socket)
		recv(t, x509Stream(t, workload.NewSpiffeWorkloadAPIClient(c)), "/a")
		c.Close()
		eventually(t, "the connection is given back", func() bool {
			w.budget.mu.Lock()
			defer w.budget.mu.Unlock()
			return w.budget.conns == 0
		})
	}
	w.budget.mu.Lock()
	defer w.budget.mu.Unlock()
	for name, a := range w.budget.accounts {
		if a.conns != 0 || a.users != 0 {
			t.Errorf("account %s has %d connections and %d users left, want none", name, a.conns, a.users)
		}
	}
}

func TestOneOwnerDoesNotUseUpAnothers(t *testing.T) {
	b := newBudget(Limits{Connections: 100, OwnerConnections: 2, Challenges: 1, Attestations: 1, Mints: 1})
	connect := func(owner string) (*seat, func(), error) {
		release, err := b.admit(0)
		if err != nil {
			return nil, nil, err
		}
		s := b.seat(0)
		return s, release, s.move(owner)
	}
	for range 2 {
		if _, _, err := connect("container"); err != nil {
			t.Fatal(err)
		}
	}
	s, release, err := connect("container")
	if err == nil {
		t.Error("a third connection of the container was accepted, want it refused")
	}
	s.leave()
	release()
	for range 2 {
		if _, _, err := connect("uid:0"); err != nil {
			t.Errorf("root of the host was refused: %v", err)
		}
	}
	if _, _, err := connect("uid:0"); err == nil {
		t.Error("a third connection of root was accepted, want it refused")
	}
}

func TestStreamsOverTheBudgetAreResourceExhausted(t *testing.T) {
	w := start(t, limits(func(l *Limits) { l.OwnerStreams = 3 }))
	w.entry("/a", nil, mine)
	api := w.workloadAPI()
	if _, err := fetch(call(t), api); err != nil { // from here on the owner is known
		t.Fatal(err)
	}
	eventually(t, "that stream has ended", func() bool { return w.budget.streams.Load() == 0 })
	for range 3 {
		recv(t, x509Stream(t, api), "/a")
	}
	_, err := x509Stream(t, api).Recv()
	wantCode(t, err, codes.ResourceExhausted)
}

func TestMintsOverTheBudgetAreResourceExhausted(t *testing.T) {
	w := start(t, limits(func(l *Limits) { l.Mints = 2 }))
	w.entry("/a", nil, mine)
	api := w.workloadAPI()
	seen := make(map[codes.Code]int)
	for range 10 {
		_, err := api.FetchJWTSVID(call(t), &workload.JWTSVIDRequest{Audience: []string{"db"}})
		seen[status.Code(err)]++
	}
	if seen[codes.OK] < 2 || seen[codes.ResourceExhausted] < 5 {
		t.Errorf("got %v, want two or so and then ResourceExhausted", seen)
	}
}

// A client that opens ten thousand streams on one connection gets as many as
// the connection may have; the rest wait on its side, and nobody else's do.
func TestTenThousandStreamsOnOneConnection(t *testing.T) {
	w := start(t)
	w.entry("/a", nil, mine)
	ctx, cancel := context.WithCancel(call(t))
	defer cancel()
	greedy := w.workloadAPI()
	var opening sync.WaitGroup
	for range 10000 {
		opening.Go(func() {
			st, err := greedy.FetchX509SVID(ctx, &workload.X509SVIDRequest{})
			if err == nil {
				st.Recv()
			}
		})
	}
	eventually(t, "the connection is full", func() bool { return w.budget.streams.Load() >= int64(w.Limits.ConnStreams) })
	begin := time.Now()
	recv(t, x509Stream(t, w.workloadAPI()), "/a")
	if took := time.Since(begin); took > 2*time.Second {
		t.Errorf("another client waited for %s", took)
	}
	cancel()
	opening.Wait()
}

func TestSilentClientsDoNotKeepOthersOut(t *testing.T) {
	t.Parallel()
	w := start(t, limits(func(l *Limits) { l.Challenges = 2 }))
	w.entry("/a", nil, mine)
	for range 2 {
		c, err := net.Dial("unix", w.socket)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
	}
	// Those two hold the turn until their time is over; this one waits for it.
	recv(t, x509Stream(t, w.workloadAPI()), "/a")
}
