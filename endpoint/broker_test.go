package endpoint

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/exp/proto/spiffe/broker"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	healthv1 "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/deputy-id/deputy/attestor"
	"github.com/deputy-id/deputy/attestor/kubernetes"
	"github.com/deputy-id/deputy/attestor/peer"
	"github.com/deputy-id/deputy/svid"
	"github.com/deputy-id/deputy/svid/local"
	"github.com/deputy-id/deputy/svid/registry"
	"github.com/deputy-id/deputy/test/kubelet"
)

var (
	runtimeID = spiffeid.RequireFromPath(domain, "/runtime")
	far       = spiffeid.RequireTrustDomainFromString("far.example")
	farID     = spiffeid.RequireFromPath(far, "/runtime")
)

type brokers struct {
	*world
	cast         *cast
	kubelet      *kubelet.Kubelet
	unix, tcp    string
	conn         *grpc.ClientConn // of a broker on the list, as the next two
	api, overTCP broker.APIClient
}

// startBrokering serves the Broker API on both kinds of listeners.
func startBrokering(t testing.TB, change ...func(*Config, *local.Options)) *brokers {
	t.Helper()
	pods, err := os.ReadFile("../attestor/kubernetes/testdata/kubernetes-1.34-containerd-1.6-pods.json")
	if err != nil {
		t.Fatal(err)
	}
	k := kubelet.Start(t, pods)
	node, err := kubernetes.New(kubernetes.Options{URL: k.URL, TokenFile: k.TokenFile, CAFile: k.CAFile})
	if err != nil {
		t.Fatal(err)
	}
	both := References{PID: true, Kubernetes: true}
	side := &Brokering{Pods: node}
	c := &cast{others: make(map[int32]*evidence)}
	c.told.L = &c.mu
	w := start(t, append(slices.Clone(change), func(config *Config, _ *local.Options) {
		c.us = config.Attestors.(*evidence)
		config.Attestors, config.Brokering = c, side
		config.Borrowers.Brokers = []Broker{
			{ID: runtimeID, References: both, OverTCP: References{Kubernetes: true}},
			{ID: farID, References: both, OverTCP: both},
			{ID: spiffeid.RequireFromPath(domain, "/pids"), References: References{PID: true}},
		}
	})...)
	self := svid.NewSelf(w.authority.Node(), registry.NodeID(domain), nil)
	t.Cleanup(func() { self.Close() })
	side.Identity = self

	b := &brokers{world: w, cast: c, kubelet: k, unix: filepath.Join(t.TempDir(), "broker.sock")}
	l, err := peer.Listen(b.unix, w.Processes, peer.Options{Mode: 0o666, Group: -1, Admit: w.Admit})
	if err != nil {
		t.Fatal(err)
	}
	tcp, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	b.tcp = tcp.Addr().String()
	go w.ServeBroker(l)
	go w.ServeBroker(tcp)
	runtime := b.svid(runtimeID, time.Hour)
	b.conn = b.dial("unix://"+b.unix, runtime)
	b.api, b.overTCP = broker.NewAPIClient(b.conn), b.connect(b.tcp, runtime)
	return b
}

// svid has the authority sign for a broker.
func (b *brokers) svid(id spiffeid.ID, ttl time.Duration) *x509svid.SVID {
	b.t.Helper()
	return signed(b.t, b.authority, id, ttl)
}

func signed(t testing.TB, a svid.Authority, id spiffeid.ID, ttl time.Duration) *x509svid.SVID {
	t.Helper()
	key := newKey(t)
	chain, err := a.X509(t.Context(), registry.Entry{ID: "broker", SPIFFEID: id, X509TTL: ttl}, key)
	if err != nil {
		t.Fatal(err)
	}
	return &x509svid.SVID{ID: id, Certificates: chain, PrivateKey: key}
}

func newKey(t testing.TB) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

// connect is a client that wants to speak to the daemon itself.
func (b *brokers) connect(target string, id *x509svid.SVID) broker.APIClient {
	b.t.Helper()
	return broker.NewAPIClient(b.dial(target, id))
}

func (b *brokers) dial(target string, id *x509svid.SVID) *grpc.ClientConn {
	b.t.Helper()
	return b.dialTLS(target, tlsconfig.MTLSClientConfig(id, b.Brokering.Identity, tlsconfig.AuthorizeID(registry.NodeID(domain))))
}

func (b *brokers) connectTLS(target string, c *tls.Config) broker.APIClient {
	b.t.Helper()
	return broker.NewAPIClient(b.dialTLS(target, c))
}

func (b *brokers) dialTLS(target string, c *tls.Config) *grpc.ClientConn {
	b.t.Helper()
	conn, err := grpc.NewClient(target, grpc.WithTransportCredentials(credentials.NewTLS(c)))
	if err != nil {
		b.t.Fatal(err)
	}
	b.t.Cleanup(func() { conn.Close() })
	return conn
}

func brokerCall(t testing.TB) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	t.Cleanup(cancel)
	return metadata.AppendToOutgoingContext(ctx, "broker.spiffe.io", "true")
}

func refer(t testing.TB, m proto.Message) *broker.WorkloadReference {
	t.Helper()
	one, err := anypb.New(m)
	if err != nil {
		t.Fatal(err)
	}
	return &broker.WorkloadReference{Reference: one}
}

func toPID(t testing.TB, pid int) *broker.WorkloadReference {
	return refer(t, &broker.WorkloadPIDReference{Pid: int32(pid)})
}

func toPod(t testing.TB, name, uid string) *broker.WorkloadReference {
	m := &broker.KubernetesObjectReference{Type: &broker.KubernetesObjectType{Plural: "pods", Group: "core"}, Uid: uid}
	if name != "" {
		m.Key = &broker.KubernetesObjectKey{Namespace: "default", Name: name}
	}
	return refer(t, m)
}

type brokerStream = grpc.ServerStreamingClient[broker.SubscribeToX509SVIDResponse]

