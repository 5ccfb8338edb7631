package peers

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/coreos/go-oidc/v3/oidc"
	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"

	"github.com/deputy-id/deputy/test/loopback"
	"github.com/deputy-id/deputy/test/page"
	"github.com/deputy-id/deputy/test/process"
)

// svidAlgorithms are those of the tokens here, ours and Keycloak's.
var svidAlgorithms = []jose.SignatureAlgorithm{jose.ES256, jose.RS256}

const oidcSection = "OIDC: clouds and other relying parties"

// webPair writes a certificate for 127.0.0.1, signed by itself, with its key,
// and returns the files and a client that trusts it.
func webPair(t *testing.T) (cert, key string, client *http.Client) {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "issuer"}, IPAddresses: []net.IP{{127, 0, 0, 1}},
		NotAfter: time.Now().Add(24 * time.Hour), IsCA: true, BasicConstraintsValid: true,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, k.Public(), k)
	if err != nil {
		t.Fatal(err)
	}
	pkcs8, err := x509.MarshalPKCS8PrivateKey(k)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	cert, key = filepath.Join(dir, "issuer.crt"), filepath.Join(dir, "issuer.key")
	roots := x509.NewCertPool()
	for file, block := range map[string]*pem.Block{cert: {Type: "CERTIFICATE", Bytes: der}, key: {Type: "PRIVATE KEY", Bytes: pkcs8}} {
		text := pem.EncodeToMemory(block)
		roots.AppendCertsFromPEM(text) // a key is none
		if err := os.WriteFile(file, text, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	transport := &http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots}}
	t.Cleanup(transport.CloseIdleConnections)
	return cert, key, &http.Client{Transport: transport}
}

// An issuer is a daemon that serves discovery.
type issuer struct {
	*host
	address, url, cert, key string
	client                  *http.Client
}

func newIssuer(t *testing.T, path string) *issuer {
	t.Helper()
	i := &issuer{address: loopback.Address(t)}
	i.url = "https://" + i.address + path
	i.cert, i.key, i.client = webPair(t)
	return i
}

// startIssuer runs a daemon with the page's configuration, in which old becomes
// new, and more lines after it.
func startIssuer(t *testing.T, trustDomain, path, more string, oldnew ...string) *issuer {
	t.Helper()
	i := newIssuer(t, path)
	i.start(t, trustDomain, more, oldnew...)
	return i
}

func (i *issuer) start(t *testing.T, trustDomain, more string, oldnew ...string) {
	t.Helper()
	blocks := meshBlocks(t, oidcSection, "hcl")
	if len(blocks) == 0 {
		t.Fatal("the page has no configuration")
	}
	i.host = start(t, trustDomain, page.Change(t, blocks[0], append(oldnew,
		"https://issuer.example.org", i.url,
		"0.0.0.0:8444", i.address,
		"/etc/deputy/tls/issuer.crt", i.cert,
		"/etc/deputy/tls/issuer.key", i.key,
		`["cgroup:unit:researcher.service", "process:leader:true"]`, fmt.Sprintf(`["unix:uid:%d"]`, os.Getuid()))...)+more)
}

// token fetches a JWT-SVID of the agent for an audience.
func (d *host) token(t *testing.T, agent, audience string) string {
	t.Helper()
	return strings.TrimSpace(d.Run(t, "fetch", "jwt", "--audience", audience, "--spiffe-id", agent))
}

// A relying party that knows nothing of SPIFFE finds the keys by the issuer alone.
func TestGoOIDCTakesJWTSVIDs(t *testing.T) {
	const audience, agent = "https://api.example.org", "spiffe://oidc.example/agent/researcher"
	for _, path := range []string{"", "/agents"} {
		t.Run("issuer"+path, func(t *testing.T) {
			i := startIssuer(t, "oidc.example", path, "")
			ctx := oidc.ClientContext(t.Context(), i.client)
			provider, err := oidc.NewProvider(ctx, i.url)
			if err != nil {
				t.Fatal(err)
			}
			verifier := provider.VerifierContext(ctx, &oidc.Config{ClientID: audience})
			good := i.token(t, agent, audience)
			got, err := verifier.Verify(ctx, good)
			if err != nil {
				t.Fatal(err)
			}
			if got.Issuer != i.url || got.Subject != agent || len(got.Audience) != 1 || got.Audience[0] != audience {
				t.Errorf("got %+v", got)
			}

			// Daemons with other keys; one says that it is this issuer.
			liar := start(t, "oidc.example", own("researcher", "")+fmt.Sprintf("authority \"local\" { jwt_issuer = %q }\n", i.url))
			stranger := start(t, "oidc.example", own("researcher", "")+"authority \"local\" { jwt_issuer = \"https://other.example\" }\n")
			mute := start(t, "oidc.example", own("researcher", ""))
			parts, other := strings.Split(good, "."), strings.Split(i.token(t, agent, "another"), ".")
			for name, c := range map[string]struct{ token, want string }{
				"wrong audience":             {i.token(t, agent, "another"), "audience"},
				"claims of another token":    {parts[0] + "." + other[1] + "." + parts[2], "signature"},
				"another issuer":             {stranger.token(t, agent, audience), "signature"},
				"no issuer":                  {mute.token(t, agent, audience), "signature"},
				"another's key, same issuer": {liar.token(t, agent, audience), "signature"},
			} {
				if _, err := verifier.Verify(ctx, c.token); err == nil || !strings.Contains(err.Error(), c.want) {
					t.Errorf("%s: got %v, want an error about its %s", name, err, c.want)
				}
			}
		})
	}
}

