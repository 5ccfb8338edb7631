package claims

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/hashicorp/go-hclog"
	"github.com/spiffe/spire-plugin-sdk/pluginsdk"
	"github.com/spiffe/spire-plugin-sdk/plugintest"
	composerv1 "github.com/spiffe/spire-plugin-sdk/proto/spire/plugin/server/credentialcomposer/v1"
	configv1 "github.com/spiffe/spire-plugin-sdk/proto/spire/service/common/config/v1"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/testing/protocmp"
	"google.golang.org/protobuf/types/known/structpb"
)

// A plugin is a composer as SPIRE sees it: behind gRPC.
type plugin struct {
	composerv1.CredentialComposerPluginClient
	configv1.ConfigServiceClient
	log *logged
}

type logged struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *logged) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *logged) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

func serve(t *testing.T) *plugin {
	t.Helper()
	c := NewComposer()
	p := &plugin{log: new(logged)}
	plugintest.ServeInBackground(t, plugintest.Config{
		PluginServer:   composerv1.CredentialComposerPluginServer(c),
		PluginClient:   &p.CredentialComposerPluginClient,
		ServiceServers: []pluginsdk.ServiceServer{configv1.ConfigServiceServer(c)},
		ServiceClients: []pluginsdk.ServiceClient{&p.ConfigServiceClient},
		Logger:         hclog.New(&hclog.LoggerOptions{Output: p.log, Level: hclog.Debug}),
	})
	t.Cleanup(func() { c.Close() })
	return p
}

func (p *plugin) configure(t *testing.T, hcl string) error {
	t.Helper()
	_, err := p.Configure(t.Context(), &configv1.ConfigureRequest{
		CoreConfiguration: &configv1.CoreConfiguration{TrustDomain: "prod.example"}, HclConfiguration: hcl,
	})
	return err
}

// given are claims as SPIRE hands them over.
func given(t *testing.T) *structpb.Struct {
	t.Helper()
	s, err := structpb.NewStruct(map[string]any{
		"sub": "spiffe://prod.example/agent/x", "aud": []any{"a"}, "iat": 1795300000.0, "exp": 1795300300.0, "jti": "j", "iss": "https://spire.example", "other": map[string]any{"deep": true},
	})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func (p *plugin) jwt(t *testing.T, id string) (*composerv1.ComposeWorkloadJWTSVIDResponse, error) {
	t.Helper()
	return p.ComposeWorkloadJWTSVID(t.Context(), &composerv1.ComposeWorkloadJWTSVIDRequest{
		SpiffeId: id, Attributes: &composerv1.JWTSVIDAttributes{Claims: given(t)},
	})
}

func TestTheClaimIsAddedAndNothingElseChanges(t *testing.T) {
	p := serve(t)
	if err := p.configure(t, "claim_name = \"agents.example\"\nrule \"/agent/{who}\" {\n  owner = \"team-{who}\"\n}\n"); err != nil {
		t.Fatal(err)
	}
	resp, err := p.jwt(t, "spiffe://prod.example/agent/x")
	if err != nil {
		t.Fatal(err)
	}
	want := given(t)
	want.Fields["agents.example"], err = structpb.NewValue(map[string]any{"v": 1, "depth": 1, "act": map[string]any{"sub": "spiffe://prod.example/agent/x"}, "owner": "team-x"})
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, resp.GetAttributes().GetClaims(), protocmp.Transform()); diff != "" {
		t.Error(diff)
	}
	resp, err = p.jwt(t, "spiffe://prod.example/else")
	if err != nil || resp.Attributes != nil {
		t.Errorf("an ID without a rule: got %v, %v, want an empty answer", resp, err)
	}
}

func TestWhatCannotBeMapped(t *testing.T) {
	rules := "rule \"/agent/{who}\" {\n  chain = [\"/agent/x\"]\n}\nrule \"/cert\" {\n  x509 { common_name = \"c\" }\n}\n"
	for name, tc := range map[string]struct {
		settings, id string
		want         codes.Code
	}{
		"an agent that would act for itself": {"", "spiffe://prod.example/agent/x", codes.FailedPrecondition},
		"the same, let through":              {"on_error = \"omit\"\n", "spiffe://prod.example/agent/x", codes.OK},
		"what is no ID":                      {"", "prod.example", codes.FailedPrecondition},
		"what is no ID, let through":         {"on_error = \"omit\"\n", "", codes.OK},
		"another trust domain":               {"", "spiffe://other.example/agent/y", codes.FailedPrecondition},
		"no rule, and one is wanted":         {"unmapped = \"deny\"\non_error = \"omit\"\n", "spiffe://prod.example/else", codes.PermissionDenied},
		"no rule":                            {"", "spiffe://prod.example/else", codes.OK},
	} {
		t.Run(name, func(t *testing.T) {
			p := serve(t)
			if err := p.configure(t, tc.settings+rules); err != nil {
				t.Fatal(err)
			}
			resp, err := p.jwt(t, tc.id)
			if status.Code(err) != tc.want || resp.GetAttributes() != nil {
				t.Errorf("got %v, %v, want %s and nothing added", resp, err, tc.want)
			}
		})
	}
}

