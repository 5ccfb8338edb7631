package endpoint

import (
	"slices"
	"testing"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	secretv3 "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/types/known/anypb"
)

// A deltaClient speaks the incremental protocol.
type deltaClient struct {
	t    testing.TB
	st   secretv3.SecretDiscoveryService_DeltaSecretsClient
	last *discoveryv3.DeltaDiscoveryResponse
}

func (w *world) delta(names ...string) *deltaClient { return w.deltaAs(nil, names...) }

func (w *world) deltaAs(node *corev3.Node, names ...string) *deltaClient {
	w.t.Helper()
	return w.deltaFrom(&discoveryv3.DeltaDiscoveryRequest{Node: node, TypeUrl: secretType, ResourceNamesSubscribe: names})
}

func (w *world) deltaFrom(first *discoveryv3.DeltaDiscoveryRequest) *deltaClient {
	w.t.Helper()
	st, err := w.envoy().DeltaSecrets(sdsCall(w.t))
	if err != nil {
		w.t.Fatal(err)
	}
	c := &deltaClient{t: w.t, st: st}
	c.send(first)
	return c
}

func (c *deltaClient) send(in *discoveryv3.DeltaDiscoveryRequest) {
	c.t.Helper()
	if err := c.st.Send(in); err != nil {
		c.t.Fatal(err)
	}
}

func (c *deltaClient) ack() {
	c.t.Helper()
	c.send(&discoveryv3.DeltaDiscoveryRequest{ResponseNonce: c.last.GetNonce()})
}

func (c *deltaClient) subscribe(names ...string) {
	c.t.Helper()
	c.send(&discoveryv3.DeltaDiscoveryRequest{ResourceNamesSubscribe: names})
}

func (c *deltaClient) unsubscribe(names ...string) {
	c.t.Helper()
	c.send(&discoveryv3.DeltaDiscoveryRequest{ResourceNamesUnsubscribe: names})
}

func (c *deltaClient) recv(want ...string) secretsByName {
	c.t.Helper()
	r, err := c.st.Recv()
	if err != nil {
		c.t.Fatalf("got %v, want %q", err, want)
	}
	if r.TypeUrl != secretType || r.Nonce == "" || r.Nonce == c.last.GetNonce() {
		c.t.Fatalf("got type %q, nonce %q", r.TypeUrl, r.Nonce)
	}
	c.last = r
	var all []*anypb.Any
	for _, one := range r.Resources {
		all = append(all, one.Resource)
		if one.Version == "" {
			c.t.Errorf("%q has no version", one.Name)
		}
	}
	got := secretsIn(c.t, all...)
	for _, one := range r.Resources {
		if got[one.Name] == nil {
			c.t.Errorf("resource %q holds a secret of another name", one.Name)
		}
	}
	wantNames(c.t, got, want...)
	return got
}

// wantRemoved looks at the last response.
func (c *deltaClient) wantRemoved(names ...string) {
	c.t.Helper()
	got := slices.Clone(c.last.RemovedResources)
	slices.Sort(got)
	slices.Sort(names)
	if !slices.Equal(got, names) {
		c.t.Fatalf("got removed %q, want %q", got, names)
	}
}

func (c *deltaClient) versions() map[string]string {
	out := make(map[string]string)
	for _, r := range c.last.Resources {
		out[r.Name] = r.Version
	}
	return out
}

func TestDeltaSubscribesAndUnsubscribes(t *testing.T) {
	const a, td = "spiffe://test.example/a", "spiffe://test.example"
	everything := []string{"ALL", "ROOTCA", "default", a, td}
	type step struct {
		subscribe, unsubscribe []string
		want, removed          []string
	}
	for name, steps := range map[string][]step{
		"no names are everything":                     {{nil, nil, everything, nil}},
		"names only to unsubscribe are nothing":       {{nil, []string{"x"}, nil, nil}, {[]string{"default"}, nil, []string{"default"}, nil}},
		"wildcard":                                    {{[]string{"*"}, nil, everything, nil}},
		"what is subscribed again is sent again":      {{[]string{"default"}, nil, []string{"default"}, nil}, {[]string{"default"}, nil, []string{"default"}, nil}},
		"so is what is not there":                     {{[]string{"x"}, nil, nil, []string{"x"}}, {[]string{"x"}, nil, nil, []string{"x"}}},
		"twice in one request":                        {{[]string{"default", "default", "x", "x"}, nil, []string{"default"}, []string{"x"}}},
		"the old wildcard goes on beside a name":      {{nil, nil, everything, nil}, {[]string{"x"}, nil, nil, []string{"x"}}, {nil, []string{"*"}, nil, nil}, {[]string{a}, nil, []string{a}, nil}},
		"in the wildcard still":                       {{[]string{"*", a}, nil, everything, nil}, {nil, []string{a}, []string{a}, nil}},
		"not in the wildcard":                         {{[]string{"*", "x"}, nil, everything, []string{"x"}}, {nil, []string{"x"}, nil, []string{"x"}}},
		"what was never subscribed is no matter":      {{[]string{"default"}, nil, []string{"default"}, nil}, {[]string{"ROOTCA"}, []string{"x", "y"}, []string{"ROOTCA"}, nil}},
		"subscribed and unsubscribed at once":         {{[]string{"default", "ROOTCA"}, []string{"default"}, []string{"ROOTCA"}, nil}},
		"the wildcard is left, what is named is kept": {{[]string{"*", a}, nil, everything, nil}, {[]string{td}, []string{"*"}, []string{td}, nil}},
	} {
		t.Run(name, func(t *testing.T) {
			w := start(t)
			w.entry("/a", nil, mine)
			var d *deltaClient
			for _, s := range steps {
				in := &discoveryv3.DeltaDiscoveryRequest{ResourceNamesSubscribe: s.subscribe, ResourceNamesUnsubscribe: s.unsubscribe}
				if d == nil {
					d = w.deltaFrom(in)
				} else {
					d.send(in)
				}
				if len(s.want)+len(s.removed) == 0 {
					continue // the next step sees that nothing came
				}
				d.recv(s.want...)
				d.wantRemoved(s.removed...)
			}
		})
	}
}

