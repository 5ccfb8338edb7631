package endpoint

import (
	"bytes"
	"context"
	"crypto"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	delegatedv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/agent/delegatedidentity/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/deputy-id/deputy/attestor"
	"github.com/deputy-id/deputy/attestor/peer"
	"github.com/deputy-id/deputy/svid"
	"github.com/deputy-id/deputy/svid/local"
	"github.com/deputy-id/deputy/svid/registry"
)

var (
	proxy   = attestor.Selector{Type: "unix", Value: "uid:9"}
	proxyID = spiffeid.RequireFromPath(domain, "/proxy")
	mesh    = attestor.Selector{Type: "cilium", Value: "mutual-auth"}
)

// A cast is an attestors that knows this process as the one that asks, and
// each other by its PID, as soon as the test has said what it is.
type cast struct {
	us *evidence

	mu     sync.Mutex
	told   sync.Cond
	others map[int32]*evidence
}

func (c *cast) of(p *peer.Process) *evidence {
	if int(p.PID()) == os.Getpid() {
		return c.us
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	for c.others[p.PID()] == nil {
		c.told.Wait()
	}
	return c.others[p.PID()]
}

func (c *cast) Kept(conn *peer.Conn) *attestor.Evidence { return c.of(conn.Process()).Kept(conn) }

func (c *cast) Attest(ctx context.Context, p *peer.Process) (*attestor.Evidence, error) {
	return c.of(p).Attest(ctx, p)
}

func (c *cast) Refresh(ctx context.Context, p *peer.Process) (*attestor.Evidence, error) {
	return c.of(p).Refresh(ctx, p)
}

// play says what another process is known as.
func (c *cast) play(pid int, selectors ...attestor.Selector) *evidence {
	e := &evidence{ev: attestor.Evidence{Selectors: selectors, Owner: "owner", Instance: strings.Repeat("b", 26)}}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.others[int32(pid)] = e
	c.told.Broadcast()
	return e
}

type lenders struct {
	*world
	cast   *cast
	socket string
	api    delegatedv1.DelegatedIdentityClient
}

// startLending serves the delegated socket; this process is the delegate.
func startLending(t testing.TB, change ...func(*Config, *local.Options)) *lenders {
	t.Helper()
	c := &cast{others: make(map[int32]*evidence)}
	c.told.L = &c.mu
	w := start(t, append(slices.Clone(change), func(config *Config, _ *local.Options) {
		c.us = config.Attestors.(*evidence)
		c.us.ev.Selectors = []attestor.Selector{proxy}
		config.Attestors, config.Borrowers.Delegates = c, []spiffeid.ID{proxyID}
	})...)
	socket := filepath.Join(t.TempDir(), "delegated.sock")
	l, err := peer.Listen(socket, w.Processes, peer.Options{Mode: 0o666, Group: -1, Admit: w.Admit})
	if err != nil {
		t.Fatal(err)
	}
	go w.ServeDelegated(l)
	w.entry("/proxy", nil, proxy)
	return &lenders{w, c, socket, delegatedv1.NewDelegatedIdentityClient(w.dial(socket))}
}

func spoken(in ...attestor.Selector) []*types.Selector {
	var out []*types.Selector
	for _, s := range in {
		out = append(out, &types.Selector{Type: s.Type, Value: s.Value})
	}
	return out
}

type delegatedStream = grpc.ServerStreamingClient[delegatedv1.SubscribeToX509SVIDsResponse]

func (w *lenders) subscribe(in *delegatedv1.SubscribeToX509SVIDsRequest) delegatedStream {
	w.t.Helper()
	st, err := w.api.SubscribeToX509SVIDs(call(w.t), in)
	if err != nil {
		w.t.Fatal(err)
	}
	return st
}

func (w *lenders) told(s ...attestor.Selector) delegatedStream {
	w.t.Helper()
	return w.subscribe(&delegatedv1.SubscribeToX509SVIDsRequest{Selectors: spoken(s...)})
}

func (w *lenders) pid(pid int) delegatedStream {
	w.t.Helper()
	return w.subscribe(&delegatedv1.SubscribeToX509SVIDsRequest{Pid: int32(pid)})
}

// lent reads the next message, checks each SVID in it, and wants these paths.
func (w *lenders) lent(st delegatedStream, want ...string) *delegatedv1.SubscribeToX509SVIDsResponse {
	w.t.Helper()
	r, err := st.Recv()
	if err != nil {
		w.t.Fatalf("got %v, want %q", err, want)
	}
	var got []string
	for _, x := range r.X509Svids {
		got = append(got, x.X509Svid.Id.Path)
		leaf, err := x509.ParseCertificate(x.X509Svid.CertChain[0])
		if err != nil {
			w.t.Fatal(err)
		}
		key, err := x509.ParsePKCS8PrivateKey(x.X509SvidKey)
		if err != nil {
			w.t.Fatal(err)
		}
		pub := key.(crypto.Signer).Public().(interface{ Equal(crypto.PublicKey) bool })
		if !pub.Equal(leaf.PublicKey) || leaf.URIs[0].String() != domain.IDString()+x.X509Svid.Id.Path || x.X509Svid.ExpiresAt != leaf.NotAfter.Unix() {
			w.t.Errorf("certificate, key and fields of %s do not belong together", x.X509Svid.Id.Path)
		}
	}
	if !slices.Equal(got, want) {
		w.t.Fatalf("got %q, want %q", got, want)
	}
	return r
}

func ended(t testing.TB, st delegatedStream, want codes.Code) string {
	t.Helper()
	r, err := st.Recv()
	if err == nil {
		t.Fatalf("got %d SVIDs, want %s", len(r.X509Svids), want)
	}
	wantCode(t, err, want)
	return status.Convert(err).Message()
}

func TestDelegateGetsWhatItsWordMatches(t *testing.T) {
	w := startLending(t)
	w.entry("/a", func(e *registry.Entry) { e.Hint = "first" }, mesh)
	w.entry("/narrower", nil, mesh, mine)
	st := w.told(mesh)
	if got := w.lent(st, "/a").X509Svids[0].X509Svid.Hint; got != "first" {
		t.Errorf("got hint %q, want first", got)
	}
	b := w.entry("/b", nil, mesh)
	w.lent(st, "/a", "/b")
	w.entry("/of-another", nil, other) // nobody is told
	if _, err := w.Registry.Delete(t.Context(), b.ID); err != nil {
		t.Fatal(err)
	}
	w.lent(st, "/a")
	w.lent(w.told(mesh, mine, mesh), "/a", "/narrower")
}

// As SPIRE has it, a delegate waits for entries that are still to come.
func TestNoEntryIsAnAnswerThatOthersFollow(t *testing.T) {
	w := startLending(t)
	st := w.told(mesh)
	w.lent(st)
	e := w.entry("/a", nil, mesh)
	w.lent(st, "/a")
	if _, err := w.Registry.Delete(t.Context(), e.ID); err != nil {
		t.Fatal(err)
	}
	w.lent(st)
	_, err := w.api.FetchJWTSVIDs(call(t), &delegatedv1.FetchJWTSVIDsRequest{Audience: []string{"x"}, Selectors: spoken(mesh)})
	wantCode(t, err, codes.PermissionDenied)
}

// What fills a template or names an instance must have been attested.
func TestDelegatesWordFillsNoTemplate(t *testing.T) {
	w := startLending(t)
	w.entry("/{{unix.user}}", nil, mesh)
	w.entry("/run", func(e *registry.Entry) { e.Instance = true }, mesh)
	w.entry("/a", nil, mesh)
	w.lent(w.told(mesh, attestor.Selector{Type: "unix", Value: "user:root"}), "/a")

	p := w.sleeper()
	w.cast.play(p.Process.Pid, mesh, attestor.Selector{Type: "unix", Value: "user:alice"})
	w.lent(w.pid(p.Process.Pid), "/alice", "/run/"+strings.Repeat("b", 26), "/a")
}

func TestDelegateHasKeysOfItsOwn(t *testing.T) {
	w := startLending(t)
	w.entry("/a", nil, mine)
	p := w.process()
	w.cast.play(p.Process.Pid, mine)
	p.says(t, "[/a]")
	first := w.lent(w.pid(p.Process.Pid), "/a")
	second := w.lent(w.pid(p.Process.Pid), "/a")
	keys := [][]byte{first.X509Svids[0].X509SvidKey, second.X509Svids[0].X509SvidKey}
	if bytes.Equal(keys[0], keys[1]) {
		t.Error("two streams share a key")
	}
	for _, s := range w.snapshot() {
		if m := s.x509.Load(); m != nil && (bytes.Contains(m.body, keys[0]) || bytes.Contains(m.body, keys[1])) {
			t.Error("the delegate has the key that the process has")
		}
	}
}

func (w *world) snapshot() (all []*session) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, s := range w.sessions {
		all = append(all, s)
	}
	return all
}

