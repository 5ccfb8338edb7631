package endpoint

import (
	"bytes"
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	secretv3 "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	"github.com/hashicorp/go-hclog"
	"google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	healthv1 "google.golang.org/grpc/health/grpc_health_v1"
	reflectionv1 "google.golang.org/grpc/reflection/grpc_reflection_v1"
	"google.golang.org/protobuf/proto"

	"github.com/deputy-id/deputy/attestor"
	"github.com/deputy-id/deputy/attestor/peer"
	"github.com/deputy-id/deputy/svid"
	"github.com/deputy-id/deputy/svid/local"
	"github.com/deputy-id/deputy/svid/registry"
)

func (w *world) delete(entries ...registry.Entry) {
	w.t.Helper()
	for _, e := range entries {
		if _, err := w.Registry.Delete(context.Background(), e.ID); err != nil {
			w.t.Fatal(err)
		}
	}
}

func TestSecretIsReplacedByATombstoneAndComesBack(t *testing.T) {
	for name, c := range map[string]struct {
		node  *corev3.Node
		names []string
	}{
		"with the validator":    {nil, []string{"default", "ROOTCA", "ALL", "spiffe://test.example/a", "spiffe://test.example", "spiffe://other.example"}},
		"without the validator": {nodeOf(17, nil), []string{"default", "ROOTCA", "spiffe://other.example"}},
		"by wildcard":           {nil, []string{"*"}},
	} {
		t.Run(name, func(t *testing.T) {
			w := start(t)
			w.federate(foreign)
			e := w.entry("/a", federating, mine)
			s := w.sotwAs(c.node, c.names...)
			d := w.deltaAs(c.node, c.names...)
			all := c.names
			if all[0] == "*" {
				all = []string{"default", "ROOTCA", "ALL", "spiffe://test.example/a", "spiffe://test.example", "spiffe://other.example"}
			}
			good := s.recv(all...)
			d.recv(all...)
			w.delete(e)
			for _, got := range []secretsByName{s.recv(all...), d.recv(all...)} {
				for name, s := range got {
					wantWithdrawn(t, s)
					if (s.GetValidationContext() == nil) != (good[name].GetValidationContext() == nil) ||
						(s.GetValidationContext().GetTrustedCa() == nil) != (good[name].GetValidationContext().GetTrustedCa() == nil) {
						t.Errorf("%s: the tombstone is of another kind", name)
					}
				}
			}
			w.entry("/a", federating, mine)
			for _, got := range []secretsByName{s.recv(all...), d.recv(all...)} {
				w.wantSVID(got["default"], "/a")
				if roots := rootsIn(t, got["spiffe://other.example"]); len(roots) != 1 || time.Now().After(slices.Collect(maps.Values(roots))[0][0].NotAfter) {
					t.Errorf("got %v, want the good bundle", roots)
				}
			}
			if n := strings.Count(w.log.String(), "workload denied"); n != 2 {
				t.Errorf("got %d lines that the identity was lost, want one a stream:\n%s", n, w.log)
			}
		})
	}
}

// The default name is of whichever SVID is the first; an ID is of nobody else.
func TestDefaultBecomesTheOtherIdentityAndAnIDDoesNot(t *testing.T) {
	w := start(t)
	a := w.entry("/a", nil, mine)
	w.entry("/b", nil, mine)
	names := []string{"default", "spiffe://test.example/a", "ROOTCA"}
	s := w.sotw(names...)
	w.wantSVID(s.recv(names...)["default"], "/a")
	w.delete(a)
	got := s.recv(names...)
	w.wantSVID(got["default"], "/b")
	wantWithdrawn(t, got["spiffe://test.example/a"])
	if len(rootsIn(t, got["ROOTCA"])) != 1 {
		t.Error("the roots went with one of two entries")
	}
}