// Unlike in the other protocol, a subscription counts whatever its nonce.
func TestDeltaListensToStaleRequests(t *testing.T) {
	w := start(t)
	w.entry("/a", nil, mine)
	d := w.delta("default")
	d.recv("default")
	d.send(&discoveryv3.DeltaDiscoveryRequest{ResponseNonce: "wrong", ResourceNamesSubscribe: []string{"ROOTCA"}})
	d.recv("ROOTCA")
}

func TestDeltaDoesNotSendWhatTheClientBrought(t *testing.T) {
	w := start(t)
	w.entry("/a", nil, mine)
	names := []string{"default", "ROOTCA"}
	d := w.delta(names...)
	d.recv(names...)
	has := d.versions()

	d = w.deltaFrom(&discoveryv3.DeltaDiscoveryRequest{ResourceNamesSubscribe: names, InitialResourceVersions: has})
	d.subscribe("ALL")
	d.recv("ALL")

	has["ROOTCA"] = "older"
	has["gone"] = "1"
	has["unasked"] = "1"
	d = w.deltaFrom(&discoveryv3.DeltaDiscoveryRequest{ResourceNamesSubscribe: append(names, "gone"), InitialResourceVersions: has})
	d.recv("ROOTCA")
	d.wantRemoved("gone")

	d = w.deltaFrom(&discoveryv3.DeltaDiscoveryRequest{InitialResourceVersions: has})
	d.recv("ALL", "ROOTCA", "spiffe://test.example", "spiffe://test.example/a")
	d.wantRemoved("gone", "unasked")
	w.entry("/b", nil, mine)
	d.recv("spiffe://test.example/b")
	d.wantRemoved()
}

// The client goes on with it else.
func TestWhatTheClientBroughtIsWithdrawn(t *testing.T) {
	w := start(t)
	e := w.entry("/a", nil, mine)
	names := []string{"default", "ROOTCA", "spiffe://test.example/a", "spiffe://test.example"}
	s, d := w.sotw(names...), w.delta(names...)
	s.recv(names...)
	d.recv(names...)
	again := &discoveryv3.DeltaDiscoveryRequest{ResourceNamesSubscribe: names, InitialResourceVersions: d.versions()}
	before := w.deltaFrom(again)
	before.subscribe("ALL") // of the others there is nothing to send
	before.recv("ALL")

	w.delete(e)
	after, sAfter := w.deltaFrom(again), w.sotwFrom(&discoveryv3.DiscoveryRequest{ResourceNames: names, VersionInfo: s.last.VersionInfo})
	for what, got := range map[string]secretsByName{
		"while the stream is open":           before.recv(append(names, "ALL")...),
		"while none was":                     after.recv(names...),
		"while none was, state of the world": sAfter.recv(names...),
	} {
		for _, s := range got {
			t.Log(what)
			wantWithdrawn(t, s)
		}
	}
	w.entry("/a", nil, mine)
	w.wantSVID(after.recv(names...)["default"], "/a")
	w.wantSVID(sAfter.recv(names...)["default"], "/a")
}

func TestWhoBroughtNothingOfOursIsDenied(t *testing.T) {
	w := start(t)
	for name, in := range map[string]*discoveryv3.DiscoveryRequest{
		"an empty response": {ResourceNames: []string{"default"}, VersionInfo: versionOf(nil)},
		"a file":            {ResourceNames: []string{"file-root:system"}, VersionInfo: "1"},
		"everything":        {VersionInfo: "1"},
	} {
		_, err := w.sotwFrom(in).st.Recv()
		t.Log(name)
		wantCode(t, err, codes.PermissionDenied)
	}
	_, err := w.deltaFrom(&discoveryv3.DeltaDiscoveryRequest{ResourceNamesSubscribe: []string{"x"}, InitialResourceVersions: map[string]string{"x": "1", "default": "1"}}).st.Recv()
	wantCode(t, err, codes.PermissionDenied)
}
