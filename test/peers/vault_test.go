package peers

import (
	"bytes"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/deputy-id/deputy/test/loopback"
	"github.com/deputy-id/deputy/test/process"
)

const vaultVersion = "1.17.6"

// vaultServer builds Vault, once for this machine. Its module replaces some of
// its parts by directories, which a module that requires it cannot see; at this
// version the parts that are published fit too. So the build is a module of its
// own that requires Vault's requirements.
var vaultServer = sync.OnceValues(func() (string, error) {
	path := cached("vault-" + vaultVersion)
	if _, err := os.Stat(path); err == nil {
		return path, nil
	}
	fmt.Fprintf(os.Stderr, "building vault-%s (once; some minutes)\n", vaultVersion)
	dir, err := os.MkdirTemp("", "deputy-peers-")
	if err != nil {
		return "", err
	}
	defer os.RemoveAll(dir)
	if err := vaultModule(dir); err != nil {
		return "", fmt.Errorf("write a module around vault: %w", err)
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return "", err
	}
	temp := fmt.Sprintf("%s.%d", path, os.Getpid())
	cmd := exec.Command("go", "build", "-mod=mod", "-ldflags", "-s -w", "-o", temp, ".")
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOWORK=off")
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("build vault: %w\n%s", err, out)
	}
	return path, os.Rename(temp, path)
})

// vaultModule writes a module whose program is Vault's.
func vaultModule(dir string) error {
	cmd := exec.Command("go", "mod", "download", "-json", "github.com/hashicorp/vault@v"+vaultVersion)
	cmd.Dir = dir
	out, err := cmd.Output()
	if err != nil {
		return fmt.Errorf("download: %w\n%s", err, out)
	}
	var source struct{ Dir string }
	if err := json.Unmarshal(out, &source); err != nil {
		return err
	}
	theirs, err := os.ReadFile(filepath.Join(source.Dir, "go.mod"))
	if err != nil {
		return err
	}
	sums, err := os.ReadFile(filepath.Join(source.Dir, "go.sum"))
	if err != nil {
		return err
	}
	ours := []string{"module vault", "require github.com/hashicorp/vault v" + vaultVersion}
	for line := range strings.Lines(string(theirs)) {
		if !strings.HasPrefix(line, "module ") && !strings.Contains(line, "=> ./") {
			ours = append(ours, strings.TrimSuffix(line, "\n"))
		}
	}
	for name, text := range map[string]string{
		"go.mod":  strings.Join(ours, "\n") + "\n",
		"go.sum":  string(sums),
		"main.go": "package main\n\nimport (\n\t\"os\"\n\n\t\"github.com/hashicorp/vault/command\"\n)\n\nfunc main() { os.Exit(command.Run(os.Args[1:])) }\n",
	} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			return err
		}
	}
	return nil
}

// A vault is a running Vault that forgets everything in the end.
type vault struct{ address, root string }

func startVault(t *testing.T) *vault {
	t.Helper()
	listen := loopback.Address(t)
	v := &vault{"http://" + listen, "root"}
	r := process.Start(t, exec.Command(built(t, vaultServer), "server", "-dev",
		"-dev-listen-address", listen, "-dev-root-token-id", v.root, "-dev-no-store-token"))
	r.Until(t, "vault", func() bool {
		resp, err := http.Get(v.address + "/v1/sys/health")
		if err != nil {
			return false
		}
		resp.Body.Close()
		return resp.StatusCode == http.StatusOK
	})
	return v
}

// A reply has what the tests read of Vault's.
type reply struct {
	Errors []string       `json:"errors"`
	Data   map[string]any `json:"data"`
	Auth   struct {
		Token            string            `json:"client_token"`
		Policies         []string          `json:"policies"`
		IdentityPolicies []string          `json:"identity_policies"`
		Metadata         map[string]string `json:"metadata"`
		Lease            int               `json:"lease_duration"`
	} `json:"auth"`
}