func subscribe(t testing.TB, api broker.APIClient, ref *broker.WorkloadReference) brokerStream {
	t.Helper()
	st, err := api.SubscribeToX509SVID(brokerCall(t), &broker.SubscribeToX509SVIDRequest{Reference: ref})
	if err != nil {
		t.Fatal(err)
	}
	return st
}

// brokered reads the next message, checks each SVID in it, and wants these paths.
func brokered(t testing.TB, st brokerStream, want ...string) *broker.SubscribeToX509SVIDResponse {
	t.Helper()
	r, err := st.Recv()
	if err != nil {
		t.Fatalf("got %v, want %q", err, want)
	}
	var got []string
	for _, x := range r.Svids {
		got = append(got, strings.TrimPrefix(x.SpiffeId, domain.IDString()))
		one, err := x509svid.ParseRaw(x.X509Svid, x.X509SvidKey)
		if err != nil || one.ID.String() != x.SpiffeId {
			t.Errorf("got %v, %v, want an SVID of %s", one, err, x.SpiffeId)
		}
		if len(x.Bundle) == 0 {
			t.Error("there is no bundle")
		}
	}
	if !slices.Equal(got, want) {
		t.Fatalf("got %q, want %q", got, want)
	}
	return r
}

// wantReason wants a status with the standard's reason, "" for none.
func wantReason(t testing.TB, err error, want codes.Code, reason string) {
	t.Helper()
	st := status.Convert(err)
	got := ""
	for _, d := range st.Details() {
		if info, ok := d.(*errdetails.ErrorInfo); ok && info.Domain == "spiffe.io" {
			got = info.Reason
		}
	}
	if st.Code() != want || got != reason {
		t.Errorf("got %v with %q, want %v with %q", err, got, want, reason)
	}
}

func wantEnd(t testing.TB, st brokerStream, want codes.Code, reason string) {
	t.Helper()
	r, err := st.Recv()
	if err == nil {
		t.Fatalf("got %d SVIDs, want %v", len(r.Svids), want)
	}
	wantReason(t, err, want, reason)
}

func (b *brokers) sleeperOf(s ...attestor.Selector) (*process, int) {
	p := b.sleeper()
	b.cast.play(p.Process.Pid, s...)
	return p, p.Process.Pid
}

func TestBrokerGetsTheSVIDsOfAProcess(t *testing.T) {
	b := startBrokering(t)
	b.entry("/a", func(e *registry.Entry) { e.Hint = "first" }, mine)
	p := b.process()
	b.cast.play(p.Process.Pid, mine)
	p.says(t, "[/a]")
	st := subscribe(t, b.api, toPID(t, p.Process.Pid))
	r := brokered(t, st, "/a")
	if r.Svids[0].Hint != "first" {
		t.Errorf("got hint %q, want first", r.Svids[0].Hint)
	}
	for _, s := range b.snapshot() {
		if m := s.x509.Load(); m != nil && bytes.Contains(m.body, r.Svids[0].X509SvidKey) {
			t.Error("the broker has the key that the process has")
		}
	}
	if err := b.authority.SetFederated(bundleOf(t, far)); err != nil {
		t.Fatal(err)
	}
	b.entry("/b", func(e *registry.Entry) { e.FederatesWith = []spiffeid.TrustDomain{far} }, mine)
	if r = brokered(t, st, "/a", "/b"); len(r.FederatedBundles[far.IDString()]) == 0 {
		t.Error("the bundle of the other trust domain is missing")
	}
	p.in.Close()
	wantEnd(t, st, codes.NotFound, "WORKLOAD_NOT_FOUND") // Broker API §4.9
}

func TestBrokerGetsBundlesOfTheWorkload(t *testing.T) {
	b := startBrokering(t)
	b.entry("/a", nil, mine)
	p, pid := b.sleeperOf(mine)
	x, err := b.api.SubscribeToX509Bundles(brokerCall(t), &broker.SubscribeToX509BundlesRequest{Reference: toPID(t, pid)})
	if err != nil {
		t.Fatal(err)
	}
	own, _ := b.authority.Bundles()
	if r, err := x.Recv(); err != nil || len(r.Bundles) != 1 || !bytes.Equal(r.Bundles[domain.IDString()], own.Own.DER()) {
		t.Fatalf("got %v, %v, want our bundle", r, err)
	}
	if err := b.authority.SetFederated(bundleOf(t, far)); err != nil {
		t.Fatal(err)
	}
	b.entry("/b", func(e *registry.Entry) { e.FederatesWith = []spiffeid.TrustDomain{far} }, mine)
	if r, err := x.Recv(); err != nil || len(r.Bundles) != 2 {
		t.Fatalf("got %v, %v, want both", r, err)
	}
	j, err := b.api.SubscribeToJWTBundles(brokerCall(t), &broker.SubscribeToJWTBundlesRequest{Reference: toPID(t, pid)})
	if err != nil {
		t.Fatal(err)
	}
	if r, err := j.Recv(); err != nil || len(r.Bundles) != 2 || !bytes.Contains(r.Bundles[domain.IDString()], []byte("jwt-svid")) {
		t.Fatalf("got %v, %v, want both", r, err)
	}
	p.in.Close()
	_, err = x.Recv()
	wantReason(t, err, codes.NotFound, "WORKLOAD_NOT_FOUND")
	_, err = j.Recv()
	wantReason(t, err, codes.NotFound, "WORKLOAD_NOT_FOUND")
}

