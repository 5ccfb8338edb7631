package endpoint

import (
	"bytes"
	"context"
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
	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/deputy-id/deputy/attestor"
	"github.com/deputy-id/deputy/attestor/peer"
	"github.com/deputy-id/deputy/svid"
	"github.com/deputy-id/deputy/svid/local"
	"github.com/deputy-id/deputy/svid/registry"
)

var (
	domain = spiffeid.RequireTrustDomainFromString("test.example")
	mine   = attestor.Selector{Type: "unix", Value: "uid:1"}
	image  = attestor.Selector{Type: "docker", Value: "image_id:agent"}
	other  = attestor.Selector{Type: "unix", Value: "uid:2"}
)

// evidence is an attestors that says what the test wants to be known.
type evidence struct {
	mu       sync.Mutex
	ev       attestor.Evidence
	now      *attestor.Evidence
	err      error // of asking at all
	stranger bool  // what there is, is of another program
	gathered int
}

func (e *evidence) set(change func(*attestor.Evidence)) {
	e.mu.Lock()
	defer e.mu.Unlock()
	change(&e.ev)
	slices.SortFunc(e.ev.Selectors, attestor.Selector.Compare)
	e.fresh()
}

// times is how often evidence was gathered anew.
func (e *evidence) times() int {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.gathered
}

func (e *evidence) fresh() {
	next := e.ev
	next.Gathered = time.Now()
	next.Selectors = slices.Clone(e.ev.Selectors)
	e.now = &next
}

// Kept is as of evidence that is there and of a connection that is as it was.
func (e *evidence) Kept(c *peer.Conn) *attestor.Evidence {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.err != nil || e.stranger || c.Check() != nil {
		return nil
	}
	return e.now
}

func (e *evidence) Attest(context.Context, *peer.Process) (*attestor.Evidence, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.err != nil {
		return nil, e.err
	}
	if e.now == nil {
		e.fresh()
	}
	return e.now, nil
}

func (e *evidence) Refresh(ctx context.Context, p *peer.Process) (*attestor.Evidence, error) {
	e.mu.Lock()
	e.gathered++
	e.now = nil
	e.mu.Unlock()
	return e.Attest(ctx, p)
}

type world struct {
	*Server
	t         testing.TB
	evidence  *evidence
	authority *local.Authority
	socket    string
	admin     string
	log       *buffer
}

type buffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *buffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *buffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

// start serves both sockets with the real registry, keeper and authority.
func start(t testing.TB, change ...func(*Config, *local.Options)) *world {
	t.Helper()
	w := &world{t: t, evidence: &evidence{ev: attestor.Evidence{
		Selectors: []attestor.Selector{mine}, Owner: "owner", Instance: strings.Repeat("a", 26),
	}}, log: &buffer{}}
	log := hclog.New(&hclog.LoggerOptions{Output: w.log, Level: hclog.Info})
	ctx, cancel := context.WithCancel(context.Background())
	t.Cleanup(cancel)
	options := local.Options{TrustDomain: domain, Memory: true, CATTL: time.Hour}
	c := Config{
		TrustDomain: domain,
		Attestors:   w.evidence,
		Log:         log,
		AdminGroup:  -1,
	}
	for _, f := range change {
		f(&c, &options)
	}
	var err error
	if w.authority, err = local.Open(ctx, options); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { w.authority.Close() })
	if c.Registry, err = registry.Open(ctx, "", domain, log); err != nil {
		t.Fatal(err)
	}
	table, _, err := peer.NewTable()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { table.Close() })
	c.Authority = w.authority
	if c.Keeper == nil {
		c.Keeper = svid.NewKeeper(w.authority, svid.KeeperOptions{Log: log})
	}
	if c.Lent == nil {
		c.Lent = svid.NewKeeper(w.authority, svid.KeeperOptions{Log: log})
	}
	c.Minter, c.Federation, c.Processes = w.authority, w.authority, table
	w.Server = New(c)

	dir := t.TempDir()
	w.socket, w.admin = filepath.Join(dir, "workload.sock"), filepath.Join(dir, "admin.sock")
	var serving sync.WaitGroup
	for path, serve := range map[string]func(*peer.Listener) error{
		w.socket: func(l *peer.Listener) error { return w.ServeWorkload(l) },
		w.admin:  func(l *peer.Listener) error { return w.ServeAdmin(l) },
	} {
		o := peer.Options{Mode: 0o666, Group: -1}
		if path == w.socket {
			o.Admit = w.Admit
		}
		l, err := peer.Listen(path, table, o)
		if err != nil {
			t.Fatal(err)
		}
		serving.Go(func() {
			if err := serve(l); err != nil {
				t.Errorf("serve: %v", err)
			}
		})
	}
	serving.Go(func() { w.Run(ctx) })
	t.Cleanup(func() {
		cancel()
		serving.Wait()
	})
	return w
}