// To Envoy a name that is misspelt is one that comes later. Who looks for it
// finds it at debug, once for the same names, and in a line that has an end.
func TestNamesThatThereAreNotAreALineAtDebug(t *testing.T) {
	w := start(t)
	w.entry("/a", nil, mine)
	const line = "client asks for secrets that there are not"
	wantNames(t, fetchSecrets(t, w, nil, "defualt"))
	if log := w.log.String(); strings.Contains(log, line) {
		t.Errorf("got log %q at info", log)
	}
	w.Log.SetLevel(hclog.Debug)
	before := len(w.log.String())
	want := func(n int, names string) {
		t.Helper()
		log := w.log.String()[before:]
		if got := strings.Count(log, line); got != n || !strings.Contains(log, names) {
			t.Errorf("got %d lines, want %d, the last with %s:\n%s", got, n, names, log)
		}
	}
	s := w.sotw("defualt", "ROOTCA", "spiffe://test.example/late")
	s.recv("ROOTCA")
	want(1, `names="defualt spiffe://test.example/late" count=2 pid=`)
	s.ask("defualt", "ROOTCA", "spiffe://test.example/late", "spiffe://test.example/a")
	s.recv("ROOTCA", "spiffe://test.example/a") // the same are missing
	late := w.entry("/late", nil, mine)
	s.recv("ROOTCA", "spiffe://test.example/a", "spiffe://test.example/late")
	want(2, "names=defualt count=1 pid=")
	w.delete(late)
	wantWithdrawn(t, s.recv("ROOTCA", "spiffe://test.example/a", "spiffe://test.example/late")["spiffe://test.example/late"])
	want(2, "") // it was there

	d := w.delta("default", strings.Repeat("x", 2000))
	d.recv("default")
	want(3, strings.Repeat("x", 300)+"... count=1")
	wantNames(t, fetchSecrets(t, w, nil, "no\nline"))
	want(4, "names=no?line count=1")
}

func TestTombstonesAreNobodysKeys(t *testing.T) {
	g, err := newGraves().dig()
	if err != nil {
		t.Fatal(err)
	}
	cert, root := parsePEM(t, g.cert)[0], parsePEM(t, g.root)[0]
	if bytes.Equal(cert.RawSubjectPublicKeyInfo, root.RawSubjectPublicKeyInfo) {
		t.Error("the key of the certificate, which is handed out, is the root's")
	}
	pool := x509.NewCertPool()
	pool.AddCert(root)
	if _, err := cert.Verify(x509.VerifyOptions{Roots: pool, CurrentTime: root.NotBefore}); err == nil {
		t.Error("the certificate is verified by the root")
	}
	again, err := newGraves().dig()
	if err != nil || bytes.Equal(again.key, g.key) {
		t.Errorf("got the same key again, %v", err)
	}
}

func TestOneOfSeveralEntriesIsWithdrawn(t *testing.T) {
	w := start(t)
	a := w.entry("/a", nil, mine)
	w.entry("/b", nil, mine)
	d := w.delta("default", "spiffe://test.example/a", "spiffe://test.example/b", "ROOTCA")
	d.recv("default", "spiffe://test.example/a", "spiffe://test.example/b", "ROOTCA")
	w.delete(a)
	got := d.recv("default", "spiffe://test.example/a")
	w.wantSVID(got["default"], "/b")
	wantWithdrawn(t, got["spiffe://test.example/a"])
}

func TestNamesThatComeToExistArePushed(t *testing.T) {
	w := start(t)
	w.entry("/a", nil, mine)
	s, d := w.sotw("spiffe://test.example/b", "file-root:/etc/ca.pem"), w.delta("spiffe://test.example/b", "file-root:/etc/ca.pem")
	s.recv()
	d.recv()
	d.wantRemoved("file-root:/etc/ca.pem", "spiffe://test.example/b")
	s.ask("spiffe://test.example/b", "file-root:/etc/ca.pem")
	d.ack()
	w.entry("/b", nil, mine)
	for _, got := range []secretsByName{s.recv("spiffe://test.example/b"), d.recv("spiffe://test.example/b")} {
		w.wantSVID(got["spiffe://test.example/b"], "/b")
	}
	d.wantRemoved()
}

// Of what changes nothing for a client, it hears nothing: what comes next is
// the change that does.
func TestSecretsThatDidNotChangeAreNotSentAgain(t *testing.T) {
	w := start(t)
	w.entry("/a", nil, mine)
	s, d := w.sotw("default", "ROOTCA"), w.delta("default", "ROOTCA")
	s.recv("default", "ROOTCA")
	d.recv("default", "ROOTCA")
	s.ask("default", "ROOTCA")
	s.ask("ROOTCA", "default")
	d.ack()
	w.entry("/b", nil, mine) // not asked for
	w.entry("/of-another", nil, other)
	w.federate(foreign)
	c := w.entry("/c", nil, mine)
	s.ask("default", "ROOTCA", "spiffe://test.example/c")
	d.subscribe("spiffe://test.example/c")
	if got := s.recv("default", "ROOTCA", "spiffe://test.example/c"); s.last.Nonce != "2" {
		t.Errorf("got response %s, want the second: %v", s.last.Nonce, got)
	}
	d.recv("spiffe://test.example/c")
	if d.last.Nonce != "2" {
		t.Errorf("got response %s, want the second", d.last.Nonce)
	}
	w.delete(c)
	d.recv("spiffe://test.example/c")
}