func TestBrokerGetsTokens(t *testing.T) {
	b := startBrokering(t)
	b.entry("/a", nil, mine)
	b.entry("/b", func(e *registry.Entry) { e.Audiences, e.Hint = []string{"y"}, "second" }, mine)
	b.entry("/c", nil, other)
	_, pid := b.sleeperOf(mine)
	ask := func(id string, audience ...string) (*broker.FetchJWTSVIDResponse, error) {
		return b.api.FetchJWTSVID(brokerCall(t), &broker.FetchJWTSVIDRequest{Reference: toPID(t, pid), Audience: audience, SpiffeId: id})
	}
	r, err := ask("", "y")
	if err != nil || len(r.Svids) != 2 || r.Svids[1].Hint != "second" {
		t.Fatalf("got %v, %v, want both", r, err)
	}
	bundles, _ := b.authority.Bundles()
	if id, _, err := svid.Validate(r.Svids[0].Svid, "y", bundles); err != nil || id.String() != r.Svids[0].SpiffeId {
		t.Errorf("got %v, %v, want a token of %s", id, err, r.Svids[0].SpiffeId)
	}
	if r, err = ask(domain.IDString()+"/b", "y"); err != nil || len(r.Svids) != 1 || r.Svids[0].SpiffeId != domain.IDString()+"/b" {
		t.Errorf("got %v, %v, want the one that was asked for", r, err)
	}
	_, err = ask(domain.IDString()+"/c", "y") // there, and somebody else's
	wantReason(t, err, codes.PermissionDenied, "WORKLOAD_NOT_ENTITLED")
	_, err = ask(domain.IDString()+"/d", "y")
	wantReason(t, err, codes.PermissionDenied, "WORKLOAD_NOT_ENTITLED")
	_, err = ask(domain.IDString()+"/b", "x")
	wantReason(t, err, codes.PermissionDenied, "WORKLOAD_NOT_ENTITLED")
	_, err = ask("b", "y")
	wantReason(t, err, codes.InvalidArgument, "")
	_, err = ask("")
	wantReason(t, err, codes.InvalidArgument, "")
}

func TestWorkloadWithoutIdentityIsNotEntitled(t *testing.T) {
	b := startBrokering(t)
	e := b.entry("/a", nil, mine)
	_, pid := b.sleeperOf(other)
	wantEnd(t, subscribe(t, b.api, toPID(t, pid)), codes.PermissionDenied, "WORKLOAD_NOT_ENTITLED")
	_, err := b.api.FetchJWTSVID(brokerCall(t), &broker.FetchJWTSVIDRequest{Reference: toPID(t, pid), Audience: []string{"x"}})
	wantReason(t, err, codes.PermissionDenied, "WORKLOAD_NOT_ENTITLED")
	x, err := b.api.SubscribeToX509Bundles(brokerCall(t), &broker.SubscribeToX509BundlesRequest{Reference: toPID(t, pid)})
	if err == nil {
		_, err = x.Recv()
	}
	wantReason(t, err, codes.PermissionDenied, "WORKLOAD_NOT_ENTITLED")
	// And one that had one.
	_, pid = b.sleeperOf(mine)
	st := subscribe(t, b.api, toPID(t, pid))
	brokered(t, st, "/a")
	if _, err := b.Registry.Delete(t.Context(), e.ID); err != nil {
		t.Fatal(err)
	}
	wantEnd(t, st, codes.PermissionDenied, "WORKLOAD_NOT_ENTITLED")
}

// A denial names who asked and whom it was about; that a stream's workload has
// ended is none.
func TestDenialOfABrokerNamesTheWorkload(t *testing.T) {
	b := startBrokering(t)
	b.entry("/a", nil, mine)
	_, stranger := b.sleeperOf(other)
	p, pid := b.sleeperOf(mine)
	st := subscribe(t, b.api, toPID(t, pid))
	brokered(t, st, "/a")
	p.in.Close()
	wantEnd(t, st, codes.NotFound, "WORKLOAD_NOT_FOUND")

	wantEnd(t, subscribe(t, b.api, toPID(t, stranger)), codes.PermissionDenied, "WORKLOAD_NOT_ENTITLED")
	wantEnd(t, subscribe(t, b.api, toPID(t, 1<<30)), codes.NotFound, "WORKLOAD_NOT_FOUND")
	wantEnd(t, subscribe(t, b.overTCP, toPod(t, "gone", "a48063ad-dca3-4b43-b65f-205129594ef3")), codes.NotFound, "WORKLOAD_NOT_FOUND")
	who := fmt.Sprintf("broker denied: method=SubscribeToX509SVID spiffe_id=%s ", runtimeID)
	unix := fmt.Sprintf("%spid=%d uid=%d ", who, os.Getpid(), os.Geteuid())
	for _, want := range []string{
		fmt.Sprintf(`%ssubject_pid=%d reason="no identity issued"`, unix, stranger),
		fmt.Sprintf(`%ssubject_pid=%d reason="the workload is not there"`, unix, 1<<30),
		who + `subject_namespace=default subject_pod=gone subject_uid=a48063ad-dca3-4b43-b65f-205129594ef3 reason="the workload is not there"`,
	} {
		eventually(t, want, func() bool { return strings.Contains(b.log.String(), want) })
	}
	if log := b.log.String(); strings.Contains(log, fmt.Sprintf("subject_pid=%d ", pid)) {
		t.Errorf("the end of a stream's workload is a denial:\n%s", log)
	}
}