// keyOf is the ID of the key that signed a token.
func keyOf(t *testing.T, token string) string {
	t.Helper()
	tok, err := jwt.ParseSigned(token, svidAlgorithms)
	if err != nil {
		t.Fatal(err)
	}
	return tok.Headers[0].KeyID
}

// A verifier that was made once follows each next key, and sees tokens end.
func TestGoOIDCFollowsTheKeys(t *testing.T) {
	const audience, agent = "https://api.example.org", "spiffe://oidc.example/agent/researcher"
	// The shortest life of a CA that there is: the second key signs after 25 s.
	i := startIssuer(t, "oidc.example", "", "", `jwt_issuer = "https://issuer.example.org"`, "ca_ttl = \"30s\"\n  jwt_issuer = \"https://issuer.example.org\"")
	ctx := oidc.ClientContext(t.Context(), i.client)
	provider, err := oidc.NewProvider(ctx, i.url)
	if err != nil {
		t.Fatal(err)
	}
	verifier := provider.VerifierContext(ctx, &oidc.Config{ClientID: audience})
	first := i.token(t, agent, audience)
	if _, err := verifier.Verify(ctx, first); err != nil {
		t.Fatal(err)
	}
	deadline, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	tick := time.NewTicker(500 * time.Millisecond)
	defer tick.Stop()
	for keys := map[string]bool{keyOf(t, first): true}; len(keys) < 2; {
		select {
		case <-tick.C:
		case <-deadline.Done():
			t.Fatal("the key was not rotated")
		}
		token := i.token(t, agent, audience)
		if _, err := verifier.Verify(ctx, token); err != nil {
			t.Fatalf("key %d: %v", len(keys), err)
		}
		keys[keyOf(t, token)] = true
	}
	var expired *oidc.TokenExpiredError
	if _, err := verifier.Verify(ctx, first); !errors.As(err, &expired) {
		t.Errorf("got %v for a token of five seconds, want that it has expired", err)
	}
}

// The lines of the page, by Vault's own command.
func TestVaultFindsTheIssuer(t *testing.T) {
	blocks := meshBlocks(t, oidcSection, "sh")
	if len(blocks) != 1 {
		t.Fatalf("got %d blocks for Vault, want 1", len(blocks))
	}
	binary := built(t, vaultServer)
	i := startIssuer(t, "example.org", "/agents", own("other", "  hint = \"o\"\n"))
	v := startVault(t)
	bin := t.TempDir()
	for name, to := range map[string]string{"vault": binary, "deputy": i.Binary} {
		if err := os.Symlink(to, filepath.Join(bin, name)); err != nil {
			t.Fatal(err)
		}
	}
	script := strings.NewReplacer(
		"oidc_discovery_url=https://issuer.example.org", "oidc_discovery_url="+i.url+" oidc_discovery_ca_pem=@"+i.cert,
		"bound_issuer=https://issuer.example.org", "bound_issuer="+i.url,
		"--audience vault", "--audience vault --spiffe-id spiffe://example.org/agent/researcher",
	).Replace(blocks[0])
	cmd := exec.Command("sh", "-ec", script)
	cmd.Env = append(i.Env(), "PATH="+bin+":"+os.Getenv("PATH"), "VAULT_ADDR="+v.address, "VAULT_TOKEN="+v.root)
	contains(t, process.Run(t, cmd), "token_accessor", "5m", "researcher")

	const id = "spiffe://example.org/agent/"
	liar := start(t, "example.org", own("researcher", "")+fmt.Sprintf("authority \"local\" { jwt_issuer = %q }\n", i.url))
	for name, token := range map[string]string{
		"another agent":    i.token(t, id+"other", "vault"),
		"another audience": i.token(t, id+"researcher", "other"),
		"another's key":    liar.token(t, id+"researcher", "vault"),
	} {
		status, r := v.call(t, "", "POST", "auth/jwt/login", map[string]any{"role": "researcher", "jwt": token})
		if status < 400 || r.Auth.Token != "" {
			t.Errorf("%s: got %d, want no login", name, status)
		}
	}
}