func TestAClaimOfAnotherComposerIsNotOverwritten(t *testing.T) {
	p := serve(t)
	if err := p.configure(t, "claim_name = \"other\"\nrule \"/agent/x\" {}"); err != nil {
		t.Fatal(err)
	}
	if resp, err := p.jwt(t, "spiffe://prod.example/agent/x"); status.Code(err) != codes.FailedPrecondition {
		t.Errorf("got %v, %v, want a refusal", resp, err)
	}
}

func TestConfigureKeepsTheLastGoodRules(t *testing.T) {
	p := serve(t)
	if _, err := p.jwt(t, "spiffe://prod.example/a"); status.Code(err) != codes.FailedPrecondition {
		t.Errorf("before Configure: got %v, want FailedPrecondition", err)
	}
	if err := p.configure(t, "rule \"/a\" {\n  owner = 1\n}"); status.Code(err) != codes.InvalidArgument || !strings.Contains(err.Error(), "plugin_data:2:11: ") {
		t.Errorf("got %v, want InvalidArgument with a place", err)
	}
	owner := func() string {
		resp, err := p.jwt(t, "spiffe://prod.example/a")
		if err != nil {
			t.Fatal(err)
		}
		return resp.GetAttributes().GetClaims().GetFields()["delegation"].GetStructValue().GetFields()["owner"].GetStringValue()
	}
	for _, step := range []struct{ rules, want string }{
		{"rule \"/a\" {\n  owner = \"one\"\n}", "one"},
		{"rule \"/a\" {\n  owner = \"two\"\n}", "two"},
		{"rule \"/a\" {", "two"},
		{"rule \"/a\" {\n  owner = \"three\"\n}", "three"},
	} {
		if err := p.configure(t, step.rules); (err != nil) != strings.HasSuffix(step.rules, "{") {
			t.Errorf("configure %q: got %v", step.rules, err)
		}
		if got := owner(); got != step.want {
			t.Errorf("after %q: got %q, want %q", step.rules, got, step.want)
		}
	}
	if _, err := p.Configure(t.Context(), &configv1.ConfigureRequest{HclConfiguration: ""}); status.Code(err) != codes.InvalidArgument {
		t.Errorf("without a trust domain: got %v, want InvalidArgument", err)
	}
}

func TestValidate(t *testing.T) {
	p := serve(t)
	for _, tc := range []struct {
		domain, rules string
		valid         bool
		note          string
	}{
		{"prod.example", "rule \"/a\" {}", true, ""},
		{"prod.example", "", true, ""},
		{"prod.example", "\nrule \"/a/../b\" {}", false, "plugin_data:2:6: "},
		{"", "rule \"/a\" {}", false, "trust domain of the server"},
	} {
		resp, err := p.Validate(t.Context(), &configv1.ValidateRequest{
			CoreConfiguration: &configv1.CoreConfiguration{TrustDomain: tc.domain}, HclConfiguration: tc.rules,
		})
		if err != nil || resp.Valid != tc.valid || (len(resp.Notes) > 0) == tc.valid || !strings.HasPrefix(strings.Join(resp.Notes, "\n"), tc.note) {
			t.Errorf("%q: got %v, %v, want valid: %t, %q", tc.rules, resp, err, tc.valid, tc.note)
		}
	}
	if _, err := p.jwt(t, "spiffe://prod.example/a"); status.Code(err) != codes.FailedPrecondition {
		t.Errorf("after Validate alone: got %v, want FailedPrecondition", err)
	}
}

func TestOtherCallsAreNotImplemented(t *testing.T) {
	p := serve(t)
	for name, call := range map[string]func(context.Context) error{
		"server CA": func(ctx context.Context) error {
			_, err := p.ComposeServerX509CA(ctx, &composerv1.ComposeServerX509CARequest{})
			return err
		},
		"server SVID": func(ctx context.Context) error {
			_, err := p.ComposeServerX509SVID(ctx, &composerv1.ComposeServerX509SVIDRequest{})
			return err
		},
		"agent SVID": func(ctx context.Context) error {
			_, err := p.ComposeAgentX509SVID(ctx, &composerv1.ComposeAgentX509SVIDRequest{})
			return err
		},
	} {
		if err := call(t.Context()); status.Code(err) != codes.Unimplemented {
			t.Errorf("%s: got %v, want Unimplemented", name, err)
		}
	}
}