func TestReferencesThatNameNobody(t *testing.T) {
	b := startBrokering(t)
	b.entry("/a", nil, mine)
	b.entry("/root", nil, attestor.Selector{Type: "unix", Value: "uid:0"})
	good := &broker.KubernetesObjectReference{
		Type: &broker.KubernetesObjectType{Plural: "pods", Group: "core"},
		Key:  &broker.KubernetesObjectKey{Namespace: "default", Name: "demo"},
	}
	object := func(change func(*broker.KubernetesObjectReference)) *broker.WorkloadReference {
		m := proto.Clone(good).(*broker.KubernetesObjectReference)
		change(m)
		return refer(t, m)
	}
	raw := func(typ string, value []byte) *broker.WorkloadReference {
		return &broker.WorkloadReference{Reference: &anypb.Any{TypeUrl: typ, Value: value}}
	}
	const pidURL, invalid = "type.googleapis.com/spiffe.broker.WorkloadPIDReference", "WORKLOAD_REFERENCE_INVALID"
	field := protowire.AppendVarint(protowire.AppendTag(nil, 9, protowire.VarintType), 1)
	beside := toPID(t, 1<<30)
	beside.Reference.ProtoReflect().SetUnknown(field)
	for name, c := range map[string]struct {
		ref    *broker.WorkloadReference
		code   codes.Code
		reason string
	}{
		"none":                   {nil, codes.InvalidArgument, invalid},
		"empty":                  {&broker.WorkloadReference{}, codes.InvalidArgument, invalid},
		"no type":                {raw("", nil), codes.InvalidArgument, invalid},
		"unknown type":           {raw("type.googleapis.com/example.Tag", nil), codes.InvalidArgument, invalid},
		"known, no reference":    {refer(t, wrapperspb.Int32(4)), codes.InvalidArgument, invalid},
		"a reference in another": {refer(t, toPID(t, os.Getppid())), codes.InvalidArgument, invalid},
		"malformed":              {raw(pidURL, []byte{0xff}), codes.InvalidArgument, invalid},
		"field beside":           {beside, codes.InvalidArgument, invalid},
		"another field":          {raw(pidURL, append([]byte{8, 1}, field...)), codes.InvalidArgument, invalid},
		"PID 0":                  {toPID(t, 0), codes.InvalidArgument, invalid},
		"negative PID":           {toPID(t, -1), codes.InvalidArgument, invalid},
		"no such PID":            {toPID(t, 1<<30), codes.NotFound, "WORKLOAD_NOT_FOUND"},
		"the daemon":             {toPID(t, os.Getpid()), codes.PermissionDenied, "WORKLOAD_NOT_ENTITLED"},
		"no object type":         {object(func(m *broker.KubernetesObjectReference) { m.Type = nil }), codes.InvalidArgument, invalid},
		"no group":               {object(func(m *broker.KubernetesObjectReference) { m.Type.Group = "" }), codes.InvalidArgument, invalid},
		"no plural":              {object(func(m *broker.KubernetesObjectReference) { m.Type.Plural = "" }), codes.InvalidArgument, invalid},
		"another object":         {object(func(m *broker.KubernetesObjectReference) { m.Type.Plural = "deployments" }), codes.InvalidArgument, invalid},
		"another group":          {object(func(m *broker.KubernetesObjectReference) { m.Type.Group = "apps" }), codes.InvalidArgument, invalid},
		"neither key nor uid":    {object(func(m *broker.KubernetesObjectReference) { m.Key = nil }), codes.InvalidArgument, invalid},
		"no name":                {object(func(m *broker.KubernetesObjectReference) { m.Key.Name = "" }), codes.InvalidArgument, invalid},
		"no namespace":           {object(func(m *broker.KubernetesObjectReference) { m.Key.Namespace = "" }), codes.InvalidArgument, invalid},
		"long name":              {object(func(m *broker.KubernetesObjectReference) { m.Key.Name = strings.Repeat("a", 254) }), codes.InvalidArgument, invalid},
		"uid that is none":       {object(func(m *broker.KubernetesObjectReference) { m.Uid = "demo" }), codes.InvalidArgument, invalid},
		"field within": {object(func(m *broker.KubernetesObjectReference) { m.Key.ProtoReflect().SetUnknown(field) }),
			codes.InvalidArgument, invalid},
		"no such pod":   {object(func(m *broker.KubernetesObjectReference) { m.Key.Name = "gone" }), codes.NotFound, "WORKLOAD_NOT_FOUND"},
		"another's UID": {object(func(m *broker.KubernetesObjectReference) { m.Uid = "a48063ad-dca3-4b43-b65f-205129594ef3" }), codes.NotFound, "WORKLOAD_NOT_FOUND"},
	} {
		t.Run(name, func(t *testing.T) {
			wantEnd(t, subscribe(t, b.api, c.ref), c.code, c.reason)
			_, err := b.api.FetchJWTSVID(brokerCall(t), &broker.FetchJWTSVIDRequest{Reference: c.ref, Audience: []string{"x"}})
			wantReason(t, err, c.code, c.reason)
		})
	}
	t.Run("a kernel thread", func(t *testing.T) {
		pid := kernelThread(t)
		b.cast.play(pid, attestor.Selector{Type: "unix", Value: "uid:0"})
		wantEnd(t, subscribe(t, b.api, toPID(t, pid)), codes.PermissionDenied, "WORKLOAD_NOT_ENTITLED")
	})
}

// A number that is given again is another process's.
func TestPIDIsNotTrustedOnceItsProcessIsGone(t *testing.T) {
	b := startBrokering(t)
	b.entry("/a", nil, mine)
	p, pid := b.sleeperOf(mine)
	st := subscribe(t, b.api, toPID(t, pid))
	brokered(t, st, "/a")
	p.in.Close()
	p.Wait()
	again := false
	for range 20 { // somebody else may be quicker
		if err := os.WriteFile("/proc/sys/kernel/ns_last_pid", fmt.Append(nil, pid-1), 0); err != nil {
			break // not root
		}
		if again = b.sleeper().Process.Pid == pid; again {
			b.cast.play(pid, mine)
			brokered(t, subscribe(t, b.api, toPID(t, pid)), "/a") // for who names it now
			break
		}
	}
	if !again && os.Getuid() == 0 {
		t.Error("the number was not given again")
	}
	wantEnd(t, st, codes.NotFound, "WORKLOAD_NOT_FOUND")
}

func TestReferencesThatAreNotForThisBroker(t *testing.T) {
	b := startBrokering(t)
	b.entry("/a", nil, mine)
	b.entry("/demo", nil, attestor.Selector{Type: "k8s", Value: "pod-name:demo"})
	_, pid := b.sleeperOf(mine)
	wantEnd(t, subscribe(t, b.overTCP, toPID(t, pid)), codes.PermissionDenied, "")
	brokered(t, subscribe(t, b.overTCP, toPod(t, "demo", "")), "/demo")
	pids := b.connect("unix://"+b.unix, b.svid(spiffeid.RequireFromPath(domain, "/pids"), time.Hour))
	brokered(t, subscribe(t, pids, toPID(t, pid)), "/a")
	wantEnd(t, subscribe(t, pids, toPod(t, "demo", "")), codes.PermissionDenied, "")

	link := &brokerLink{s: b.Server, id: runtimeID, until: time.Now().Add(time.Hour), over: make(chan struct{}), elsewhere: true}
	_, err := (&brokerAPI{s: b.Server}).lend(link, toPID(t, pid))
	wantReason(t, brokerStatus(err), codes.InvalidArgument, "WORKLOAD_REFERENCE_INVALID")
	b.Brokering.Pods = nil
	wantEnd(t, subscribe(t, b.api, toPod(t, "demo", "")), codes.InvalidArgument, "WORKLOAD_REFERENCE_INVALID")
}