// call sends a body, if there is one, and returns the status and the reply.
func (v *vault) call(t *testing.T, token, method, path string, body any) (int, reply) {
	t.Helper()
	var content []byte
	switch body := body.(type) {
	case nil:
	case []byte: // JSON as it stands
		content = body
	default:
		var err error
		if content, err = json.Marshal(body); err != nil {
			t.Fatal(err)
		}
	}
	req, err := http.NewRequestWithContext(t.Context(), method, v.address+"/v1/"+path, bytes.NewReader(content))
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("X-Vault-Token", token)
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	var r reply
	if len(text) > 0 {
		if err := json.Unmarshal(text, &r); err != nil {
			t.Fatalf("%s %s: %v\n%s", method, path, err, text)
		}
	}
	return resp.StatusCode, r
}

// must is a call by the root token that has to succeed.
func (v *vault) must(t *testing.T, method, path string, body any) reply {
	t.Helper()
	status, r := v.call(t, v.root, method, path, body)
	if status >= 300 {
		t.Fatalf("%s %s: got %d %q", method, path, status, r.Errors)
	}
	return r
}

// login logs in by a JWT-SVID to the sample's role.
func (v *vault) login(t *testing.T, token string) (int, reply) {
	t.Helper()
	return v.call(t, "", "POST", "auth/jwt/login", map[string]any{"role": "agent", "jwt": token})
}

// trust enables the JWT method with the keys of the server's bundle, and returns its accessor.
func (v *vault) trust(t *testing.T, s *spire) string {
	t.Helper()
	bundle, err := spiffebundle.Parse(spiffeid.RequireTrustDomainFromString("example.org"), []byte(s.cli(t, "bundle", "show", "-format", "spiffe")))
	if err != nil {
		t.Fatal(err)
	}
	var keys []string
	for _, key := range bundle.JWTAuthorities() {
		der, err := x509.MarshalPKIXPublicKey(key)
		if err != nil {
			t.Fatal(err)
		}
		keys = append(keys, string(pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der})))
	}
	v.must(t, "POST", "sys/auth/jwt", map[string]any{"type": "jwt"})
	v.must(t, "POST", "auth/jwt/config", map[string]any{"jwt_validation_pubkeys": keys})
	accessor, _ := v.must(t, "GET", "sys/auth/jwt", nil).Data["accessor"].(string)
	if accessor == "" {
		t.Fatal("the JWT method has no accessor")
	}
	return accessor
}

// stranger is a rule like the sample's, for claims that the role must not accept.
func stranger(pattern, subject, issuer, agentType, scopes string) string {
	return fmt.Sprintf("rule %q {\n  subject = %q\n  issuer = %q\n  owner = \"team-{team}\"\n  agent_type = %q\n  %s\n}\n",
		pattern, subject, issuer, agentType, scopes)
}