func TestDelegatesStreamEndsWithTheProcess(t *testing.T) {
	w := startLending(t)
	w.entry("/a", nil, mine)
	p := w.sleeper()
	w.cast.play(p.Process.Pid, mine)
	st := w.pid(p.Process.Pid)
	w.lent(st, "/a")
	p.in.Close()
	ended(t, st, codes.NotFound)
	p.Wait()
	ended(t, w.pid(p.Process.Pid), codes.NotFound)
	_, err := w.api.FetchJWTSVIDs(call(t), &delegatedv1.FetchJWTSVIDsRequest{Audience: []string{"x"}, Pid: int32(p.Process.Pid)})
	wantCode(t, err, codes.NotFound)
}

func TestPIDThatIsNoWorkload(t *testing.T) {
	w := startLending(t)
	w.entry("/a", nil, mine)
	w.entry("/root", nil, attestor.Selector{Type: "unix", Value: "uid:0"})
	ended(t, w.pid(-1), codes.InvalidArgument)
	ended(t, w.pid(os.Getpid()), codes.PermissionDenied) // the daemon is this process
	ended(t, w.pid(1<<30), codes.NotFound)
	task, err := filepath.Glob("/proc/self/task/*")
	if err != nil {
		t.Fatal(err)
	}
	for _, dir := range task {
		if tid, err := strconv.Atoi(filepath.Base(dir)); err == nil && tid != os.Getpid() {
			ended(t, w.pid(tid), codes.NotFound)
			break
		}
	}
	pid := kernelThread(t)
	w.cast.play(pid, attestor.Selector{Type: "unix", Value: "uid:0"})
	ended(t, w.pid(pid), codes.PermissionDenied)
}

