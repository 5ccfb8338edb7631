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
)

// A fileHost is where programs read the files of deputy watch: the page's
// paths below a directory, and a daemon with the page's entries, whose
// X.509-SVIDs live for six seconds.
type fileHost struct {
	*daemon
	root string
	env  []string // beside the test's own
}

func newFileHost(t *testing.T) *fileHost {
	t.Helper()
	if os.Geteuid() != 0 {
		if os.Getenv("CI") != "" {
			t.Fatal("deputy exec --name takes root")
		}
		t.Skip("SKIPPED: deputy exec --name takes root")
	}
	root, err := os.MkdirTemp("", "df")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(root) })
	h := &fileHost{root: root}
	entries := filesPage(t, "# deputy.hcl")
	for _, id := range []string{"/agents/other", "/agents/Reporting", "/agents/reporting.2", "/analysts/amy"} {
		entries += fmt.Sprintf("entry %q {\n  selectors = [\"process:exec:%s\"]\n}\n", id, filepath.Base(id))
	}
	h.daemon = start(t, "example.org", strings.ReplaceAll(entries, "  selectors =", "  x509_ttl = \"6s\"\n  selectors ="))
	// Other users run the binary, and reach the socket.
	for _, dir := range []string{root, filepath.Dir(h.binary), h.dir} {
		if err := os.Chmod(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for _, dir := range []string{"run", "etc/haproxy", "var/lib/postgresql/15"} {
		if err := os.MkdirAll(h.at("/"+dir), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	h.env = []string{"PATH=" + filepath.Dir(h.binary) + ":" + os.Getenv("PATH") + ":/usr/sbin",
		"SPIFFE_ENDPOINT_SOCKET=" + h.workload, "DEPUTY_ADMIN_SOCKET=" + h.admin}
	return h
}

// at is where a path of the page is in the test.
func (h *fileHost) at(path string) string { return h.root + path }

// page is one of the page's snippets, with the paths of the test.
func (h *fileHost) page(t *testing.T, first string) string {
	t.Helper()
	text := filesPage(t, first)
	for _, dir := range []string{"/run/", "/etc/haproxy/", "/var/lib/"} {
		text = strings.ReplaceAll(text, dir, h.at(dir))
	}
	return text
}

// filesPage is the block of docs/mesh.md that begins with this line.
func filesPage(t *testing.T, first string) string {
	t.Helper()
	_, rest, ok := strings.Cut(filesText(t), "\n"+first+"\n")
	text, _, ok2 := strings.Cut(rest, "```")
	if !ok || !ok2 {
		t.Fatalf("docs/mesh.md has no block %q", first)
	}
	return text
}

func filesText(t *testing.T) string {
	t.Helper()
	page, err := os.ReadFile("../../docs/mesh.md")
	if err != nil {
		t.Fatal(err)
	}
	return string(page)
}

// command runs a script of the page to its end.
func (h *fileHost) command(script string) *exec.Cmd {
	cmd := exec.Command("sh", "-ec", script)
	cmd.Env = append(os.Environ(), h.env...)
	return cmd
}

// watch runs the page's script of a watch for the length of the test, and
// returns when its files are there.
func (h *fileHost) watch(t *testing.T, script, dir string) *running {
	t.Helper()
	script = strings.Replace(script, "deputy exec", "exec deputy exec", 1)
	log := filepath.Join(t.TempDir(), "watch.log")
	r := launch(t, log, "env", append(h.env[:len(h.env):len(h.env)], "sh", "-ec", script)...)
	await(t, "the files in "+dir, func() bool {
		select {
		case <-r.done:
			t.Fatalf("%s has ended:\n%s", script, r.log())
		default:
		}
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

// binaryOf finds a program that test/prerequisites installs.
func binaryOf(t *testing.T, names ...string) string {
	t.Helper()
	for _, name := range names {
		if path, err := exec.LookPath(name); err == nil {
			return path
		}
	}
	if os.Getenv("CI") != "" {
		t.Fatalf("%s is not here", names[0])
	}
	t.Skipf("SKIPPED: %s is not here (test/prerequisites installs it on Debian)", names[0])
	return ""
}

// otherAgents are not let in. That IDs differ in case alone makes them different.
var otherAgents = []string{"other", "Reporting", "reporting.2"}

// webServer is what the tests of nginx and HAProxy have in common.
func (h *fileHost) webServer(t *testing.T, port int) {
	t.Helper()
	address := fmt.Sprintf("127.0.0.1:%d", port)
	const host, reporting = "web.example.org", "spiffe://example.org/agents/reporting"
	await(t, "the server", func() bool {
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