func TestUnsubscribedNamesAreNotPushed(t *testing.T) {
	w := start(t)
	b := func() registry.Entry { return w.entry("/b", nil, mine) }
	w.entry("/a", nil, mine)
	first := b()
	const name = "spiffe://test.example/b"
	s, d := w.sotw("default", name), w.delta("default", name)
	s.recv("default", name)
	d.recv("default", name)
	s.ask("default")
	d.unsubscribe(name)
	// That the request was heard shows in the answer to the next.
	s.ask("default", "ROOTCA")
	d.subscribe("ROOTCA")
	s.recv("default", "ROOTCA")
	d.recv("ROOTCA")
	w.delete(first)
	next := b()
	s.ask("default", "ROOTCA", name)
	d.subscribe(name)
	w.wantSVID(s.recv("default", "ROOTCA", name)[name], "/b")
	w.wantSVID(d.recv(name)[name], "/b")
	if s.last.Nonce != "3" || d.last.Nonce != "3" {
		t.Errorf("got responses %s and %s, want the third", s.last.Nonce, d.last.Nonce)
	}
	// What was unsubscribed and is withdrawn needs no tombstone.
	s.ask("default")
	d.unsubscribe(name)
	s.ask("default", "ROOTCA")
	s.recv("default", "ROOTCA")
	d.subscribe("ROOTCA")
	d.recv("ROOTCA")
	w.delete(next)
	s.ask("default", "ROOTCA", name, "spiffe://test.example")
	d.subscribe(name, "spiffe://test.example")
	s.recv("default", "ROOTCA", "spiffe://test.example")
	d.recv("spiffe://test.example")
	d.wantRemoved(name)
}

func TestNamesThatAreAskedForAgainAreSentAgain(t *testing.T) {
	w := start(t)
	w.entry("/a", nil, mine)
	s := w.sotw("default", "ROOTCA")
	s.recv("default", "ROOTCA")
	s.ask("ROOTCA")
	s.ask("default", "ROOTCA")
	s.recv("default", "ROOTCA")
}

// Once something was named, no names are none: not everything.
func TestEmptyListAfterNamesIsNothing(t *testing.T) {
	w := start(t)
	w.entry("/a", nil, mine)
	s := w.sotw()
	s.recv("ALL", "ROOTCA", "default", "spiffe://test.example", "spiffe://test.example/a")
	s.ask() // goes on with everything
	b := w.entry("/b", nil, mine)
	s.recv("ALL", "ROOTCA", "default", "spiffe://test.example", "spiffe://test.example/a", "spiffe://test.example/b")
	s.ask("default")
	s.recv("default") // now by its name
	s.ask()
	w.delete(b)
	s.ask("ROOTCA")
	s.recv("ROOTCA")
}

func TestConfirmations(t *testing.T) {
	refuse := func(c *sotwClient, nonce, reason string, names ...string) {
		c.t.Helper()
		c.send(&discoveryv3.DiscoveryRequest{
			ResponseNonce: nonce, ResourceNames: names,
			ErrorDetail: &status.Status{Code: int32(codes.InvalidArgument), Message: reason},
		})
	}
	t.Run("none are waited for", func(t *testing.T) {
		w := start(t)
		w.entry("/a", nil, mine)
		s := w.sotw("*")
		all := []string{"ALL", "ROOTCA", "default", "spiffe://test.example", "spiffe://test.example/a"}
		s.recv(all...)
		for i := range 5 {
			e := w.entry(fmt.Sprintf("/b%d", i), nil, mine)
			all = append(all, e.SPIFFEID.String())
			s.recv(all...)
		}
	})
	t.Run("of another response are not listened to", func(t *testing.T) {
		w := start(t)
		w.entry("/a", nil, mine)
		s := w.sotw("default")
		s.recv("default")
		for _, nonce := range []string{"0", "2", "wrong", "01", "-1", strings.Repeat("9", 100)} {
			s.send(&discoveryv3.DiscoveryRequest{ResponseNonce: nonce, ResourceNames: []string{"ROOTCA"}})
			refuse(s, nonce, "never sent", "ROOTCA")
		}
		s.ask("default", "ALL")
		s.recv("default", "ALL")
		if strings.Contains(w.log.String(), "never sent") {
			t.Errorf("got log %q", w.log)
		}
	})
	t.Run("a nonce of an earlier stream in the first request is none", func(t *testing.T) {
		w := start(t)
		w.entry("/a", nil, mine)
		st, err := w.envoy().StreamSecrets(sdsCall(t))
		if err != nil {
			t.Fatal(err)
		}
		s := &sotwClient{t: t, st: st}
		s.send(&discoveryv3.DiscoveryRequest{ResponseNonce: "7", VersionInfo: "old", ResourceNames: []string{"default"}})
		s.recv("default")
	})
	t.Run("a refusal is logged once and changes nothing", func(t *testing.T) {
		w := start(t)
		w.entry("/a", nil, mine)
		s := w.sotw("default")
		s.recv("default")
		reason := "cannot load\nit \x1b[31m\u202e " + strings.Repeat("x", 5000)
		refuse(s, s.last.Nonce, reason, "default")
		refuse(s, s.last.Nonce, reason, "default")
		w.entry("/b", nil, mine) // no change of the default
		s.ask("default", "ROOTCA")
		s.recv("default", "ROOTCA")
		if s.last.Nonce != "2" {
			t.Errorf("got response %s, want no other in between", s.last.Nonce)
		}
		var lines []string
		for line := range strings.Lines(w.log.String()) {
			if strings.Contains(line, "refused secrets") {
				lines = append(lines, line)
			}
		}
		if len(lines) != 1 || !strings.Contains(lines[0], "cannot load?it ?[31m? xxx") || len(lines[0]) > 600 ||
			!strings.Contains(lines[0], "InvalidArgument") || !strings.Contains(lines[0], "[WARN]") {
			t.Errorf("got log lines %q, want one short and legible", lines)
		}
	})
	t.Run("refusals of a delta are logged too", func(t *testing.T) {
		w := start(t)
		w.entry("/a", nil, mine)
		d := w.delta("default")
		d.recv("default")
		for range 2 {
			d.send(&discoveryv3.DeltaDiscoveryRequest{ResponseNonce: d.last.Nonce, ErrorDetail: &status.Status{Message: "so not"}})
		}
		d.subscribe("default")
		d.recv("default")
		if n := strings.Count(w.log.String(), "so not"); n != 1 {
			t.Errorf("got %d lines, want one:\n%s", n, w.log)
		}
	})
}

