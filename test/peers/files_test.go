package peers

import (
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/deputy-id/deputy/test/need"
	"github.com/deputy-id/deputy/test/process"
	"github.com/deputy-id/deputy/test/scratch"
	"github.com/deputy-id/deputy/test/wait"
)

// A fileHost is where programs read the files of deputy watch: the page's
// paths below a directory, and a daemon with the page's entries, whose
// X.509-SVIDs live for six seconds.
type fileHost struct {
	*host
	root string
	env  []string
}

func newFileHost(t *testing.T) *fileHost {
	t.Helper()
	need.Root(t, "deputy exec --name")
	h := &fileHost{root: scratch.Dir(t)}
	entries := meshBlock(t, "deputy.hcl")
	for _, id := range []string{"/agents/other", "/agents/Reporting", "/agents/reporting.2", "/analysts/amy"} {
		entries += fmt.Sprintf("entry %q {\n  selectors = [\"process:exec:%s\"]\n}\n", id, filepath.Base(id))
	}
	h.host = start(t, "example.org", strings.ReplaceAll(entries, "  selectors =", "  x509_ttl = \"6s\"\n  selectors ="))
	for _, dir := range []string{"run", "etc/haproxy", "var/lib/postgresql/15"} {
		if err := os.MkdirAll(h.at("/"+dir), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	h.env = append(h.Env(), "PATH="+filepath.Dir(h.Binary)+":"+os.Getenv("PATH")+":/usr/sbin")
	return h
}

// at is where a path of the page is in the test.
func (h *fileHost) at(path string) string { return h.root + path }

// page is one of the page's snippets, with the paths of the test.
func (h *fileHost) page(t *testing.T, comment string) string {
	t.Helper()
	text := meshBlock(t, comment)
	for _, dir := range []string{"/run/", "/etc/haproxy/", "/var/lib/"} {
		text = strings.ReplaceAll(text, dir, h.at(dir))
	}
	return text
}

// command runs a script of the page to its end.
func (h *fileHost) command(script string) *exec.Cmd {
	cmd := exec.Command("sh", "-ec", script)
	cmd.Env = h.env
	return cmd
}

// watch runs the page's script of a watch for the length of the test, and
// returns when its files are there.
func (h *fileHost) watch(t *testing.T, script, dir string) *process.Process {
	t.Helper()
	script = strings.Replace(script, "deputy exec", "exec deputy exec", 1)
	r := process.Start(t, h.command(script))
	r.Until(t, "the files in "+dir, func() bool {
		_, err := os.Stat(filepath.Join(h.at(dir), "svid.0.pem"))
		return err == nil
	})
	return r
}

// agent keeps the files of an agent that deputy exec names.
func (h *fileHost) agent(t *testing.T, name string) {
	t.Helper()
	h.watch(t, fmt.Sprintf("deputy exec --name %s -- deputy watch --write %s", name, h.at("/run/"+name)), "/run/"+name)
}

// identity reads one set of files.
func (h *fileHost) identity(t *testing.T, name string) *tls.Config {
	t.Helper()
	set, err := filepath.EvalSymlinks(h.at("/run/" + name + "/..data"))
	if err != nil {
		t.Fatal(err)
	}
	pair, err := tls.LoadX509KeyPair(filepath.Join(set, "svid.0.pem"), filepath.Join(set, "svid.0.key"))
	if err != nil {
		t.Fatal(err)
	}
	bundle, err := os.ReadFile(filepath.Join(set, "bundle.0.pem"))
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(bundle) {
		t.Fatal("the bundle has no certificate")
	}
	return &tls.Config{Certificates: []tls.Certificate{pair}, RootCAs: roots}
}

// get asks an HTTPS server, on a connection of its own, and returns the status, the body
// and the serial number of the server's certificate.
func get(c *tls.Config, name, address string) (status int, body, serial string, err error) {
	c.ServerName = name
	client := http.Client{Timeout: 20 * time.Second, Transport: &http.Transport{TLSClientConfig: c, DisableKeepAlives: true}}
	resp, err := client.Get("https://" + address + "/")
	if err != nil {
		return 0, "", "", err
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	return resp.StatusCode, strings.TrimSpace(string(text)), resp.TLS.PeerCertificates[0].SerialNumber.Text(16), err
}

// rotates calls until it has met four certificates, and wants no call to fail.
func rotates(t *testing.T, call func() (serial string, err error)) {
	t.Helper()
	seen := make(map[string]bool)
	calls := 0
	for end := time.Now().Add(time.Minute); len(seen) < 4; calls++ {
		serial, err := call()
		if err != nil {
			t.Fatalf("call %d, certificate %d: %v", calls, len(seen), err)
		}
		seen[serial] = true
		if time.Now().After(end) {
			t.Fatalf("got %d certificates in %d calls within a minute, want 4", len(seen), calls)
		}
	}
	t.Logf("%d calls, %d certificates", calls, len(seen))
}

// otherAgents are not let in. That IDs differ in case alone makes them different.
var otherAgents = []string{"other", "Reporting", "reporting.2"}

// webServer is what the tests of nginx and HAProxy have in common.
func (h *fileHost) webServer(t *testing.T, port int) {
	t.Helper()
	address := fmt.Sprintf("127.0.0.1:%d", port)
	const host, reporting = "web.example.org", "spiffe://example.org/agents/reporting"
	wait.Until(t, "the server", func() bool {
		_, _, _, err := get(h.identity(t, "reporting"), host, address)
		return err == nil
	})
	if status, body, _, err := get(h.identity(t, "reporting"), host, address); status != 200 || body != reporting {
		t.Errorf("got %d %q, %v, want 200 %q", status, body, err, reporting)
	}
	for _, name := range otherAgents {
		if status, body, _, err := get(h.identity(t, name), host, address); status != 403 || strings.Contains(body, "spiffe://") {
			t.Errorf("agent %s: got %d %q, %v, want 403", name, status, body, err)
		}
	}
	if status, _, _, err := get(h.identity(t, "reporting"), "db.example.org", address); err == nil {
		t.Errorf("under a name that is not the server's: got %d, want an error", status)
	}
	for name, certificates := range map[string][]tls.Certificate{
		"nobody":                       nil,
		"a stranger with that subject": {stranger509(t, h)},
	} {
		c := h.identity(t, "reporting")
		c.Certificates = certificates
		if status, body, _, err := get(c, host, address); err == nil && status != 400 {
			t.Errorf("%s: got %d %q, want to be turned away", name, status, body)
		}
	}
	rotates(t, func() (string, error) {
		status, body, serial, err := get(h.identity(t, "reporting"), host, address)
		if err == nil && (status != 200 || body != reporting) {
			err = fmt.Errorf("got %d %q", status, body)
		}
		return serial, err
	})
}

// stranger509 signs, by itself, what the agent's certificate says.
func stranger509(t *testing.T, h *fileHost) tls.Certificate {
	t.Helper()
	pair := h.identity(t, "reporting").Certificates[0]
	leaf, err := x509.ParseCertificate(pair.Certificate[0])
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.CreateCertificate(rand.Reader, leaf, leaf, leaf.PublicKey, pair.PrivateKey)
	if err != nil {
		t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: pair.PrivateKey}
}