func TestHeaderAgainstForwardedCalls(t *testing.T) {
	b := startBrokering(t)
	for name, pairs := range map[string][]string{
		"none":          nil,
		"another value": {"broker.spiffe.io", "True"},
		"twice":         {"broker.spiffe.io", "true", "broker.spiffe.io", "true"},
		"the other":     {"workload.spiffe.io", "true"},
	} {
		t.Run(name, func(t *testing.T) {
			ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
			defer cancel()
			ctx = metadata.AppendToOutgoingContext(ctx, pairs...)
			_, err := b.api.FetchJWTSVID(ctx, &broker.FetchJWTSVIDRequest{Reference: toPID(t, 1), Audience: []string{"x"}})
			wantReason(t, err, codes.InvalidArgument, "")
			_, err = healthv1.NewHealthClient(b.conn).Check(ctx, &healthv1.HealthCheckRequest{})
			wantReason(t, err, codes.InvalidArgument, "") // SPIFFE Broker Endpoint §3: every request
		})
	}
}

// Health and reflection are for brokers, too, and take their share.
func TestWhoIsNoBrokerWatchesNothing(t *testing.T) {
	b := startBrokering(t)
	watch := func(conn *grpc.ClientConn) (*healthv1.HealthCheckResponse, error) {
		st, err := healthv1.NewHealthClient(conn).Watch(brokerCall(t), &healthv1.HealthCheckRequest{})
		if err != nil {
			return nil, err
		}
		return st.Recv()
	}
	if r, err := watch(b.conn); err != nil || r.Status != healthv1.HealthCheckResponse_SERVING {
		t.Errorf("got %v, %v, want SERVING", r, err)
	}
	if got := b.budget.streams.Load(); got != 1 {
		t.Errorf("%d streams are counted, want 1", got)
	}
	_, err := watch(b.dial("unix://"+b.unix, b.svid(spiffeid.RequireFromPath(domain, "/other"), time.Hour)))
	wantReason(t, err, codes.PermissionDenied, "")
}

// selfSigned makes a certificate with the right ID that nobody vouches for,
// or that somebody does.
func selfSigned(t testing.TB, id string, change func(*x509.Certificate)) *x509svid.SVID {
	t.Helper()
	key := newKey(t)
	u, err := url.Parse(id)
	if err != nil {
		t.Fatal(err)
	}
	c := &x509.Certificate{
		SerialNumber: big.NewInt(1), URIs: []*url.URL{u}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}, BasicConstraintsValid: true,
	}
	parent, signer := c, crypto.Signer(key)
	if change != nil {
		change(c)
	}
	return certified(t, c, parent, key, signer)
}