func TestNodeIsThatOfTheFirstRequest(t *testing.T) {
	w := start(t)
	w.entry("/a", nil, mine)
	s := w.sotwAs(nodeOf(17, nil), "ROOTCA")
	s.recv("ROOTCA")
	s.send(&discoveryv3.DiscoveryRequest{Node: nodeOf(40, nil), ResponseNonce: s.last.Nonce, ResourceNames: []string{"ROOTCA", "ALL", "spiffe://test.example"}})
	got := s.recv("ROOTCA", "spiffe://test.example")
	if roots := rootsIn(t, got["spiffe://test.example"]); roots[""] == nil {
		t.Errorf("got %v, want the format of the first node", roots)
	}
}

func TestBadSecretRequests(t *testing.T) {
	w := start(t)
	w.entry("/a", nil, mine)
	many := make([]string, 10_000)
	for i := range many {
		many[i] = fmt.Sprintf("name-%d", i)
	}
	long := strings.Repeat("n", 64<<10)
	versions := make(map[string]string)
	for _, n := range many {
		versions[n] = "1"
	}
	for name, c := range map[string]struct {
		in   *discoveryv3.DiscoveryRequest
		want string
	}{
		"another type":       {&discoveryv3.DiscoveryRequest{TypeUrl: "type.googleapis.com/envoy.config.cluster.v3.Cluster"}, "type_url"},
		"ten thousand names": {&discoveryv3.DiscoveryRequest{ResourceNames: many}, "more than 1000 resource names"},
		"a name of 64 KiB":   {&discoveryv3.DiscoveryRequest{ResourceNames: []string{long}}, "longer than 32768 bytes"},
		"a long type":        {&discoveryv3.DiscoveryRequest{TypeUrl: long}, "type_url"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := w.envoy().FetchSecrets(sdsCall(t), c.in)
			s := w.sotw("default")
			s.t = t
			s.recv("default")
			c.in.ResponseNonce = s.last.Nonce
			s.send(c.in)
			_, streamed := s.st.Recv()
			d := w.delta("default")
			d.t = t
			d.recv("default")
			d.send(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: c.in.TypeUrl, ResourceNamesSubscribe: c.in.ResourceNames})
			_, delta := d.st.Recv()
			for _, err := range []error{err, streamed, delta} {
				wantCode(t, err, codes.InvalidArgument)
				if !strings.Contains(err.Error(), c.want) || len(err.Error()) > 400 {
					t.Errorf("got %.500v, want %q in few words", err, c.want)
				}
			}
		})
	}
	t.Run("ten thousand versions", func(t *testing.T) {
		d := &deltaClient{t: t}
		var err error
		if d.st, err = w.envoy().DeltaSecrets(sdsCall(t)); err != nil {
			t.Fatal(err)
		}
		d.send(&discoveryv3.DeltaDiscoveryRequest{InitialResourceVersions: versions})
		_, err = d.st.Recv()
		wantCode(t, err, codes.InvalidArgument)
	})
	t.Run("names are counted over requests", func(t *testing.T) {
		d := w.delta("default")
		d.t = t
		d.recv("default")
		var err error
		for i := 0; err == nil && i < 20; i++ {
			d.st.Send(&discoveryv3.DeltaDiscoveryRequest{ResourceNamesSubscribe: many[100*i : 100*i+100]})
			_, err = d.st.Recv() // that they are not there
		}
		wantCode(t, err, codes.InvalidArgument)
	})
	t.Run("garbage", func(t *testing.T) {
		for _, method := range []string{"StreamSecrets", "DeltaSecrets"} {
			for _, b := range []string{"\xff\xff\xff", "\x1a\x02\xff\xff", "\x0a\x05hi"} {
				st, err := w.dial(w.socket).NewStream(sdsCall(t), &grpc.StreamDesc{ClientStreams: true, ServerStreams: true},
					"/"+secretDesc.ServiceName+"/"+method, grpc.ForceCodecV2(newCodec()))
				if err == nil {
					err = st.SendMsg(encoded(b))
				}
				if err == nil {
					var in nothing
					err = st.RecvMsg(&in)
				}
				wantCode(t, err, codes.InvalidArgument)
			}
		}
	})
	// Nobody else was disturbed.
	s := w.sotw("default")
	s.recv("default")
}