func (w *world) dial(path string) *grpc.ClientConn {
	w.t.Helper()
	c, err := grpc.NewClient("unix://"+path, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() { c.Close() })
	return c
}

func (w *world) workloadAPI() workload.SpiffeWorkloadAPIClient {
	return workload.NewSpiffeWorkloadAPIClient(w.dial(w.socket))
}

// entry creates an entry with this path for these selectors.
func (w *world) entry(path string, change func(*registry.Entry), selectors ...attestor.Selector) registry.Entry {
	w.t.Helper()
	e := registry.Entry{Path: path, Selectors: selectors}
	if change != nil {
		change(&e)
	}
	e, err := w.Registry.Create(context.Background(), e)
	if err != nil {
		w.t.Fatal(err)
	}
	return e
}

func call(t testing.TB) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	t.Cleanup(cancel)
	return metadata.AppendToOutgoingContext(ctx, "workload.spiffe.io", "true")
}

func ids(r *workload.X509SVIDResponse) []string {
	var out []string
	for _, s := range r.GetSvids() {
		out = append(out, strings.TrimPrefix(s.SpiffeId, domain.IDString()))
	}
	return out
}

// x509Stream opens a stream that the test reads.
func x509Stream(t testing.TB, api workload.SpiffeWorkloadAPIClient) workload.SpiffeWorkloadAPI_FetchX509SVIDClient {
	t.Helper()
	st, err := api.FetchX509SVID(call(t), &workload.X509SVIDRequest{})
	if err != nil {
		t.Fatal(err)
	}
	return st
}

func recv(t testing.TB, st workload.SpiffeWorkloadAPI_FetchX509SVIDClient, want ...string) *workload.X509SVIDResponse {
	t.Helper()
	r, err := st.Recv()
	if err != nil {
		t.Fatalf("got %v, want %q", err, want)
	}
	if got := ids(r); !slices.Equal(got, want) {
		t.Fatalf("got %q, want %q", got, want)
	}
	return r
}

func wantCode(t testing.TB, err error, want codes.Code) {
	t.Helper()
	if got := status.Code(err); got != want {
		t.Fatalf("got %v (%v), want %v", got, err, want)
	}
}

func TestStreamIsTheFullStateAndFollowsEntries(t *testing.T) {
	w := start(t)
	w.entry("/a", nil, mine)
	st := x509Stream(t, w.workloadAPI())
	recv(t, st, "/a")
	b := w.entry("/b", func(e *registry.Entry) { e.Hint = "second" }, mine)
	r := recv(t, st, "/a", "/b")
	if got := r.Svids[1].Hint; got != "second" {
		t.Errorf("got hint %q, want second", got)
	}
	w.entry("/of-another", nil, other) // nobody is told
	if _, err := w.Registry.Delete(context.Background(), b.ID); err != nil {
		t.Fatal(err)
	}
	recv(t, st, "/a")
}

func TestStreamEndsWhenNoEntryIsLeft(t *testing.T) {
	w := start(t)
	e := w.entry("/a", nil, mine)
	st := x509Stream(t, w.workloadAPI())
	recv(t, st, "/a")
	if _, err := w.Registry.Delete(context.Background(), e.ID); err != nil {
		t.Fatal(err)
	}
	_, err := st.Recv()
	wantCode(t, err, codes.PermissionDenied)
}