func certified(t testing.TB, c, parent *x509.Certificate, key *ecdsa.PrivateKey, signer crypto.Signer) *x509svid.SVID {
	t.Helper()
	der, err := x509.CreateCertificate(rand.Reader, c, parent, key.Public(), signer)
	if err != nil {
		t.Fatal(err)
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return &x509svid.SVID{Certificates: []*x509.Certificate{leaf}, PrivateKey: key}
}

func TestWhoIsNoBrokerGetsNothing(t *testing.T) {
	b := startBrokering(t)
	b.entry("/a", nil, mine)
	_, pid := b.sleeperOf(mine)
	foreign, err := local.Open(t.Context(), local.Options{TrustDomain: domain, Memory: true, CATTL: time.Hour})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { foreign.Close() })
	unlisted := spiffeid.RequireTrustDomainFromString("unlisted.example")
	friend, err := local.Open(t.Context(), local.Options{TrustDomain: unlisted, Memory: true, CATTL: time.Hour})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { friend.Close() })
	theirs, _ := friend.Bundles()
	if err := b.authority.SetFederated(theirs.Own); err != nil {
		t.Fatal(err)
	}
	// A CA of a federated, listed trust domain that signs what it should not.
	farKey := newKey(t)
	farCA := certified(t, &x509.Certificate{
		SerialNumber: big.NewInt(1), URIs: []*url.URL{far.ID().URL()}, NotBefore: time.Now().Add(-2 * time.Hour), NotAfter: time.Now().Add(time.Hour),
		KeyUsage: x509.KeyUsageCertSign, IsCA: true, BasicConstraintsValid: true,
	}, &x509.Certificate{SerialNumber: big.NewInt(1)}, farKey, farKey).Certificates[0]
	if err := b.authority.SetFederated(&svid.Bundle{TrustDomain: far, X509Authorities: []*x509.Certificate{farCA}}); err != nil {
		t.Fatal(err)
	}
	byFar := func(id string, change func(*x509.Certificate)) *x509svid.SVID {
		key := newKey(t)
		u, err := url.Parse(id)
		if err != nil {
			t.Fatal(err)
		}
		c := &x509.Certificate{
			SerialNumber: big.NewInt(2), URIs: []*url.URL{u}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
			KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}, BasicConstraintsValid: true,
		}
		if change != nil {
			change(c)
		}
		return certified(t, c, farCA, key, farKey)
	}
	for name, c := range map[string]struct {
		svid *x509svid.SVID
		want codes.Code
	}{
		"on the list":               {b.svid(runtimeID, time.Hour), codes.OK},
		"of the list's other TD":    {byFar(farID.String(), nil), codes.OK},
		"not on the list":           {b.svid(spiffeid.RequireFromPath(domain, "/runtime-2"), time.Hour), codes.PermissionDenied},
		"below one on the list":     {b.svid(spiffeid.RequireFromPath(domain, "/runtime/x"), time.Hour), codes.PermissionDenied},
		"no certificate":            {nil, codes.Unavailable},
		"of a CA that is not ours":  {signed(t, foreign, runtimeID, time.Hour), codes.Unavailable},
		"self-signed":               {selfSigned(t, runtimeID.String(), nil), codes.Unavailable},
		"self-signed CA":            {selfSigned(t, runtimeID.String(), func(c *x509.Certificate) { c.IsCA, c.KeyUsage = true, c.KeyUsage|x509.KeyUsageCertSign }), codes.Unavailable},
		"ours, of another's CA":     {byFar(runtimeID.String(), nil), codes.Unavailable},
		"federated, not on it":      {signed(t, friend, spiffeid.RequireFromPath(unlisted, "/runtime"), time.Hour), codes.Unavailable},
		"expired":                   {byFar(farID.String(), func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Minute) }), codes.Unavailable},
		"not valid yet":             {byFar(farID.String(), func(c *x509.Certificate) { c.NotBefore = time.Now().Add(time.Minute) }), codes.Unavailable},
		"of the trust domain":       {byFar(far.IDString(), nil), codes.Unavailable},
		"two IDs":                   {byFar(farID.String(), func(c *x509.Certificate) { c.URIs = append(c.URIs, c.URIs[0]) }), codes.Unavailable},
		"a CA":                      {byFar(farID.String(), func(c *x509.Certificate) { c.IsCA = true }), codes.Unavailable},
		"key for no signatures":     {byFar(farID.String(), func(c *x509.Certificate) { c.KeyUsage = x509.KeyUsageKeyEncipherment }), codes.Unavailable},
		"certificate for servers":   {byFar(farID.String(), func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth} }), codes.Unavailable},
		"certificate for all there": {byFar(farID.String(), func(c *x509.Certificate) { c.ExtKeyUsage = nil }), codes.OK},
	} {
		t.Run(name, func(t *testing.T) {
			config := &tls.Config{InsecureSkipVerify: true} // the attacker does not mind
			if c.svid != nil {
				one := tls.Certificate{PrivateKey: c.svid.PrivateKey}
				for _, x := range c.svid.Certificates {
					one.Certificate = append(one.Certificate, x.Raw)
				}
				config.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &one, nil }
			}
			for _, target := range []string{"unix://" + b.unix, b.tcp} {
				api := b.connectTLS(target, config)
				_, err := api.FetchJWTSVID(brokerCall(t), &broker.FetchJWTSVIDRequest{Reference: toPod(t, "demo", ""), Audience: []string{"x"}})
				if got := status.Code(err); c.want == codes.OK {
					wantReason(t, err, codes.PermissionDenied, "WORKLOAD_NOT_ENTITLED") // of the pod, which has no entry
				} else if got != c.want {
					t.Errorf("got %v, want %v", err, c.want)
				} else if c.want == codes.PermissionDenied {
					wantReason(t, err, c.want, "") // of the caller, whatever it names
				}
			}
		})
	}
	t.Run("in the clear", func(t *testing.T) {
		conn, err := grpc.NewClient(b.tcp, grpc.WithTransportCredentials(insecure.NewCredentials()))
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		_, err = broker.NewAPIClient(conn).FetchJWTSVID(brokerCall(t), &broker.FetchJWTSVIDRequest{Reference: toPID(t, pid), Audience: []string{"x"}})
		wantCode(t, err, codes.Unavailable)
	})
	if log := b.log.String(); !strings.Contains(log, "broker refused") || strings.Contains(log, "PRIVATE") {
		t.Errorf("got log %q, want a line of those that were refused", log)
	}
}

// What a certificate says of itself comes into the reason why it is not believed.
func TestLineOfARefusedBrokerIsShort(t *testing.T) {
	b := startBrokering(t)
	subject := pkix.Name{CommonName: strings.Repeat("x", 20000)}
	ca := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: subject, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		KeyUsage: x509.KeyUsageCertSign, IsCA: true, BasicConstraintsValid: true,
	}
	caKey := newKey(t)
	another := certified(t, ca, ca, caKey, caKey) // which did not sign what follows
	bad := selfSigned(t, runtimeID.String(), func(c *x509.Certificate) { c.Subject = subject })
	one := &tls.Certificate{PrivateKey: bad.PrivateKey, Certificate: [][]byte{bad.Certificates[0].Raw, another.Certificates[0].Raw}}
	conn, err := tls.Dial("tcp", strings.TrimPrefix(b.tcp, "dns:///"), &tls.Config{
		InsecureSkipVerify: true, NextProtos: []string{"h2"},
		GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return one, nil },
	})
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	eventually(t, "it is logged", func() bool { return strings.Contains(b.log.String(), "broker refused") })
	if log := b.log.String(); !strings.Contains(log, "xxx") || len(log) > 1000 {
		t.Errorf("got %d bytes of log, want one short line that names the certificate: %.200s", len(log), log)
	}
}

// Resumption would bring back a client without its certificate being looked at.
func TestTLSSessionsAreNotResumed(t *testing.T) {
	b := startBrokering(t)
	config := tlsconfig.MTLSClientConfig(b.svid(runtimeID, time.Hour), b.Brokering.Identity, tlsconfig.AuthorizeID(registry.NodeID(domain)))
	config.ClientSessionCache, config.ServerName, config.NextProtos = tls.NewLRUClientSessionCache(8), "x", []string{"h2"}
	for _, version := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
		config.MaxVersion = version
		for range 2 {
			c, err := tls.Dial("tcp", b.tcp, config)
			if err != nil {
				t.Fatal(err)
			}
			c.SetReadDeadline(time.Now().Add(5 * time.Second))
			io.ReadFull(c, make([]byte, 9)) // gRPC's SETTINGS come after any ticket
			if c.ConnectionState().DidResume {
				t.Errorf("TLS %x: the session was resumed", version)
			}
			c.Close()
		}
	}
	config.MinVersion, config.MaxVersion = tls.VersionTLS10, tls.VersionTLS11
	if c, err := tls.Dial("tcp", b.tcp, config); err == nil {
		c.Close()
		t.Error("got a connection with TLS 1.1")
	}
}