func TestSecretStreamEndsWithItsClientsWord(t *testing.T) {
	w := start(t)
	w.entry("/a", nil, mine)
	s := w.sotw("default")
	if err := s.st.CloseSend(); err != nil {
		t.Fatal(err)
	}
	s.recv("default")
	if _, err := s.st.Recv(); !errors.Is(err, io.EOF) {
		t.Errorf("got %v, want the end", err)
	}
	eventually(t, "the stream is given back", func() bool { return w.budget.streams.Load() == 0 })
}

// One that asks and asks and never reads waits for itself alone.
func TestClientThatDoesNotReadHoldsUpNobodyElse(t *testing.T) {
	w := start(t)
	w.entry("/a", nil, mine)
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	st, err := w.envoy().StreamSecrets(ctx)
	if err != nil {
		t.Fatal(err)
	}
	var sent atomic.Int64
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		for i := 0; ; i++ {
			names := []string{"default", "ROOTCA"}
			if st.Send(&discoveryv3.DiscoveryRequest{ResourceNames: names[:i%2+1]}) != nil {
				return
			}
			sent.Add(1)
		}
	}()
	eventually(t, "it has to wait", func() bool {
		n := sent.Load()
		for range 3 { // others meanwhile
			s := w.sotw("default")
			s.recv("default")
			s.st.CloseSend()
		}
		return n > 0 && n == sent.Load()
	})
	cancel()
	<-ended
	eventually(t, "its stream is given back", func() bool { return w.budget.streams.Load() == 0 })
}

func TestStopEndsSecretStreams(t *testing.T) {
	w := start(t)
	w.entry("/a", nil, mine)
	s, idle := w.sotw("default"), w.sotwIdle()
	s.recv("default")
	w.Server.stop()
	_, err := s.st.Recv()
	wantCode(t, err, codes.Unavailable)
	_, err = idle.Recv() // one that asked for nothing yet
	wantCode(t, err, codes.Unavailable)
}

func (w *world) sotwIdle() secretv3.SecretDiscoveryService_StreamSecretsClient {
	w.t.Helper()
	st, err := w.envoy().StreamSecrets(sdsCall(w.t))
	if err != nil {
		w.t.Fatal(err)
	}
	return st
}

func TestSecretsRotateAndAreGatheredForOnce(t *testing.T) {
	t.Parallel()
	w := start(t, func(_ *Config, o *local.Options) { o.X509TTL = 5 * time.Second })
	w.entry("/a", nil, mine)
	var streams []*sotwClient
	for range 10 {
		streams = append(streams, w.sotw("default"))
	}
	first := w.wantSVID(streams[0].recv("default")["default"], "/a")
	for _, s := range streams[1:] {
		s.recv("default")
	}
	before := w.evidence.times()
	for _, s := range streams {
		if next := w.wantSVID(s.recv("default")["default"], "/a"); next.Equal(first) {
			t.Error("got the same certificate")
		}
	}
	if got := w.evidence.times() - before; got != 1 {
		t.Errorf("evidence was gathered %d times, want once", got)
	}
}