func TestX509(t *testing.T) {
	p := serve(t)
	if err := p.configure(t, `
rule "/agent/{team}/{role}" {
  x509 {
    dns_names           = ["{team}.agents.example.org", "b.example.org"]
    organization        = ["Example"]
    organizational_unit = ["{team}"]
    common_name         = "{role}"
  }
}
rule "/plain" {}`); err != nil {
		t.Fatal(err)
	}
	before := &composerv1.X509SVIDAttributes{
		Subject: &composerv1.DistinguishedName{Country: []string{"US"}, Organization: []string{"SPIRE"}, OrganizationalUnit: []string{"u"}, CommonName: "a.example.org"},
		DnsSans: []string{"a.example.org", "b.example.org"},
	}
	compose := func(path string) (*composerv1.ComposeWorkloadX509SVIDResponse, error) {
		return p.ComposeWorkloadX509SVID(t.Context(), &composerv1.ComposeWorkloadX509SVIDRequest{SpiffeId: "spiffe://prod.example" + path, Attributes: before})
	}
	resp, err := compose("/agent/x/researcher")
	if err != nil {
		t.Fatal(err)
	}
	want := &composerv1.X509SVIDAttributes{
		Subject: &composerv1.DistinguishedName{Country: []string{"US"}, Organization: []string{"Example"}, OrganizationalUnit: []string{"u", "x"}, CommonName: "researcher"},
		DnsSans: []string{"a.example.org", "b.example.org", "x.agents.example.org"},
	}
	if diff := cmp.Diff(want, resp.Attributes, protocmp.Transform()); diff != "" {
		t.Error(diff)
	}
	for _, path := range []string{"/plain", "/else"} {
		if resp, err := compose(path); err != nil || resp.Attributes != nil {
			t.Errorf("%s: got %v, %v, want an empty answer", path, resp, err)
		}
	}
	// A dot would name a host below another team's.
	for _, path := range []string{"/agent/x.y/r", "/agent/X/r", "/agent/a_b/r", "/agent/-x/r", "/agent/x/" + strings.Repeat("r", 65)} {
		if resp, err := compose(path); status.Code(err) != codes.FailedPrecondition {
			t.Errorf("%s: got %v, %v, want a refusal", path, resp, err)
		}
	}
}

// What SPIRE's own printer made of a plugin_data block with comments, lists on
// several lines and blocks on one line.
func TestPluginDataAsSpirePrintsIt(t *testing.T) {
	files, err := filepath.Glob("testdata/spire-*.hcl")
	if err != nil || len(files) == 0 {
		t.Fatalf("got %d files, %v", len(files), err)
	}
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		p := serve(t)
		if err := p.configure(t, string(text)); err != nil {
			t.Error(err)
		}
	}
	// Both of these come out of that printer too.
	p := serve(t)
	for text, want := range map[string]string{
		"rule = {\n  \"/y\" = {\n    owner = \"z\"\n  }\n}": "plugin_data:1:8: rule is a block: rule { … }, without =",
		"rule \"/agent/*\" {\n  owner = \"${a}\"\n}":        "plugin_data:2:12: a string has no variables",
		"\"unmapped\" = \"omit\"":                           "plugin_data:1:1: a key stands without quotes",
	} {
		if err := p.configure(t, text); !strings.Contains(status.Convert(err).Message(), want) {
			t.Errorf("got %v, want %s", err, want)
		}
	}
}

// A mistake of ours costs one signature and not the server's signing.
func TestAPanicIsAnError(t *testing.T) {
	c := NewComposer()
	var err error
	func() {
		defer c.survive(&err)
		var key *ecdsa.PrivateKey
		_ = key.Curve
	}()
	if status.Code(err) != codes.Internal {
		t.Errorf("got %v, want Internal", err)
	}
}

func BenchmarkCompose(b *testing.B) {
	r := load(b, hundredThousand(false))
	s, err := structpb.NewStruct(map[string]any{"sub": "x", "aud": []any{"a"}, "iat": 1.0, "exp": 2.0})
	if err != nil {
		b.Fatal(err)
	}
	for b.Loop() {
		if _, err := r.compose("spiffe://prod.example/agent/team-77772/researcher", &composerv1.JWTSVIDAttributes{Claims: s}, noon); err != nil {
			b.Fatal(err)
		}
	}
}
