package peers

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4/jwt"

	"github.com/deputy-id/deputy/test/loopback"
	"github.com/deputy-id/deputy/test/page"
	"github.com/deputy-id/deputy/test/process"
)

const keycloakVersion = "26.4.5"

// keycloakHome has Keycloak from Maven, built with what the tests need of it,
// once for this machine.
var keycloakHome = sync.OnceValues(func() (string, error) {
	path := cached("keycloak-" + keycloakVersion)
	if _, err := os.Stat(path); err == nil {
		return path, nil
	}
	fmt.Fprintf(os.Stderr, "fetching keycloak-%s (once; 160 MB)\n", keycloakVersion)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return "", err
	}
	dir, err := os.MkdirTemp(filepath.Dir(path), "keycloak-")
	if err != nil {
		return "", err
	}
	defer os.RemoveAll(dir)
	name := "keycloak-" + keycloakVersion
	for _, args := range [][]string{
		{"mvn", "-q", "-B", "dependency:copy", "-Dartifact=org.keycloak:keycloak-quarkus-dist:" + keycloakVersion + ":tar.gz", "-DoutputDirectory=" + dir},
		{"tar", "-xzf", filepath.Join(dir, "keycloak-quarkus-dist-"+keycloakVersion+".tar.gz"), "-C", dir},
		{filepath.Join(dir, name, "bin/kc.sh"), "build", "--db=dev-mem", "--features=spiffe,client-auth-federated"},
	} {
		if out, err := exec.Command(args[0], args[1:]...).CombinedOutput(); err != nil {
			return "", fmt.Errorf("%s: %w\n%s", filepath.Base(args[0]), err, out)
		}
	}
	if err := os.Rename(filepath.Join(dir, name), path); err != nil {
		if _, there := os.Stat(path); there != nil { // else another test was faster
			return "", err
		}
	}
	return path, nil
})

// A keycloak is a running Keycloak that forgets everything in the end.
type keycloak struct{ base, admin string }

// startKeycloak runs one that trusts the certificates in a file.
func startKeycloak(t *testing.T, trusted string) *keycloak {
	t.Helper()
	home := built(t, keycloakHome)
	// It writes beside its script, so it gets a directory of its own.
	dir := t.TempDir()
	script, err := os.ReadFile(filepath.Join(home, "bin/kc.sh"))
	if err == nil {
		err = errors.Join(os.MkdirAll(filepath.Join(dir, "bin"), 0o755), os.MkdirAll(filepath.Join(dir, "data"), 0o755),
			os.WriteFile(filepath.Join(dir, "bin/kc.sh"), script, 0o755))
	}
	for _, name := range []string{"conf", "lib", "providers", "themes"} {
		err = errors.Join(err, os.Symlink(filepath.Join(home, name), filepath.Join(dir, name)))
	}
	if err != nil {
		t.Fatal(err)
	}
	port := fmt.Sprint(loopback.Port(t))
	k := &keycloak{base: "http://127.0.0.1:" + port}
	r := process.Start(t, exec.Command("env", "JAVA_OPTS_KC_HEAP=-Xms64m -Xmx256m",
		"KC_BOOTSTRAP_ADMIN_USERNAME=admin", "KC_BOOTSTRAP_ADMIN_PASSWORD=admin",
		filepath.Join(dir, "bin/kc.sh"), "start", "--optimized", "--cache=local", "--http-enabled=true",
		"--http-host=127.0.0.1", "--http-port="+port, "--hostname="+k.base, "--truststore-paths="+trusted))
	for end := time.Now().Add(4 * time.Minute); ; time.Sleep(200 * time.Millisecond) { // it has a minute of work, on an idle machine less
		if resp, err := http.Get(k.base + "/realms/master"); err == nil {
			resp.Body.Close()
			if resp.StatusCode == http.StatusOK {
				break
			}
		}
		if r.Alive(t); time.Now().After(end) {
			t.Fatal("keycloak did not become ready")
		}
	}
	status, reply := k.post(t, "master", url.Values{"grant_type": {"password"}, "client_id": {"admin-cli"}, "username": {"admin"}, "password": {"admin"}})
	if status != http.StatusOK {
		t.Fatalf("log in as administrator: got %d %v", status, reply)
	}
	k.admin, _ = reply["access_token"].(string)
	return k
}

// post asks a realm's token endpoint.
func (k *keycloak) post(t *testing.T, realm string, form url.Values) (int, map[string]any) {
	t.Helper()
	resp, err := http.PostForm(k.issuer(realm)+"/protocol/openid-connect/token", form)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	var reply map[string]any
	if err := json.NewDecoder(resp.Body).Decode(&reply); err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, reply
}

func (k *keycloak) issuer(realm string) string { return k.base + "/realms/" + realm }

// create makes a realm.
func (k *keycloak) create(t *testing.T, realm string) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), "POST", k.base+"/admin/realms", strings.NewReader(realm))
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Authorization", "Bearer "+k.admin)
	req.Header.Set("Content-Type", "application/json")
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if resp.StatusCode != http.StatusCreated {
		t.Fatalf("create the realm: got %s", resp.Status)
	}
}