func TestRotationWithoutTheIdentityIsATombstone(t *testing.T) {
	t.Parallel()
	w := start(t, func(_ *Config, o *local.Options) { o.X509TTL = 5 * time.Second })
	w.entry("/a", nil, mine)
	s := w.sotw("default")
	s.recv("default")
	w.evidence.mu.Lock()
	w.evidence.ev.Selectors = []attestor.Selector{other} // seen only when gathered anew
	w.evidence.mu.Unlock()
	wantWithdrawn(t, s.recv("default")["default"])
	// Nobody says that the evidence is good again: it is looked at again.
	w.evidence.set(func(ev *attestor.Evidence) { ev.Selectors = []attestor.Selector{mine} })
	w.wantSVID(s.recv("default")["default"], "/a")
}

func TestBundleChangesArePushed(t *testing.T) {
	w := start(t)
	w.federate(foreign)
	w.entry("/a", federating, mine)
	s := w.sotw("spiffe://other.example", "ROOTCA")
	before := rootsIn(t, s.recv("ROOTCA", "spiffe://other.example")["spiffe://other.example"])
	w.federate(foreign) // with another key
	after := rootsIn(t, s.recv("ROOTCA", "spiffe://other.example")["spiffe://other.example"])
	if before["other.example"][0].Equal(after["other.example"][0]) {
		t.Error("got the same bundle")
	}
	if err := w.authority.DeleteFederated(foreign); err != nil {
		t.Fatal(err)
	}
	wantWithdrawn(t, s.recv("ROOTCA", "spiffe://other.example")["spiffe://other.example"])
}

func TestSecretsWhileEvidenceIsUnknown(t *testing.T) {
	unknown := func(ev *attestor.Evidence) {
		ev.Selectors = []attestor.Selector{mine}
		ev.Unknown = []attestor.Unknown{{Prefixes: []string{"docker:"}, Err: errors.New("engine does not answer")}}
	}
	known := func(ev *attestor.Evidence) {
		ev.Selectors, ev.Unknown = []attestor.Selector{image, mine}, nil
	}
	const container, user = "spiffe://test.example/container", "spiffe://test.example/user"
	t.Run("new stream is Unavailable", func(t *testing.T) {
		w := start(t)
		w.entry("/container", nil, image)
		w.evidence.set(unknown)
		_, err := w.sotw("default").st.Recv()
		wantCode(t, err, codes.Unavailable)
	})
	t.Run("open stream keeps what it has and gets no key more", func(t *testing.T) {
		w := start(t)
		w.federate(foreign)
		w.entry("/container", federating, image)
		w.entry("/user", nil, mine)
		w.evidence.set(known)
		d := w.delta("default", "spiffe://other.example")
		first := w.wantSVID(d.recv("default", "spiffe://other.example")["default"], "/container")
		w.evidence.set(unknown)
		w.entry("/later", nil, mine) // wakes the stream
		d.subscribe(container, user)
		d.recv(user)
		d.wantRemoved(container)
		d.subscribe("default") // what it has, it may have again
		if again := w.wantSVID(d.recv("default")["default"], "/container"); !again.Equal(first) {
			t.Error("an SVID was renewed that the evidence does not cover")
		}
		w.federate(foreign)
		d.recv("spiffe://other.example") // bundles go on
		w.evidence.set(known)
		w.entry("/last", nil, mine)
		w.wantSVID(d.recv("default", container)[container], "/container")
	})
	t.Run("new stream takes nothing of what the client brings", func(t *testing.T) {
		w := start(t)
		w.entry("/user", nil, mine)
		e := w.entry("/container", nil, image)
		w.evidence.set(known)
		s, d := w.sotw(user, container), w.delta(user, container)
		s.recv(user, container)
		d.recv(user, container)
		w.evidence.set(unknown)
		s = w.sotwFrom(&discoveryv3.DiscoveryRequest{ResourceNames: []string{user, container}, VersionInfo: s.last.VersionInfo})
		s.recv(user)
		versions := d.versions()
		versions[user] = "older"
		d = w.deltaFrom(&discoveryv3.DeltaDiscoveryRequest{ResourceNamesSubscribe: []string{user, container}, InitialResourceVersions: versions})
		d.recv(user)
		d.wantRemoved()
		w.evidence.set(func(ev *attestor.Evidence) { ev.Selectors, ev.Unknown = []attestor.Selector{mine}, nil })
		w.delete(e) // wakes the streams
		wantWithdrawn(t, s.recv(user, container)[container])
		wantWithdrawn(t, d.recv(container)[container])
	})
	t.Run("deleted entry goes although its kind is unknown", func(t *testing.T) {
		w := start(t)
		e := w.entry("/container", nil, image)
		w.entry("/container2", nil, image)
		w.evidence.set(known)
		s := w.sotw("default", container, "ROOTCA")
		s.recv("default", container, "ROOTCA")
		w.evidence.set(unknown)
		w.delete(e)
		got := s.recv("default", container, "ROOTCA")
		wantWithdrawn(t, got["default"]) // the next one's key was not this stream's
		wantWithdrawn(t, got[container])
		if roots := rootsIn(t, got["ROOTCA"])["test.example"]; time.Now().After(roots[0].NotAfter) {
			t.Error("the bundle went as well")
		}
	})
	t.Run("an SVID that ended is a tombstone until it is renewed", func(t *testing.T) {
		t.Parallel()
		w := start(t, func(_ *Config, o *local.Options) { o.X509TTL = 5 * time.Second })
		w.entry("/container", nil, image)
		w.evidence.set(known)
		begin := time.Now()
		s := w.sotw("default", "ROOTCA")
		s.recv("default", "ROOTCA")
		w.evidence.set(unknown)
		got := s.recv("default", "ROOTCA")
		if lived := time.Since(begin); lived < 3*time.Second {
			t.Errorf("it was withdrawn after %s, want not before its end", lived)
		}
		wantWithdrawn(t, got["default"])
		w.evidence.set(known)
		w.wantSVID(s.recv("default", "ROOTCA")["default"], "/container")
	})
	t.Run("evidence that cannot be gathered is the same", func(t *testing.T) {
		w := start(t)
		e := w.entry("/a", nil, mine)
		s := w.sotw("default", "ROOTCA")
		s.recv("default", "ROOTCA")
		w.evidence.mu.Lock()
		w.evidence.err = errors.New("process changed while it was looked at")
		w.evidence.mu.Unlock()
		b := w.entry("/b", nil, mine) // wakes the stream, for nothing
		w.delete(b)
		s.ask("default", "ROOTCA", "spiffe://test.example")
		s.recv("default", "ROOTCA", "spiffe://test.example")
		w.delete(e)
		wantWithdrawn(t, s.recv("default", "ROOTCA", "spiffe://test.example")["default"])
	})
	t.Run("an entry that gives another ID now is as one that was deleted", func(t *testing.T) {
		w := start(t)
		e := w.entry("/a", nil, mine)
		s := w.sotw("default")
		s.recv("default")
		w.evidence.mu.Lock()
		w.evidence.err = errors.New("process changed while it was looked at")
		w.evidence.mu.Unlock()
		if _, err := w.Registry.Update(t.Context(), e.ID, func(e *registry.Entry) error { e.Path = "/b"; return nil }); err != nil {
			t.Fatal(err)
		}
		wantWithdrawn(t, s.recv("default")["default"])
	})
}

