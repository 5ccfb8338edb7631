package endpoint

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"maps"
	"slices"
	"testing"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	secretv3 "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/types/known/anypb"
)

// envoy is a client of SDS as Envoy is one: without the Workload API's header.
func (w *world) envoy() secretv3.SecretDiscoveryServiceClient {
	return secretv3.NewSecretDiscoveryServiceClient(w.dial(w.socket))
}

func sdsCall(t testing.TB) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	t.Cleanup(cancel)
	return ctx
}

// secretsIn are the secrets of a response by name, each there once.
func secretsIn(t testing.TB, all ...*anypb.Any) map[string]*tlsv3.Secret {
	t.Helper()
	out := make(map[string]*tlsv3.Secret)
	for _, a := range all {
		var s tlsv3.Secret
		if err := a.UnmarshalTo(&s); err != nil {
			t.Fatal(err)
		}
		if out[s.Name] != nil {
			t.Fatalf("%q is there twice", s.Name)
		}
		out[s.Name] = &s
	}
	return out
}

func wantNames(t testing.TB, got map[string]*tlsv3.Secret, want ...string) {
	t.Helper()
	if names := slices.Sorted(maps.Keys(got)); !slices.Equal(names, slices.Sorted(slices.Values(want))) {
		t.Fatalf("got secrets %q, want %q", names, want)
	}
}

// certificateOf is the leaf of a secret whose key fits.
func certificateOf(t testing.TB, s *tlsv3.Secret) *x509.Certificate {
	t.Helper()
	c := s.GetTlsCertificate()
	pair, err := tls.X509KeyPair(c.GetCertificateChain().GetInlineBytes(), c.GetPrivateKey().GetInlineBytes())
	if err != nil {
		t.Fatalf("secret %q: %v", s.GetName(), err)
	}
	return pair.Leaf
}

func parsePEM(t testing.TB, b []byte) (all []*x509.Certificate) {
	t.Helper()
	for block, rest := pem.Decode(b); block != nil; block, rest = pem.Decode(rest) {
		c, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, c)
	}
	return all
}

// A sotwClient speaks the state-of-the-world protocol.
type sotwClient struct {
	t    testing.TB
	st   secretv3.SecretDiscoveryService_StreamSecretsClient
	last *discoveryv3.DiscoveryResponse
}

func (w *world) sotw(names ...string) *sotwClient { return w.sotwAs(nil, names...) }

func (w *world) sotwAs(node *corev3.Node, names ...string) *sotwClient {
	w.t.Helper()
	st, err := w.envoy().StreamSecrets(sdsCall(w.t))
	if err != nil {
		w.t.Fatal(err)
	}
	c := &sotwClient{t: w.t, st: st}
	c.send(&discoveryv3.DiscoveryRequest{Node: node, TypeUrl: secretType, ResourceNames: names})
	return c
}

func (c *sotwClient) send(in *discoveryv3.DiscoveryRequest) {
	c.t.Helper()
	if err := c.st.Send(in); err != nil {
		c.t.Fatal(err)
	}
}

// ask confirms the last response and asks for these names.
func (c *sotwClient) ask(names ...string) {
	c.t.Helper()
	c.send(&discoveryv3.DiscoveryRequest{
		TypeUrl: secretType, ResourceNames: names,
		VersionInfo: c.last.GetVersionInfo(), ResponseNonce: c.last.GetNonce(),
	})
}

func (c *sotwClient) recv(want ...string) map[string]*tlsv3.Secret {
	c.t.Helper()
	r, err := c.st.Recv()
	if err != nil {
		c.t.Fatalf("got %v, want %q", err, want)
	}
	if r.TypeUrl != secretType || r.Nonce == "" || r.VersionInfo == "" || r.Nonce == c.last.GetNonce() {
		c.t.Fatalf("got type %q, nonce %q, version %q", r.TypeUrl, r.Nonce, r.VersionInfo)
	}
	c.last = r
	got := secretsIn(c.t, r.Resources...)
	wantNames(c.t, got, want...)
	return got
}

func TestSecretStreamServesFollowsAndWithdraws(t *testing.T) {
	w := start(t)
	e := w.entry("/a", nil, mine)
	c := w.sotw("default", "ROOTCA")
	got := c.recv("default", "ROOTCA")
	if id := certificateOf(t, got["default"]).URIs[0].String(); id != "spiffe://test.example/a" {
		t.Errorf("got %s", id)
	}
	c.ask("default", "ROOTCA")
	if _, err := w.Registry.Delete(context.Background(), e.ID); err != nil {
		t.Fatal(err)
	}
	got = c.recv("default", "ROOTCA")
	if leaf := certificateOf(t, got["default"]); time.Now().Before(leaf.NotAfter) || len(leaf.URIs) > 0 {
		t.Errorf("got a certificate until %s for %v, want an expired one of nobody", leaf.NotAfter, leaf.URIs)
	}
	c.ask("default", "ROOTCA")
	w.entry("/b", nil, mine)
	got = c.recv("default", "ROOTCA")
	if id := certificateOf(t, got["default"]).URIs[0].String(); id != "spiffe://test.example/b" {
		t.Errorf("got %s", id)
	}
}

func TestSecretsWithoutIdentityAreDenied(t *testing.T) {
	w := start(t)
	_, err := w.sotw("default").st.Recv()
	wantCode(t, err, codes.PermissionDenied)
	_, err = w.envoy().FetchSecrets(sdsCall(t), &discoveryv3.DiscoveryRequest{})
	wantCode(t, err, codes.PermissionDenied)
}