func TestBrokerWhoseSVIDExpiresLosesItsStreams(t *testing.T) {
	t.Parallel()
	b := startBrokering(t)
	b.entry("/a", nil, mine)
	_, pid := b.sleeperOf(mine)
	api := b.connect("unix://"+b.unix, b.svid(runtimeID, 4*time.Second))
	st := subscribe(t, api, toPID(t, pid))
	brokered(t, st, "/a")
	wantEnd(t, st, codes.Unauthenticated, "")
	_, err := api.FetchJWTSVID(brokerCall(t), &broker.FetchJWTSVIDRequest{Reference: toPID(t, pid), Audience: []string{"x"}})
	if got := status.Code(err); got != codes.Unauthenticated && got != codes.Unavailable {
		t.Errorf("got %v, want that the SVID is not taken any more", err)
	}
}

func TestBrokerWhoseCALeavesTheBundleLosesItsStreams(t *testing.T) {
	b := startBrokering(t)
	b.entry("/a", nil, mine)
	_, pid := b.sleeperOf(mine)
	theirs, err := local.Open(t.Context(), local.Options{TrustDomain: far, Memory: true, CATTL: time.Hour})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { theirs.Close() })
	bundles, _ := theirs.Bundles()
	if err := b.authority.SetFederated(bundles.Own); err != nil {
		t.Fatal(err)
	}
	one := signed(t, theirs, farID, time.Hour)
	api := b.connect(b.tcp, one)
	st := subscribe(t, api, toPID(t, pid))
	brokered(t, st, "/a")
	if err := b.authority.SetFederated(bundleOf(t, far)); err != nil {
		t.Fatal(err)
	}
	wantEnd(t, st, codes.Unauthenticated, "")
	_, err = b.connect(b.tcp, one).FetchJWTSVID(brokerCall(t), &broker.FetchJWTSVIDRequest{Reference: toPID(t, pid), Audience: []string{"x"}})
	wantCode(t, err, codes.Unavailable)
}

func podEntry(b *brokers, path string, values ...string) registry.Entry {
	var s []attestor.Selector
	for _, v := range values {
		s = append(s, attestor.Selector{Type: "k8s", Value: v})
	}
	return b.entry(path, nil, s...)
}

func podList(t testing.TB) []byte {
	t.Helper()
	list, err := os.ReadFile("../attestor/kubernetes/testdata/kubernetes-1.34-containerd-1.6-pods.json")
	if err != nil {
		t.Fatal(err)
	}
	return list
}

func TestBrokerGetsTheSVIDsOfAPod(t *testing.T) {
	b := startBrokering(t)
	podEntry(b, "/demo", "ns:default", "sa:workload", "pod-label:tier:test")
	podEntry(b, "/ns/{{k8s.ns}}/pod/{{k8s.pod-name}}", "node-name:node-1")
	podEntry(b, "/prod", "pod-label:tier:prod")
	b.entry("/uid", nil, mine)
	for name, ref := range map[string]*broker.WorkloadReference{
		"by name": toPod(t, "demo", ""),
		"by UID":  toPod(t, "", "c3701101-cc75-46a6-b5ca-641119cf17d9"),
		"by both": toPod(t, "demo", "c3701101-cc75-46a6-b5ca-641119cf17d9"),
	} {
		t.Run(name, func(t *testing.T) { brokered(t, subscribe(t, b.api, ref), "/demo", "/ns/default/pod/demo") })
	}
	brokered(t, subscribe(t, b.api, toPod(t, "", "a7f39d8503ce360d93670ce9fafc89e1")), "/ns/default/pod/static-node-1")
	st := subscribe(t, b.api, toPod(t, "demo", ""))
	brokered(t, st, "/demo", "/ns/default/pod/demo")
	b.kubelet.Pods(bytes.ReplaceAll(podList(t), []byte(`"tier": "test"`), []byte(`"tier": "prod"`)))
	brokered(t, st, "/ns/default/pod/demo", "/prod")
	b.kubelet.Pods(kubelet.Without(t, podList(t), "demo"))
	wantEnd(t, st, codes.NotFound, "WORKLOAD_NOT_FOUND")
}

// A pod of the same name is another one.
func TestPodThatIsReplacedIsGone(t *testing.T) {
	b := startBrokering(t)
	podEntry(b, "/demo", "pod-name:demo")
	st := subscribe(t, b.api, toPod(t, "demo", ""))
	brokered(t, st, "/demo")
	b.kubelet.Pods(bytes.ReplaceAll(podList(t), []byte("c3701101-cc75-46a6-b5ca-641119cf17d9"), []byte("c3701101-cc75-46a6-b5ca-641119cf17d8")))
	wantEnd(t, st, codes.NotFound, "WORKLOAD_NOT_FOUND")
	brokered(t, subscribe(t, b.api, toPod(t, "demo", "")), "/demo")
}

func TestKubeletThatIsDownDeniesNobody(t *testing.T) {
	b := startBrokering(t)
	podEntry(b, "/demo", "pod-name:demo")
	st := subscribe(t, b.api, toPod(t, "demo", ""))
	brokered(t, st, "/demo")
	b.kubelet.Answer(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusServiceUnavailable) })
	asked := b.kubelet.Asked()
	eventually(t, "the kubelet is asked again", func() bool { return b.kubelet.Asked() > asked })
	wantEnd(t, subscribe(t, b.api, toPod(t, "demo", "")), codes.Unavailable, "")
	b.kubelet.Pods(podList(t))
	podEntry(b, "/later", "pod-name:demo")
	brokered(t, st, "/demo", "/later")
}