func TestTracedProcessKeepsItsSecrets(t *testing.T) {
	w := start(t)
	w.entry("/a", nil, mine)
	s := w.sotw("default")
	s.recv("default")
	w.evidence.set(func(ev *attestor.Evidence) { ev.Traced = true })
	w.entry("/b", nil, mine) // wakes the stream
	s.ask("default", "ROOTCA", "spiffe://test.example/a")
	s.recv("default", "ROOTCA") // no key under another name
	w.evidence.set(func(ev *attestor.Evidence) { ev.Traced = false })
	s.recv("default", "ROOTCA", "spiffe://test.example/a")
	w.evidence.set(func(ev *attestor.Evidence) { ev.Traced = true })
	_, err := w.sotw("default").st.Recv()
	wantCode(t, err, codes.PermissionDenied)
	_, err = w.sotwFrom(&discoveryv3.DiscoveryRequest{ResourceNames: []string{"default"}, VersionInfo: s.last.VersionInfo}).st.Recv()
	wantCode(t, err, codes.PermissionDenied) // and what it has stays
}

func TestSecretStreamEndsWithItsProgram(t *testing.T) {
	w := start(t)
	w.entry("/a", nil, mine)
	p := w.run("sdsexec:" + w.socket)
	p.says(t, "1 secrets")
	p.says(t, "executed") // with the connection still open
	w.entry("/b", nil, mine)
	eventually(t, "the stream ends", func() bool { return w.budget.streams.Load() == 0 })
	eventually(t, "the connection ends", func() bool {
		w.budget.mu.Lock()
		defer w.budget.mu.Unlock()
		return w.budget.conns == 0
	})
}

func TestSecretsEndWithTheirProcess(t *testing.T) {
	w := start(t)
	w.entry("/a", nil, mine)
	p := w.run("sds:" + w.socket)
	p.says(t, "1 secrets")
	s := w.onlyLink().session
	if s.secrets.Load() == nil {
		t.Fatal("the session keeps no secrets")
	}
	p.in.Close()
	<-s.proc.Done()
	p.Wait()
	eventually(t, "the session and its stream are dropped", func() bool {
		w.mu.Lock()
		defer w.mu.Unlock()
		return len(w.sessions) == 0 && w.budget.streams.Load() == 0
	})
}