// The role and the policy are the sample's, as they stand but for the accessor.
func TestVaultGrantsByTheClaims(t *testing.T) {
	const audience = "https://vault.example.org"
	v := startVault(t)
	const head, idp, scopes = "head-of-{team}@example.org", "https://idp.example.org", `scopes = ["crm:read"]`
	s := newSPIRE(t, changes{agent: withoutAttest, rules: sample(t, "claims.hcl") +
		stranger("/agent/{team}/issuer", head, "https://evil.example", "ai_agent", scopes) +
		stranger("/agent/{team}/subject", "head-of-{team}@evil.example", idp, "ai_agent", scopes) +
		stranger("/agent/{team}/type", head, idp, "service", scopes) +
		stranger("/agent/{team}/idle", head, idp, "ai_agent", "") +
		stranger("/batch/{team}/researcher", head, idp, "ai_agent", scopes)})
	s.startServer(t)
	accessor := v.trust(t, s)

	role, err := os.ReadFile(policies + "vault-role.json")
	if err != nil {
		t.Fatal(err)
	}
	v.must(t, "POST", "auth/jwt/role/agent", role)
	policy, err := os.ReadFile(policies + "vault-agent.hcl")
	if err != nil {
		t.Fatal(err)
	}
	v.must(t, "POST", "sys/policies/acl/agent", map[string]any{"policy": strings.ReplaceAll(string(policy), "ACCESSOR", accessor)})
	v.must(t, "POST", "sys/mounts/kv", map[string]any{"type": "kv", "options": map[string]string{"version": "2"}})
	for _, team := range []string{"crm", "hr"} {
		v.must(t, "POST", "kv/data/team-"+team+"/api", map[string]any{"data": map[string]string{"key": "of " + team}})
	}
	// A group of the identity store whose members are those with a scope.
	group, _ := v.must(t, "POST", "identity/group", map[string]any{"name": "crm-readers", "type": "external", "policies": []string{"crm-readers"}}).Data["id"].(string)
	v.must(t, "POST", "identity/group-alias", map[string]any{"name": "crm:read", "mount_accessor": accessor, "canonical_id": group})

	mint := func(t *testing.T, path, audience string) string {
		t.Helper()
		return strings.TrimSpace(s.cli(t, "jwt", "mint", "-spiffeID", "spiffe://example.org"+path, "-audience", audience))
	}
	crm := mint(t, researcher, audience)

	for _, team := range []string{"crm", "hr"} {
		t.Run("an agent of "+team, func(t *testing.T) {
			id := "/agent/" + team + "/researcher"
			status, r := v.login(t, mint(t, id, audience))
			if status != http.StatusOK {
				t.Fatalf("got %d %q, want a login", status, r.Errors)
			}
			want := map[string]string{"role": "agent", "owner": "team-" + team, "subject": "head-of-" + team + "@example.org", "agent": "spiffe://example.org" + id}
			if diff := cmp.Diff(want, r.Auth.Metadata); diff != "" {
				t.Errorf("metadata (-want +got):\n%s", diff)
			}
			if !slices.Equal(r.Auth.IdentityPolicies, []string{"crm-readers"}) || slices.Contains(r.Auth.Policies, "default") || r.Auth.Lease != 300 {
				t.Errorf("got policies %q, of groups %q, for %d s, want agent, that of the scope's group and 300 s",
					r.Auth.Policies, r.Auth.IdentityPolicies, r.Auth.Lease)
			}

			other := map[string]string{"crm": "hr", "hr": "crm"}[team]
			for _, c := range []struct {
				method, path string
				want         int
			}{
				{"GET", "kv/data/team-" + team + "/api", http.StatusOK},
				{"LIST", "kv/metadata/team-" + team, http.StatusOK},
				{"POST", "kv/data/team-" + team + "/api", http.StatusForbidden},
				{"DELETE", "kv/data/team-" + team + "/api", http.StatusForbidden},
				{"GET", "kv/data/team-" + other + "/api", http.StatusForbidden},
				{"LIST", "kv/metadata/team-" + other, http.StatusForbidden},
				{"LIST", "kv/metadata", http.StatusForbidden},
			} {
				var body any
				if c.method == "POST" {
					body = map[string]any{"data": map[string]string{"key": "changed"}}
				}
				status, got := v.call(t, r.Auth.Token, c.method, c.path, body)
				if status != c.want {
					t.Errorf("%s %s: got %d %q, want %d", c.method, c.path, status, got.Errors, c.want)
				}
				if c.method == "GET" && status == http.StatusOK {
					if diff := cmp.Diff(any(map[string]any{"key": "of " + team}), got.Data["data"]); diff != "" {
						t.Error(diff)
					}
				}
			}
		})
	}

	mute := mint(t, "/agent/crm/mute", audience)
	claims, signature := strings.LastIndex(crm, "."), strings.LastIndex(mute, ".")
	for name, c := range map[string]struct{ token, want string }{
		"no delegation":            {mute, `"/delegation/scopes" claim not found`},
		"no scopes":                {mint(t, "/agent/crm/idle", audience), `"/delegation/scopes" claim not found`},
		"another issuer":           {mint(t, "/agent/crm/issuer", audience), `"/delegation/iss"`},
		"another subject":          {mint(t, "/agent/crm/subject", audience), `"/delegation/sub"`},
		"another type":             {mint(t, "/agent/crm/type", audience), `"/delegation/agent_type"`},
		"an ID beside the agents'": {mint(t, "/batch/crm/researcher", audience), `claim "sub"`},
		"another audience":         {mint(t, researcher, "https://crm.example.org"), "audience"},
		"claims of another token":  {crm[:claims] + mute[signature:], "signature"},
	} {
		t.Run(name, func(t *testing.T) {
			status, r := v.login(t, c.token)
			if status < 400 || r.Auth.Token != "" {
				t.Fatalf("got %d %+v, want no login", status, r.Auth)
			}
			contains(t, strings.Join(r.Errors, " "), c.want)
		})
	}
}