// pagesRealm is the realm of the tests, in which there must be what the page shows.
func pagesRealm(t *testing.T) string {
	t.Helper()
	text, err := os.ReadFile("testdata/keycloak-realm.json")
	if err != nil {
		t.Fatal(err)
	}
	var realm struct{ IdentityProviders, Clients []any }
	if err := json.Unmarshal(text, &realm); err != nil {
		t.Fatal(err)
	}
	all := slices.Concat(realm.IdentityProviders, realm.Clients)
	blocks := meshBlocks(t, oidcSection, "json")
	if len(blocks) != len(all) {
		t.Errorf("the page shows %d parts of the realm, want all %d", len(blocks), len(all))
	}
	for _, block := range blocks {
		var part any
		if err := json.Unmarshal([]byte(block), &part); err != nil {
			t.Fatalf("%v:\n%s", err, block)
		}
		if !slices.ContainsFunc(all, func(one any) bool { return reflect.DeepEqual(one, part) }) {
			t.Errorf("the realm has nothing like the page's\n%s", block)
		}
	}
	return string(text)
}

// webBundle is the page's bundle endpoint with a certificate of the web.
func webBundle(t *testing.T, address, cert, key string) string {
	t.Helper()
	for _, block := range meshBlocks(t, "Federation", "hcl") {
		if strings.Contains(block, "bundle_endpoint {") && strings.Contains(block, `profile "https_web"`) {
			return page.Change(t, block, "0.0.0.0:8443", address, "/etc/deputy/tls/bundle.crt", cert, "/etc/deputy/tls/bundle.key", key)
		}
	}
	t.Fatal("the page has no bundle endpoint with a certificate of the web")
	return ""
}

// A client of a realm logs in by a JWT-SVID alone: found by OpenID Connect
// discovery's keys, and by SPIFFE's bundle.
func TestKeycloakTakesJWTSVIDsAsClientAuthentication(t *testing.T) {
	realm := pagesRealm(t)
	i := newIssuer(t, "")
	bundle := loopback.Address(t)
	i.start(t, "example.org", own("writer", "  hint = \"w\"\n")+own("nobody", "  hint = \"n\"\n")+webBundle(t, bundle, i.cert, i.key))
	k := startKeycloak(t, i.cert)
	k.create(t, page.Change(t, realm, "https://issuer.example.org", i.url, "https://bundle.example.org:8443/", "https://"+bundle+"/"))

	// The same names, and keys that nobody was told of.
	liar := start(t, "example.org", own("researcher", "  hint = \"r\"\n")+own("writer", "  hint = \"w\"\n")+fmt.Sprintf("authority \"local\" { jwt_issuer = %q }\n", i.url))

	const id = "spiffe://example.org/agent/"
	here := k.issuer("deputy")
	for _, way := range []struct{ name, client, kind string }{
		{"by OpenID Connect", "researcher", "jwt-bearer"},
		{"by the bundle", "writer", "jwt-spiffe"},
	} {
		t.Run(way.name, func(t *testing.T) {
			ask := func(token string, more ...string) (int, map[string]any) {
				t.Helper()
				form := url.Values{"grant_type": {"client_credentials"}, "client_assertion": {token},
					"client_assertion_type": {"urn:ietf:params:oauth:client-assertion-type:" + way.kind}}
				for n := 0; n < len(more); n += 2 {
					form.Set(more[n], more[n+1])
				}
				return k.post(t, "deputy", form)
			}
			good := i.token(t, id+way.client, here)
			status, reply := ask(good)
			if status != http.StatusOK {
				t.Fatalf("got %d %v, want a token", status, reply)
			}
			text, _ := reply["access_token"].(string)
			tok, err := jwt.ParseSigned(text, svidAlgorithms)
			if err != nil {
				t.Fatal(err)
			}
			var claims map[string]any
			if err := tok.UnsafeClaimsWithoutVerification(&claims); err != nil {
				t.Fatal(err)
			}
			if claims["iss"] != here || claims["azp"] != way.client {
				t.Errorf("got a token for %v by %v", claims["azp"], claims["iss"])
			}

			parts, other := strings.Split(i.token(t, id+way.client, here), "."), strings.Split(i.token(t, id+way.client, "https://other.example"), ".")
			for name, c := range map[string]struct {
				token string
				more  []string
			}{
				"another audience":           {i.token(t, id+way.client, "https://other.example"), nil},
				"an agent without client":    {i.token(t, id+"nobody", here), nil},
				"an agent as another client": {i.token(t, id+"nobody", here), []string{"client_id", way.client}},
				"claims of another token":    {other[0] + "." + parts[1] + "." + other[2], nil},
				"another's key":              {liar.token(t, id+way.client, here), nil},
				"no assertion":               {"", []string{"client_id", way.client}},
			} {
				status, reply := ask(c.token, c.more...)
				if status != http.StatusBadRequest && status != http.StatusUnauthorized || reply["access_token"] != nil {
					t.Errorf("%s: got %d %v, want no token", name, status, reply)
				}
			}
			// What the page says of reuse.
			status, reply = ask(good)
			if again := status == http.StatusOK; again != (way.kind == "jwt-spiffe") {
				t.Errorf("the same token again: got %d %v", status, reply)
			}
		})
	}
}