func TestEntryReachesAStreamWithin50ms(t *testing.T) {
	w := start(t)
	w.entry("/a", nil, mine)
	st := x509Stream(t, w.workloadAPI())
	recv(t, st, "/a")
	var took []time.Duration
	for i := range 20 {
		begin := time.Now()
		e := w.entry(fmt.Sprintf("/b%d", i), nil, mine)
		recv(t, st, "/a", e.Path)
		took = append(took, time.Since(begin))
		if _, err := w.Registry.Delete(context.Background(), e.ID); err != nil {
			t.Fatal(err)
		}
		recv(t, st, "/a")
	}
	slices.Sort(took)
	if p50 := took[len(took)/2]; p50 > 50*time.Millisecond {
		t.Errorf("got %s from entry to SVID, want at most 50ms", p50)
	}
}

func TestRotationGathersEvidenceOnceForAllStreams(t *testing.T) {
	t.Parallel()
	w := start(t, func(_ *Config, o *local.Options) { o.X509TTL = 5 * time.Second })
	w.entry("/a", nil, mine)
	api := w.workloadAPI()
	var streams []workload.SpiffeWorkloadAPI_FetchX509SVIDClient
	for range 20 {
		st := x509Stream(t, api)
		recv(t, st, "/a")
		streams = append(streams, st)
	}
	before := w.evidence.times()
	for _, st := range streams {
		recv(t, st, "/a")
	}
	if got := w.evidence.times() - before; got != 1 {
		t.Errorf("evidence was gathered %d times, want once", got)
	}
}

func TestRotationWithoutTheIdentityEndsTheStream(t *testing.T) {
	t.Parallel()
	w := start(t, func(_ *Config, o *local.Options) { o.X509TTL = 5 * time.Second })
	w.entry("/a", nil, mine)
	st := x509Stream(t, w.workloadAPI())
	recv(t, st, "/a")
	w.evidence.mu.Lock()
	w.evidence.ev.Selectors = []attestor.Selector{other} // seen only when gathered anew
	w.evidence.mu.Unlock()
	_, err := st.Recv()
	wantCode(t, err, codes.PermissionDenied)
}

