package endpoint

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	secretv3 "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	typev3 "github.com/envoyproxy/go-control-plane/envoy/type/v3"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/structpb"

	"github.com/deputy-id/deputy/attestor"
	"github.com/deputy-id/deputy/svid"
	"github.com/deputy-id/deputy/svid/local"
	"github.com/deputy-id/deputy/svid/registry"
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

type secretsByName = map[string]*tlsv3.Secret

// secretsIn are the secrets of a response by name, each there once.
func secretsIn(t testing.TB, all ...*anypb.Any) secretsByName {
	t.Helper()
	out := make(secretsByName)
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

func wantNames(t testing.TB, got secretsByName, want ...string) {
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
	return w.sotwFrom(&discoveryv3.DiscoveryRequest{Node: node, TypeUrl: secretType, ResourceNames: names})
}

func (w *world) sotwFrom(first *discoveryv3.DiscoveryRequest) *sotwClient {
	w.t.Helper()
	st, err := w.envoy().StreamSecrets(sdsCall(w.t))
	if err != nil {
		w.t.Fatal(err)
	}
	c := &sotwClient{t: w.t, st: st}
	c.send(first)
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

func (c *sotwClient) recv(want ...string) secretsByName {
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

var foreign = spiffeid.RequireTrustDomainFromString("other.example")

func federating(e *registry.Entry) { e.FederatesWith = []spiffeid.TrustDomain{foreign} }

func idsOf(c *x509.Certificate) (ids []string) {
	for _, u := range c.URIs {
		ids = append(ids, strings.TrimPrefix(u.String(), domain.IDString()))
	}
	return ids
}

// wantSVID checks that a secret is a good SVID of this path.
func (w *world) wantSVID(s *tlsv3.Secret, path string) *x509.Certificate {
	w.t.Helper()
	leaf := certificateOf(w.t, s)
	if got := idsOf(leaf); !slices.Equal(got, []string{path}) {
		w.t.Fatalf("secret %q: got %q, want %s", s.GetName(), got, path)
	}
	b, _ := w.authority.Bundles()
	if _, _, err := x509svid.Verify(parsePEM(w.t, s.GetTlsCertificate().GetCertificateChain().GetInlineBytes()), b.Own.SPIFFE().X509Bundle()); err != nil {
		w.t.Fatalf("secret %q: %v", s.GetName(), err)
	}
	return leaf
}

// wantWithdrawn checks that a secret is a tombstone that Envoy can load.
func wantWithdrawn(t testing.TB, s *tlsv3.Secret) {
	t.Helper()
	if s.GetTlsCertificate() != nil {
		if leaf := certificateOf(t, s); time.Now().Before(leaf.NotAfter) || len(leaf.URIs) > 0 {
			t.Fatalf("secret %q: got a certificate until %s for %v, want an expired one of nobody", s.GetName(), leaf.NotAfter, leaf.URIs)
		}
		return
	}
	for td, certs := range rootsIn(t, s) {
		if len(certs) != 1 || time.Now().Before(certs[0].NotAfter) || !certs[0].IsCA {
			t.Fatalf("secret %q: got %d roots for %q, want an expired one", s.GetName(), len(certs), td)
		}
	}
}

// rootsIn are the roots of a validation context by trust domain; those of a
// plain one are nobody's in particular.
func rootsIn(t testing.TB, s *tlsv3.Secret) map[string][]*x509.Certificate {
	t.Helper()
	v := s.GetValidationContext()
	if v == nil {
		t.Fatalf("secret %q is no validation context", s.GetName())
	}
	if ca := v.GetTrustedCa(); ca != nil {
		return map[string][]*x509.Certificate{"": parsePEM(t, ca.GetInlineBytes())}
	}
	var c tlsv3.SPIFFECertValidatorConfig
	custom := v.GetCustomValidatorConfig()
	if err := custom.GetTypedConfig().UnmarshalTo(&c); err != nil {
		t.Fatal(err)
	}
	if custom.GetName() != "envoy.tls.cert_validator.spiffe" {
		t.Fatalf("got validator %q", custom.GetName())
	}
	out := make(map[string][]*x509.Certificate)
	for _, td := range c.TrustDomains {
		out[td.Name] = parsePEM(t, td.GetTrustBundle().GetInlineBytes())
	}
	return out
}

func fetchSecrets(t testing.TB, w *world, node *corev3.Node, names ...string) secretsByName {
	t.Helper()
	r, err := w.envoy().FetchSecrets(sdsCall(t), &discoveryv3.DiscoveryRequest{Node: node, ResourceNames: names})
	if err != nil {
		t.Fatal(err)
	}
	if r.TypeUrl != secretType {
		t.Errorf("got type %q", r.TypeUrl)
	}
	return secretsIn(t, r.Resources...)
}

func TestSecretsByName(t *testing.T) {
	w := start(t)
	w.federate(foreign)
	w.federate(spiffeid.RequireTrustDomainFromString("unrelated.example"))
	w.entry("/a", federating, mine)
	w.entry("/b", nil, mine)
	w.entry("/of-another", nil, other)
	const own, a, b = "spiffe://test.example", "spiffe://test.example/a", "spiffe://test.example/b"
	everything := []string{"ALL", "ROOTCA", "default", "spiffe://other.example", own, a, b}
	for name, c := range map[string]struct{ ask, want []string }{
		"default SVID":                {[]string{"default"}, []string{"default"}},
		"default bundle":              {[]string{"ROOTCA"}, []string{"ROOTCA"}},
		"all bundles":                 {[]string{"ALL"}, []string{"ALL"}},
		"an SVID":                     {[]string{b}, []string{b}},
		"own trust domain":            {[]string{own}, []string{own}},
		"federated trust domain":      {[]string{"spiffe://other.example"}, []string{"spiffe://other.example"}},
		"both bundle names":           {[]string{"ROOTCA", "ALL"}, []string{"ALL", "ROOTCA"}},
		"default and the same ID":     {[]string{"default", a}, []string{"default", a}},
		"all at once":                 {everything, everything},
		"nothing named":               {nil, everything},
		"wildcard":                    {[]string{"*"}, everything},
		"wildcard and a name":         {[]string{"*", "default"}, everything},
		"named twice":                 {[]string{"default", "default"}, []string{"default"}},
		"another's SVID":              {[]string{"spiffe://test.example/of-another"}, nil},
		"unrelated trust domain":      {[]string{"spiffe://unrelated.example"}, nil},
		"unknown beside known":        {[]string{"nothing", "default"}, []string{"default"}},
		"Istio's files":               {[]string{"file-root:/etc/passwd", "file-cert:/etc/passwd~/etc/shadow"}, nil},
		"ID in capitals":              {[]string{"spiffe://TEST.example/a"}, nil},
		"ID with a slash at its end":  {[]string{"spiffe://test.example/"}, nil},
		"empty name":                  {[]string{""}, nil},
		"name that is not text":       {[]string{"\x00\u2028"}, nil},
		"default names in small caps": {[]string{"rootca", "all", "Default"}, nil},
	} {
		t.Run(name, func(t *testing.T) {
			got := fetchSecrets(t, w, nil, c.ask...)
			wantNames(t, got, c.want...)
			cs := w.sotw(c.ask...)
			cs.t = t
			cs.recv(c.want...)
			for name, s := range got {
				switch name {
				case "default", a:
					w.wantSVID(s, "/a")
				case b:
					w.wantSVID(s, "/b")
				default:
					var want []string
					switch name {
					case "ALL":
						want = []string{"other.example", "test.example"}
					case "ROOTCA", own:
						want = []string{"test.example"}
					default:
						want = []string{"other.example"}
					}
					if roots := rootsIn(t, s); !slices.Equal(slices.Sorted(maps.Keys(roots)), want) {
						t.Errorf("%s: got roots of %q, want %q", name, slices.Sorted(maps.Keys(roots)), want)
					}
				}
			}
		})
	}
}

func TestSecretNamesAreConfigurable(t *testing.T) {
	w := start(t, func(c *Config, _ *local.Options) { c.SecretNames = SecretNames{"own", "roots", "everybody"} })
	w.entry("/a", nil, mine)
	wantNames(t, fetchSecrets(t, w, nil, "own", "roots", "everybody"), "own", "roots", "everybody")
	wantNames(t, fetchSecrets(t, w, nil, "default", "ROOTCA", "ALL"))
}

func TestOfTwoSVIDsWithOneIDTheFirstIsServed(t *testing.T) {
	w := start(t)
	w.entry("/a", func(e *registry.Entry) { e.DNSNames = []string{"first"} }, mine)
	w.evidence.set(func(ev *attestor.Evidence) { ev.Selectors = append(ev.Selectors, image) })
	w.entry("/a", func(e *registry.Entry) { e.DNSNames = []string{"second"} }, image)
	got := fetchSecrets(t, w, nil, "spiffe://test.example/a")
	if names := certificateOf(t, got["spiffe://test.example/a"]).DNSNames; !slices.Equal(names, []string{"first"}) {
		t.Errorf("got %q", names)
	}
}

func nodeOf(minor uint32, metadata map[string]any) *corev3.Node {
	n := &corev3.Node{Id: "envoy"}
	if minor > 0 {
		n.UserAgentVersionType = &corev3.Node_UserAgentBuildVersion{UserAgentBuildVersion: &corev3.BuildVersion{
			Version: &typev3.SemanticVersion{MajorNumber: 1, MinorNumber: minor},
		}}
	}
	if metadata != nil {
		n.Metadata, _ = structpb.NewStruct(metadata)
	}
	return n
}

func TestFormatOfValidationContexts(t *testing.T) {
	const key = "disable_spiffe_cert_validation"
	two := nodeOf(1, nil)
	two.GetUserAgentBuildVersion().Version.MajorNumber = 2
	zero := nodeOf(30, nil)
	zero.GetUserAgentBuildVersion().Version.MajorNumber = 0
	for name, c := range map[string]struct {
		node       *corev3.Node
		configured bool
		plain      bool
	}{
		"no node":                          {nil, false, false},
		"node without version":             {nodeOf(0, nil), false, false},
		"build version without numbers":    {&corev3.Node{UserAgentVersionType: &corev3.Node_UserAgentBuildVersion{UserAgentBuildVersion: &corev3.BuildVersion{}}}, false, false},
		"version as text":                  {&corev3.Node{UserAgentVersionType: &corev3.Node_UserAgentVersion{UserAgentVersion: "1.2"}}, false, false},
		"1.17":                             {nodeOf(17, nil), false, true},
		"1.18":                             {nodeOf(18, nil), false, false},
		"1.40":                             {nodeOf(40, nil), false, false},
		"2.1":                              {two, false, false},
		"0.30":                             {zero, false, true},
		"configured":                       {nodeOf(40, nil), true, true},
		"configured, no node":              {nil, true, true},
		"node says so":                     {nodeOf(40, map[string]any{key: true}), false, true},
		"node says so in a string":         {nodeOf(40, map[string]any{key: "true"}), false, true},
		"node says no against the file":    {nodeOf(40, map[string]any{key: false}), true, false},
		"node says no in a string":         {nodeOf(40, map[string]any{key: "false"}), true, false},
		"node's no does not make it newer": {nodeOf(17, map[string]any{key: false}), false, true},
		"node says something else":         {nodeOf(40, map[string]any{key: "perhaps"}), false, false},
		"node says a number":               {nodeOf(40, map[string]any{key: 1}), true, true},
		"another key":                      {nodeOf(40, map[string]any{"disable": true}), false, false},
	} {
		t.Run(name, func(t *testing.T) {
			s := &Server{Config: Config{PlainValidation: c.configured}}
			if got := s.plain(c.node); got != c.plain {
				t.Errorf("got plain %v, want %v", got, c.plain)
			}
		})
	}
}

// One pool of roots would let each trust domain speak for every other.
func TestPlainContextsNeverPoolTrustDomains(t *testing.T) {
	w := start(t)
	w.federate(foreign)
	w.entry("/a", federating, mine)
	old := nodeOf(17, nil)
	wantNames(t, fetchSecrets(t, w, old), "ROOTCA", "default", "spiffe://other.example", "spiffe://test.example", "spiffe://test.example/a")
	got := fetchSecrets(t, w, old, "ALL", "ROOTCA", "spiffe://other.example")
	wantNames(t, got, "ROOTCA", "spiffe://other.example")
	b, _ := w.authority.Bundles()
	for name, want := range map[string]*svid.Bundle{"ROOTCA": b.Own, "spiffe://other.example": b.Federated[foreign]} {
		if roots := rootsIn(t, got[name])[""]; !slices.EqualFunc(roots, want.X509Authorities, (*x509.Certificate).Equal) {
			t.Errorf("%s: got %d roots, want those of %s alone", name, len(roots), want.TrustDomain)
		}
	}
	if log := w.log.String(); !strings.Contains(log, "asks for all bundles") {
		t.Errorf("got log %q, want a line that ALL is not to be had", log)
	}
}

func TestBundleThatTrustsNobodyIsOneThatEnvoyTakes(t *testing.T) {
	w := start(t)
	if err := w.authority.SetFederated(&svid.Bundle{TrustDomain: foreign}); err != nil {
		t.Fatal(err)
	}
	w.entry("/a", federating, mine)
	for _, node := range []*corev3.Node{nil, nodeOf(17, nil)} {
		wantWithdrawn(t, fetchSecrets(t, w, node, "spiffe://other.example")["spiffe://other.example"])
	}
}

func TestSecretsWithoutIdentityAreDenied(t *testing.T) {
	w := start(t)
	_, err := w.sotw("default").st.Recv()
	wantCode(t, err, codes.PermissionDenied)
	_, err = w.envoy().FetchSecrets(sdsCall(t), &discoveryv3.DiscoveryRequest{})
	wantCode(t, err, codes.PermissionDenied)
}