func TestDenialOfADelegateNamesTheWorkload(t *testing.T) {
	w := startLending(t)
	w.entry("/a", nil, mine)
	p := w.sleeper()
	w.cast.play(p.Process.Pid, mine)
	st := w.pid(p.Process.Pid)
	w.lent(st, "/a")
	p.in.Close()
	ended(t, st, codes.NotFound)

	ended(t, w.pid(os.Getpid()), codes.PermissionDenied)
	ended(t, w.pid(1<<30), codes.NotFound)
	who := fmt.Sprintf("delegate denied: method=SubscribeToX509SVIDs pid=%d uid=%d ", os.Getpid(), os.Geteuid())
	for _, want := range []string{
		fmt.Sprintf(`%ssubject_pid=%d reason="PID is the daemon's own"`, who, os.Getpid()),
		fmt.Sprintf(`%ssubject_pid=%d reason="the workload is not there"`, who, 1<<30),
	} {
		eventually(t, want, func() bool { return strings.Contains(w.log.String(), want) })
	}
	if log := w.log.String(); strings.Contains(log, fmt.Sprintf("subject_pid=%d ", p.Process.Pid)) {
		t.Errorf("the end of a stream's workload is a denial:\n%s", log)
	}
}

// kernelThread finds one; its number is low where there are any.
func kernelThread(t testing.TB) int {
	t.Helper()
	for pid := 2; pid < 200; pid++ {
		if b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid)); err == nil {
			_, rest, _ := strings.Cut(string(b), ") ")
			if f := strings.Fields(rest); len(f) > 6 {
				if flags, _ := strconv.Atoi(f[6]); flags&0x200000 != 0 { // PF_KTHREAD
					return pid
				}
			}
		}
	}
	if os.Getenv("CI") != "" {
		t.Fatal("no kernel thread is visible: the tests need the PID namespace of the host")
	}
	t.Skip("SKIPPED: no kernel thread is visible here")
	return 0
}