// Streams of one process share what was made of its SVID, others have theirs.
func TestSecretsAreMadeOnceForAProcess(t *testing.T) {
	w := start(t)
	w.entry("/a", nil, mine)
	p := w.run("sds:" + w.socket)
	p.says(t, "1 secrets")
	theirs := w.onlyLink().session.secrets.Load()
	first := fetchSecrets(t, w, nil, "default")["default"].GetTlsCertificate()
	second := w.sotw("default").recv("default")["default"].GetTlsCertificate()
	if !proto.Equal(first, second) {
		t.Error("two calls of one process got different secrets")
	}
	r, err := theirs.get("default", false)
	if err != nil || bytes.Contains(r.any, first.GetPrivateKey().GetInlineBytes()) {
		t.Errorf("two processes have one key (%v)", err)
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, c := range w.sessions {
		if m := c.secrets.Load(); len(m.made) != 1 {
			t.Errorf("got %d secrets made, want the one that was asked for", len(m.made))
		}
	}
}

// Signing may take a while, and the process executes another program meanwhile.
func TestSecretIsNotSentToAProgramThatWasExecutedWhileItWasSigned(t *testing.T) {
	authority := &slow{before: func() {}}
	w := start(t, func(c *Config, _ *local.Options) {
		c.Keeper = svid.NewKeeper(authority, svid.KeeperOptions{Log: hclog.NewNullLogger()})
	})
	authority.Authority = w.authority
	w.entry("/a", nil, mine)
	p := w.run("later:" + w.socket)
	p.says(t, "[/a]")
	l := w.onlyLink()
	authority.before = func() {
		p.execute()
		eventually(t, "the client executes another program", func() bool { return l.Check() != nil })
	}
	w.entry("/b", nil, mine) // which the client's own stream asks for as well
	if _, err := w.fetchSecrets(call(t), l, &discoveryv3.DiscoveryRequest{}); !errors.Is(err, peer.ErrProgramChanged) {
		t.Errorf("got %v, want %v", err, peer.ErrProgramChanged)
	}
}

// What it has may be sent again when nothing new can be signed: not to a program
// that did not have it.
func TestSecretIsNotSentAgainToAProgramThatWasExecutedWhileSigningFailed(t *testing.T) {
	authority := &slow{before: func() {}}
	w := start(t, func(c *Config, _ *local.Options) {
		c.Keeper = svid.NewKeeper(authority, svid.KeeperOptions{Log: hclog.NewNullLogger()})
	})
	authority.Authority = w.authority
	w.entry("/a", nil, mine)
	p := w.run("later:" + w.socket)
	p.says(t, "[/a]")
	l := w.onlyLink()
	has, err := w.secretState(call(t), l, "test", nil, false)
	if err != nil {
		t.Fatal(err)
	}
	authority.err = svid.ErrNotReady
	authority.before = func() {
		p.execute()
		eventually(t, "the client executes another program", func() bool { return l.Check() != nil })
	}
	w.entry("/b", nil, mine) // which the client's own stream asks for as well
	if _, err := w.secretState(call(t), l, "test", has, false); !errors.Is(err, peer.ErrProgramChanged) {
		t.Errorf("got %v, want %v", err, peer.ErrProgramChanged)
	}
}

func TestSecretsAreHealthyAndDescribed(t *testing.T) {
	w := start(t)
	const service = "envoy.service.secret.v3.SecretDiscoveryService"
	conn := w.dial(w.socket)
	r, err := healthv1.NewHealthClient(conn).Check(sdsCall(t), &healthv1.HealthCheckRequest{Service: service})
	if err != nil || r.Status != healthv1.HealthCheckResponse_SERVING {
		t.Errorf("got %v, %v, want SERVING", r, err)
	}
	st, err := reflectionv1.NewServerReflectionClient(conn).ServerReflectionInfo(sdsCall(t))
	if err != nil {
		t.Fatal(err)
	}
	if err := st.Send(&reflectionv1.ServerReflectionRequest{MessageRequest: &reflectionv1.ServerReflectionRequest_FileContainingSymbol{FileContainingSymbol: service}}); err != nil {
		t.Fatal(err)
	}
	if d, err := st.Recv(); err != nil || len(d.GetFileDescriptorResponse().GetFileDescriptorProto()) == 0 {
		t.Errorf("got %v, %v, want a description", d, err)
	}
}