func TestUnknownEvidence(t *testing.T) {
	unknown := func(ev *attestor.Evidence) {
		ev.Selectors = []attestor.Selector{mine}
		ev.Unknown = []attestor.Unknown{{Prefixes: []string{"docker:"}, Err: errors.New("engine does not answer")}}
	}
	known := func(ev *attestor.Evidence) {
		ev.Selectors, ev.Unknown = []attestor.Selector{image, mine}, nil
	}
	t.Run("new call is Unavailable", func(t *testing.T) {
		w := start(t)
		w.entry("/container", nil, image)
		w.evidence.set(unknown)
		_, err := x509Stream(t, w.workloadAPI()).Recv()
		wantCode(t, err, codes.Unavailable)
		if log := w.log.String(); !strings.Contains(log, "workload denied") || strings.Contains(log, "docker") {
			t.Errorf("got log %q, want one line of a denial without selectors", log)
		}
	})
	t.Run("what is certain is served, the rest follows", func(t *testing.T) {
		w := start(t)
		w.entry("/container", nil, image)
		w.entry("/user", nil, mine)
		w.evidence.set(unknown)
		st := x509Stream(t, w.workloadAPI())
		recv(t, st, "/user")
		w.evidence.set(known)
		recv(t, st, "/container", "/user")
	})
	t.Run("open stream keeps what it has", func(t *testing.T) {
		w := start(t)
		w.entry("/container", nil, image)
		user := w.entry("/user", nil, mine)
		w.evidence.set(known)
		st := x509Stream(t, w.workloadAPI())
		first := recv(t, st, "/container", "/user")
		w.evidence.set(unknown)
		w.entry("/later", nil, mine) // wakes the stream
		second := recv(t, st, "/container", "/user", "/later")
		if !bytes.Equal(first.Svids[0].X509Svid, second.Svids[0].X509Svid) {
			t.Error("an SVID was renewed that the evidence does not cover")
		}
		if _, err := w.Registry.Delete(context.Background(), user.ID); err != nil {
			t.Fatal(err)
		}
		recv(t, st, "/container", "/later")
	})
	t.Run("what is kept keeps its federated bundles", func(t *testing.T) {
		w := start(t)
		w.federate(foreign)
		w.entry("/container", federating, image)
		w.evidence.set(known)
		st := x509Stream(t, w.workloadAPI())
		recv(t, st, "/container")
		w.evidence.set(unknown)
		w.entry("/user", nil, mine)
		if r := recv(t, st, "/container", "/user"); len(r.FederatedBundles[foreign.IDString()]) == 0 {
			t.Error("the bundle is gone")
		}
	})
	t.Run("deleted entry goes although its kind is unknown", func(t *testing.T) {
		w := start(t)
		container := w.entry("/container", nil, image)
		w.entry("/user", nil, mine)
		w.evidence.set(known)
		st := x509Stream(t, w.workloadAPI())
		recv(t, st, "/container", "/user")
		w.evidence.set(unknown)
		if _, err := w.Registry.Delete(context.Background(), container.ID); err != nil {
			t.Fatal(err)
		}
		recv(t, st, "/user")
	})
	t.Run("changed entry is not what the SVID was issued under", func(t *testing.T) {
		w := start(t)
		container := w.entry("/container", nil, image)
		w.entry("/user", nil, mine)
		w.evidence.set(known)
		st := x509Stream(t, w.workloadAPI())
		recv(t, st, "/container", "/user")
		w.evidence.set(unknown)
		if _, err := w.Registry.Update(context.Background(), container.ID, func(e *registry.Entry) error {
			e.Path = "/renamed"
			return nil
		}); err != nil {
			t.Fatal(err)
		}
		recv(t, st, "/user")
	})
	t.Run("stream ends with Unavailable when its SVID does", func(t *testing.T) {
		t.Parallel()
		w := start(t, func(_ *Config, o *local.Options) { o.X509TTL = 5 * time.Second })
		w.entry("/container", nil, image)
		w.evidence.set(known)
		st := x509Stream(t, w.workloadAPI())
		recv(t, st, "/container")
		w.evidence.set(unknown)
		_, err := st.Recv()
		wantCode(t, err, codes.Unavailable)
	})
}

func TestTraced(t *testing.T) {
	traced := func(ev *attestor.Evidence) { ev.Traced = true }
	t.Run("new call is denied", func(t *testing.T) {
		w := start(t)
		w.entry("/a", nil, mine)
		w.evidence.set(traced)
		_, err := x509Stream(t, w.workloadAPI()).Recv()
		wantCode(t, err, codes.PermissionDenied)
	})
	t.Run("entry that allows it is served", func(t *testing.T) {
		w := start(t)
		w.entry("/a", nil, mine)
		w.entry("/debug", func(e *registry.Entry) { e.AllowTraced = true }, mine)
		w.evidence.set(traced)
		recv(t, x509Stream(t, w.workloadAPI()), "/debug")
	})
	t.Run("open stream keeps what it has while that lives", func(t *testing.T) {
		t.Parallel()
		w := start(t, func(_ *Config, o *local.Options) { o.X509TTL = 5 * time.Second })
		w.entry("/a", nil, mine)
		st := x509Stream(t, w.workloadAPI())
		begin := time.Now()
		recv(t, st, "/a")
		w.evidence.set(traced)
		_, err := st.Recv()
		wantCode(t, err, codes.Unavailable)
		if lived := time.Since(begin); lived < 3*time.Second {
			t.Errorf("the stream ended after %s, want not before its SVID", lived)
		}
	})
}

func TestProcessThatDoesNotHoldStillIsUnavailable(t *testing.T) {
	w := start(t)
	w.entry("/a", nil, mine)
	w.evidence.mu.Lock()
	w.evidence.err = errors.New("process changed while it was looked at")
	w.evidence.mu.Unlock()
	_, err := x509Stream(t, w.workloadAPI()).Recv()
	wantCode(t, err, codes.Unavailable)
}

func TestMain(m *testing.M) {
	if os.Getenv("ENDPOINT_TEST_CLIENT") != "" {
		os.Exit(client())
	}
	os.Exit(m.Run())
}