func TestExactlyOneOfSelectorsAndPID(t *testing.T) {
	w := startLending(t)
	for name, in := range map[string]*delegatedv1.SubscribeToX509SVIDsRequest{
		"neither":         {},
		"both":            {Selectors: spoken(mine), Pid: 1},
		"no type":         {Selectors: []*types.Selector{{Value: "a"}}},
		"no value":        {Selectors: []*types.Selector{{Type: "a"}}},
		"colon in type":   {Selectors: []*types.Selector{{Type: "unix:uid", Value: "0"}}},
		"line break":      {Selectors: []*types.Selector{{Type: "unix", Value: "user:a\nb"}}},
		"too long":        {Selectors: []*types.Selector{{Type: "unix", Value: strings.Repeat("a", 9000)}}},
		"too many":        {Selectors: slices.Repeat(spoken(mine), maxTold+1)},
		"missing message": {Selectors: []*types.Selector{nil}},
	} {
		t.Run(name, func(t *testing.T) {
			ended(t, w.subscribe(in), codes.InvalidArgument)
			_, err := w.api.FetchJWTSVIDs(call(t), &delegatedv1.FetchJWTSVIDsRequest{Audience: []string{"x"}, Selectors: in.Selectors, Pid: in.Pid})
			wantCode(t, err, codes.InvalidArgument)
		})
	}
	_, err := w.api.FetchJWTSVIDs(call(t), &delegatedv1.FetchJWTSVIDsRequest{Selectors: spoken(mine)})
	wantCode(t, err, codes.InvalidArgument)
}

func TestWhoIsNoDelegateGetsNothing(t *testing.T) {
	w := startLending(t)
	w.entry("/a", nil, mine)
	all := func(t *testing.T, text string) {
		t.Helper()
		if got := ended(t, w.told(mine), codes.PermissionDenied); got != text {
			t.Errorf("got %q, want %q", got, text)
		}
		ended(t, w.subscribe(&delegatedv1.SubscribeToX509SVIDsRequest{}), codes.PermissionDenied) // before the request is looked at
		_, err := w.api.FetchJWTSVIDs(call(t), &delegatedv1.FetchJWTSVIDsRequest{Audience: []string{"x"}, Selectors: spoken(mine)})
		wantCode(t, err, codes.PermissionDenied)
		x, err := w.api.SubscribeToX509Bundles(call(t), &delegatedv1.SubscribeToX509BundlesRequest{})
		if err == nil {
			_, err = x.Recv()
		}
		wantCode(t, err, codes.PermissionDenied)
		j, err := w.api.SubscribeToJWTBundles(call(t), &delegatedv1.SubscribeToJWTBundlesRequest{})
		if err == nil {
			_, err = j.Recv()
		}
		wantCode(t, err, codes.PermissionDenied)
	}
	w.evidence.set(func(ev *attestor.Evidence) { ev.Selectors = []attestor.Selector{mine} })
	all(t, "caller not configured as an authorized delegate")
	w.evidence.set(func(ev *attestor.Evidence) { ev.Selectors = []attestor.Selector{other} })
	all(t, "no identity issued")
	w.evidence.set(func(ev *attestor.Evidence) { ev.Selectors, ev.Traced = []attestor.Selector{proxy}, true })
	all(t, "no identity issued")
	w.evidence.set(func(ev *attestor.Evidence) {
		ev.Selectors, ev.Traced = nil, false
		ev.Unknown = []attestor.Unknown{{Prefixes: []string{"unix:"}, Err: errors.New("no answer")}}
	})
	ended(t, w.told(mine), codes.Unavailable)
}