func TestConnectionsOfBrokersAreBounded(t *testing.T) {
	b := startBrokering(t)
	hold := func(id spiffeid.ID) (held int) {
		config := tlsconfig.MTLSClientConfig(b.svid(id, time.Hour), b.Brokering.Identity, tlsconfig.AuthorizeID(registry.NodeID(domain)))
		config.NextProtos = []string{"h2"}
		for range brokerConns + 1 {
			c, err := tls.Dial("tcp", b.tcp, config)
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { c.Close() })
			c.SetReadDeadline(time.Now().Add(5 * time.Second))
			if _, err := io.ReadFull(c, make([]byte, 9)); err != nil {
				return held
			}
			held++
		}
		return held
	}
	if got := hold(spiffeid.RequireFromPath(domain, "/other")); got != strangerConns {
		t.Errorf("who is not on the list holds %d connections, want %d", got, strangerConns)
	}
	if got := hold(runtimeID); got != brokerConns {
		t.Errorf("a broker holds %d connections, want %d", got, brokerConns)
	}
	_, pid := b.sleeperOf(mine)
	wantEnd(t, subscribe(t, b.connect("unix://"+b.unix, b.svid(spiffeid.RequireFromPath(domain, "/pids"), time.Hour)), toPID(t, pid)),
		codes.PermissionDenied, "WORKLOAD_NOT_ENTITLED") // another broker is not in their way
}

// What root of a container takes must not be missing to root of the host.
func TestBrokersConnectionCountsForWhereItComesFrom(t *testing.T) {
	b := startBrokering(t)
	path := filepath.Join(t.TempDir(), "broker.sock")
	l, err := peer.Listen(path, b.Processes, peer.Options{Mode: 0o600, Group: -1, Admit: b.Admit})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	h := &brokerShaker{b.Server, func(*peer.Process) string { return "container" }}
	account := func(name string) (conns, users int) {
		b.budget.mu.Lock()
		defer b.budget.mu.Unlock()
		if a := b.budget.accounts[name]; a != nil {
			return a.conns, a.users
		}
		return 0, 0
	}
	user := uidOwner(uint32(os.Geteuid()))
	before, _ := account(user)
	shake := func(id *x509svid.SVID) error {
		config := tlsconfig.MTLSClientConfig(id, b.Brokering.Identity, tlsconfig.AuthorizeID(registry.NodeID(domain)))
		config.NextProtos = []string{"h2"}
		done := make(chan error, 1)
		go func() {
			raw, err := l.Accept()
			if err == nil {
				var c net.Conn
				if c, _, err = h.ServerHandshake(raw); err == nil {
					conns, _ := account("container")
					if now, _ := account(user); now != before || conns != 1 {
						t.Errorf("the user has %d connections more and the container %d, want 0 and 1", now-before, conns)
					}
					c.Close()
				}
			}
			done <- err
		}()
		raw, err := net.Dial("unix", path)
		if err != nil {
			t.Fatal(err)
		}
		c := tls.Client(raw, config)
		defer c.Close()
		c.Handshake() // the other side says how it went
		return <-done
	}
	if err := shake(b.svid(runtimeID, time.Hour)); err != nil {
		t.Fatal(err)
	}
	if err := shake(selfSigned(t, runtimeID.String(), nil)); err == nil {
		t.Error("a self-signed certificate was taken")
	}
	for _, name := range []string{"container", user} {
		if conns, _ := account(name); name == user && conns != before || name != user && conns != 0 {
			t.Errorf("%s has %d connections", name, conns)
		}
	}
	if _, users := account("container"); users != 0 {
		t.Errorf("the container's account is used %d times", users)
	}
}

// Clients that say nothing hold neither the others nor their places.
func TestSilentClientsAreDropped(t *testing.T) {
	t.Parallel()
	b := startBrokering(t)
	b.entry("/a", nil, mine)
	_, pid := b.sleeperOf(mine)
	var silent []net.Conn
	for range b.Limits.Challenges {
		c, err := net.Dial("tcp", b.tcp)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		silent = append(silent, c)
	}
	brokered(t, subscribe(t, b.api, toPID(t, pid)), "/a") // over the Unix socket
	for _, c := range silent {
		c.SetReadDeadline(time.Now().Add(15 * time.Second))
		if _, err := c.Read(make([]byte, 1)); errors.Is(err, os.ErrDeadlineExceeded) {
			t.Fatal("a silent client is still connected")
		}
	}
	podEntry(b, "/demo", "pod-name:demo")
	brokered(t, subscribe(t, b.overTCP, toPod(t, "demo", "")), "/demo")
}

// A daemon that stops does not wait for who says nothing.
func TestSilentClientsDoNotHoldTheEndUp(t *testing.T) {
	b := startBrokering(t)
	var silent []net.Conn
	for _, target := range []string{"unix " + b.unix, "tcp " + b.tcp, "unix " + b.socket} {
		network, address, _ := strings.Cut(target, " ")
		c, err := net.Dial(network, address)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		silent = append(silent, c)
	}
	taken := func() (n int) {
		b.budget.mu.Lock()
		defer b.budget.mu.Unlock()
		for _, a := range b.budget.accounts {
			n += len(a.challenge)
		}
		return n
	}
	eventually(t, "they are waited for", func() bool { return taken() == len(silent) })
	b.stop()
	within(t, challengeTime/2, "nobody is waited for", func() bool { return taken() == 0 })
}

func FuzzReadReference(f *testing.F) {
	for _, m := range []proto.Message{
		&broker.WorkloadPIDReference{Pid: 1},
		&broker.KubernetesObjectReference{
			Type: &broker.KubernetesObjectType{Plural: "pods", Group: "core"},
			Key:  &broker.KubernetesObjectKey{Namespace: "a", Name: "b"},
			Uid:  "c3701101-cc75-46a6-b5ca-641119cf17d9",
		},
	} {
		b, err := proto.Marshal(refer(f, m))
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, b []byte) {
		var ref broker.WorkloadReference
		if proto.Unmarshal(b, &ref) != nil {
			return
		}
		pid, pod, err := readReference(&ref)
		switch {
		case err != nil && code(err) != codes.InvalidArgument:
			t.Errorf("got %v, want InvalidArgument", err)
		case err == nil && pod == nil && pid <= 0, err == nil && pod != nil && pod.UID == "" && (pod.Name == "" || pod.Namespace == ""):
			t.Errorf("got PID %d, pod %v: nobody", pid, pod)
		}
	})
}