func TestDelegateThatIsNoneAnyMoreLosesItsStreams(t *testing.T) {
	w := startLending(t)
	w.entry("/a", nil, mine)
	st := w.told(mine)
	w.lent(st, "/a")
	bundles, err := w.api.SubscribeToX509Bundles(call(t), &delegatedv1.SubscribeToX509BundlesRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := bundles.Recv(); err != nil {
		t.Fatal(err)
	}
	set, _ := w.Registry.Set()
	for _, e := range set.Entries() {
		if e.Path == "/proxy" {
			if _, err := w.Registry.Delete(t.Context(), e.ID); err != nil {
				t.Fatal(err)
			}
		}
	}
	ended(t, st, codes.PermissionDenied)
	_, err = bundles.Recv()
	wantCode(t, err, codes.PermissionDenied)
}

func TestDelegateGetsTokens(t *testing.T) {
	w := startLending(t)
	w.entry("/a", func(e *registry.Entry) { e.Hint = "first" }, mesh)
	w.entry("/elsewhere", func(e *registry.Entry) { e.Audiences = []string{"y"} }, mesh)
	ask := func(audience ...string) *delegatedv1.FetchJWTSVIDsResponse {
		t.Helper()
		r, err := w.api.FetchJWTSVIDs(call(t), &delegatedv1.FetchJWTSVIDsRequest{Audience: audience, Selectors: spoken(mesh)})
		if err != nil {
			t.Fatal(err)
		}
		return r
	}
	r := ask("x")
	if len(r.Svids) != 1 || r.Svids[0].Id.Path != "/a" || r.Svids[0].Hint != "first" {
		t.Fatalf("got %v, want one of /a", r.Svids)
	}
	bundles, _ := w.authority.Bundles()
	id, claims, err := svid.Validate(r.Svids[0].Token, "x", bundles)
	if err != nil || id.Path() != "/a" {
		t.Fatalf("got %v, %v, want a token of /a", id, err)
	}
	if got, want := fmt.Sprintf("%v %v", claims["iat"], claims["exp"]), fmt.Sprintf("%d %d", r.Svids[0].IssuedAt, r.Svids[0].ExpiresAt); got != want {
		t.Errorf("got times %s in the token, %s beside it", got, want)
	}
	if again := ask("x"); again.Svids[0].Token == r.Svids[0].Token {
		t.Error("two calls share a token")
	}
	if r := ask("y"); len(r.Svids) != 2 {
		t.Errorf("got %v, want both", r.Svids)
	}
}

func TestDelegateGetsAllBundles(t *testing.T) {
	w := startLending(t)
	far := spiffeid.RequireTrustDomainFromString("far.example")
	st, err := w.api.SubscribeToX509Bundles(call(t), &delegatedv1.SubscribeToX509BundlesRequest{})
	if err != nil {
		t.Fatal(err)
	}
	r, err := st.Recv()
	own, _ := w.authority.Bundles()
	if err != nil || len(r.CaCertificates) != 1 || !bytes.Equal(r.CaCertificates[domain.IDString()], own.Own.DER()) {
		t.Fatalf("got %v, %v, want our bundle", r, err)
	}
	if err := w.authority.SetFederated(bundleOf(t, far)); err != nil {
		t.Fatal(err)
	}
	if r, err = st.Recv(); err != nil || len(r.CaCertificates) != 2 || len(r.CaCertificates[far.IDString()]) == 0 {
		t.Fatalf("got %v, %v, want both", r, err)
	}
	j, err := w.api.SubscribeToJWTBundles(call(t), &delegatedv1.SubscribeToJWTBundlesRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if r, err := j.Recv(); err != nil || len(r.Bundles) != 2 || !bytes.Contains(r.Bundles[domain.IDString()], []byte("jwt-svid")) {
		t.Fatalf("got %v, %v, want both", r, err)
	}
	w.entry("/far", func(e *registry.Entry) { e.FederatesWith = []spiffeid.TrustDomain{far} }, mesh)
	if got := w.lent(w.told(mesh), "/far").FederatesWith; !slices.Equal(got, []string{far.IDString()}) {
		t.Errorf("got %q, want %s", got, far.IDString())
	}
}

func TestLentSVIDIsRenewedUnderNewEvidence(t *testing.T) {
	t.Parallel()
	w := startLending(t, func(_ *Config, o *local.Options) { o.X509TTL = 5 * time.Second })
	w.entry("/a", nil, mine)
	p := w.sleeper()
	e := w.cast.play(p.Process.Pid, mine)
	st := w.pid(p.Process.Pid)
	first := w.lent(st, "/a")
	second := w.lent(st, "/a")
	if bytes.Equal(first.X509Svids[0].X509SvidKey, second.X509Svids[0].X509SvidKey) {
		t.Error("the renewed SVID has the old key")
	}
	if e.times() == 0 {
		t.Error("evidence was not gathered anew")
	}
	e.mu.Lock()
	e.ev.Selectors = []attestor.Selector{other} // seen only when gathered anew
	e.mu.Unlock()
	w.lent(st)
}

func TestLentStateFollowsWhatTheProcessBecomes(t *testing.T) {
	t.Parallel()
	w := startLending(t)
	w.entry("/a", nil, mine)
	w.entry("/b", nil, other)
	p := w.sleeper()
	e := w.cast.play(p.Process.Pid, mine)
	st := w.pid(p.Process.Pid)
	w.lent(st, "/a")
	e.set(func(ev *attestor.Evidence) { ev.Selectors = []attestor.Selector{other} }) // no entry changes
	w.lent(st, "/b")
}

func TestLentStateIsKeptWhileEvidenceIsUnknown(t *testing.T) {
	w := startLending(t)
	w.entry("/container", nil, image)
	p := w.sleeper()
	e := w.cast.play(p.Process.Pid, image)
	unknown := func(ev *attestor.Evidence) {
		ev.Selectors = nil
		ev.Unknown = []attestor.Unknown{{Prefixes: []string{"docker:"}, Err: errors.New("engine does not answer")}}
	}
	st := w.pid(p.Process.Pid)
	w.lent(st, "/container")
	e.set(unknown)
	ended(t, w.pid(p.Process.Pid), codes.Unavailable)
	w.entry("/later", nil, attestor.Selector{Type: "unix", Value: "uid:3"}) // wakes the stream
	e.set(func(ev *attestor.Evidence) {
		ev.Selectors, ev.Unknown = []attestor.Selector{image, {Type: "unix", Value: "uid:3"}}, nil
	})
	w.entry("/last", nil, image)
	for {
		r, err := st.Recv()
		if err != nil {
			t.Fatal(err)
		}
		if len(r.X509Svids) == 3 {
			break
		}
		if len(r.X509Svids) == 0 || r.X509Svids[0].X509Svid.Id.Path != "/container" {
			t.Fatalf("got %v, want what there was", r.X509Svids)
		}
	}
}

// Between the question and the answer a process may become another program,
// and signing takes as long as it takes.
func TestNothingIsLentOfAProcessThatChangedWhileItWasSigned(t *testing.T) {
	for name, c := range map[string]struct {
		becomes func(*process, *evidence)
		want    codes.Code
	}{
		"another": {func(_ *process, e *evidence) {
			e.set(func(ev *attestor.Evidence) { ev.Selectors = []attestor.Selector{other} })
		}, codes.Unavailable},
		"gone": {func(p *process, _ *evidence) {
			p.in.Close()
			p.Wait()
		}, codes.NotFound},
	} {
		t.Run(name, func(t *testing.T) {
			authority := &slow{}
			w := startLending(t, func(config *Config, _ *local.Options) {
				config.Lent = svid.NewKeeper(authority, svid.KeeperOptions{Log: hclog.NewNullLogger()})
			})
			authority.Authority = w.authority
			w.entry("/a", nil, mine)
			p := w.sleeper()
			e := w.cast.play(p.Process.Pid, mine)
			authority.before = func() { c.becomes(p, e) }
			ended(t, w.pid(p.Process.Pid), c.want)
		})
	}
}

func TestNothingIsLentToADelegateThatLostItsRoleWhileItWasSigned(t *testing.T) {
	authority := &slow{}
	w := startLending(t, func(c *Config, _ *local.Options) {
		c.Lent = svid.NewKeeper(authority, svid.KeeperOptions{Log: hclog.NewNullLogger()})
	})
	authority.Authority = w.authority
	w.entry("/a", nil, mine)
	authority.before = func() {
		w.evidence.set(func(ev *attestor.Evidence) { ev.Selectors = []attestor.Selector{mine} })
	}
	ended(t, w.told(mine), codes.PermissionDenied)
}

func TestDelegateThatExecutesAnotherProgramGetsNothingMore(t *testing.T) {
	w := startLending(t)
	w.entry("/a", nil, mine)
	p := w.run("lent:" + w.socket)
	w.cast.play(p.Process.Pid, proxy)
	p.says(t, "1")
	l := w.linkOf(p)
	p.execute() // with the connection open
	p.says(t, "executed")
	eventually(t, "the program is another", func() bool { return l.Check() != nil })
	// Sooner than that program ends.
	within(t, 8*time.Second, "its stream has ended, though there is nothing to say", func() bool { return w.budget.streams.Load() == 0 })
	w.entry("/b", nil, mine)
	if err := (&delegate{w.Server, l}).check(call(t)); status.Code(delegateStatus(err)) != codes.Unavailable {
		t.Errorf("got %v, want Unavailable", err)
	}
	eventually(t, "its connection is gone", func() bool {
		l.session.mu.Lock()
		defer l.session.mu.Unlock()
		return len(l.session.links) == 0
	})
}

func (w *world) linkOf(p *process) *link {
	w.t.Helper()
	for _, s := range w.snapshot() {
		if int(s.proc.PID()) != p.Process.Pid {
			continue
		}
		s.mu.Lock()
		defer s.mu.Unlock()
		for l := range s.links {
			return l
		}
	}
	w.t.Fatal("it is not connected")
	return nil
}

// A delegate in a PID namespace of its own means another process by a number.
func TestPIDsOfAnotherNamespaceAreRefused(t *testing.T) {
	if os.Getuid() != 0 {
		if os.Getenv("CI") != "" {
			t.Fatal("a PID namespace needs root")
		}
		t.Skip("SKIPPED: a PID namespace needs root")
	}
	w := startLending(t)
	w.entry("/a", nil, mine)
	p := w.runAs(&syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWPID}, "pid:"+w.socket)
	w.cast.play(p.Process.Pid, proxy)
	io.WriteString(p.in.(io.Writer), fmt.Sprintln(w.sleeperOf(mine)))
	p.says(t, "InvalidArgument")
	q := w.run("pid:" + w.socket)
	w.cast.play(q.Process.Pid, proxy)
	io.WriteString(q.in.(io.Writer), fmt.Sprintln(w.sleeperOf(mine)))
	q.says(t, "OK")
}

// sleeperOf starts a process of these selectors and returns its PID.
func (w *lenders) sleeperOf(s ...attestor.Selector) int {
	p := w.sleeper()
	w.cast.play(p.Process.Pid, s...)
	return p.Process.Pid
}

func TestLoansAreGivenBack(t *testing.T) {
	w := startLending(t)
	w.entry("/a", nil, mine)
	ctx, cancel := context.WithCancel(call(t))
	for range 3 {
		st, err := w.api.SubscribeToX509SVIDs(ctx, &delegatedv1.SubscribeToX509SVIDsRequest{Pid: int32(w.sleeperOf(mine))})
		if err != nil {
			t.Fatal(err)
		}
		w.lent(st, "/a")
	}
	cancel()
	eventually(t, "the streams and processes are given back", func() bool { return w.budget.streams.Load() == 0 && w.pins.Load() == 0 })
}

func TestProcessesHeldForOthersAreBounded(t *testing.T) {
	limits := DefaultLimits(1024, 2)
	limits.Connections = 16
	w := startLending(t, func(c *Config, _ *local.Options) { c.Limits = limits })
	w.entry("/a", nil, mine)
	for range 3 {
		w.lent(w.pid(w.sleeperOf(mine)), "/a")
	}
	pid := w.sleeperOf(mine)
	ended(t, w.pid(pid), codes.ResourceExhausted)
	w.lent(w.told(mine), "/a") // which holds none
	for _, gone := range []int{-1, os.Getpid(), 1 << 30} {
		w.pid(gone).Recv()
	}
	if got := w.pins.Load(); got != 3 {
		t.Errorf("got %d processes held, want 3", got)
	}
	// What one leaves another can have.
	another, leave := w.budget.hold("another")
	defer leave()
	r, err := w.pin(int32(pid), another)
	if err != nil {
		t.Fatal(err)
	}
	defer r.close()
	if _, err := w.pin(int32(pid), another); code(err) != codes.ResourceExhausted {
		t.Errorf("got %v, want that there is no room for a fifth", err)
	}
}

// borrow is the client's part of the tests above.
func borrow(c *grpc.ClientConn, what string) int {
	api := delegatedv1.NewDelegatedIdentityClient(c)
	if what == "pid" {
		var pid int32
		fmt.Scan(&pid)
		_, err := api.FetchJWTSVIDs(context.Background(), &delegatedv1.FetchJWTSVIDsRequest{Audience: []string{"x"}, Pid: pid})
		fmt.Println(status.Code(err))
		return 0
	}
	st, err := api.SubscribeToX509SVIDs(context.Background(), &delegatedv1.SubscribeToX509SVIDsRequest{Selectors: spoken(mine)})
	if err != nil {
		fmt.Println(err)
		return 1
	}
	r, err := st.Recv()
	if err != nil {
		fmt.Println(err)
		return 1
	}
	fmt.Println(len(r.X509Svids))
	os.Stdin.Read(make([]byte, 1))
	return execute()
}
