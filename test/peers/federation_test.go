package peers

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/federation"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/deputy-id/deputy/test/loopback"
	"github.com/deputy-id/deputy/test/need"
	"github.com/deputy-id/deputy/test/process"
	"github.com/deputy-id/deputy/test/scratch"
	"github.com/deputy-id/deputy/test/wait"
)

// endpointURL is that of a bundle endpoint on loopback.
func endpointURL(port int) string { return fmt.Sprintf("https://127.0.0.1:%d/", port) }

// The page's steps, on one host: two daemons federate as it says.
func TestFederationAsThePageSays(t *testing.T) {
	need.Root(t, "the page's lines, which use sudo")
	hcl, sh := meshBlocks(t, "Federation", "hcl"), meshBlocks(t, "Federation", "sh")
	if len(hcl) != 4 || len(sh) != 5 {
		t.Fatalf("the page has %d blocks of HCL and %d of commands, want 4 and 5", len(hcl), len(sh))
	}
	ports := map[string]int{"one": loopback.Port(t), "two": loopback.Port(t)}
	etc := t.TempDir()
	other := map[string]string{"one": "two", "two": "one"}
	swap := strings.NewReplacer("one", "two", "two", "one")
	// fit puts a block of the page on this host.
	fit := func(name, text string) string {
		if name == "two" {
			text = swap.Replace(text)
		}
		for _, n := range []string{"one", "two"} {
			text = strings.ReplaceAll(text, "host-"+n+".example.net:8443", fmt.Sprintf("127.0.0.1:%d", ports[n]))
		}
		text = strings.NewReplacer(
			"0.0.0.0:8443", fmt.Sprintf("127.0.0.1:%d", ports[name]),
			"unix:user:front", fmt.Sprintf("unix:uid:%d", os.Getuid()),
			"/etc/deputy/", etc+"/",
		).Replace(text)
		return strings.Replace(text, fmt.Sprintf("trust_domain = %q\n", name+".example"), "", 1)
	}
	hosts := map[string]*host{}
	for name := range ports {
		hosts[name] = start(t, name+".example", fit(name, hcl[0]))
	}
	dir := t.TempDir()
	// do runs a block of commands on a host.
	do := func(name, text string) (string, error) {
		d := hosts[name]
		if name == "two" && !strings.Contains(text, "token") {
			text = swap.Replace(text)
		}
		cmd := exec.Command("sh", "-ec", strings.NewReplacer("sudo ", "", "/etc/deputy/", etc+"/").Replace(text))
		cmd.Dir = dir
		cmd.Env = append(d.Env(), "PATH="+filepath.Dir(d.Binary)+":"+os.Getenv("PATH"))
		return process.Try(cmd)
	}
	must := func(name, text string) string {
		t.Helper()
		out, err := do(name, text)
		if err != nil {
			t.Fatalf("host %s: %v", name, err)
		}
		return out
	}
	for name := range ports {
		must(name, sh[0])
	}
	for name := range ports {
		must(name, sh[1])
		before, entry, ok := strings.Cut(fit(name, hcl[0]), "\n}\n\nentry")
		if !ok || !strings.Contains(before, "federation {") {
			t.Fatalf("the page's first block is not a federation and an entry:\n%s", hcl[0])
		}
		hosts[name].Configure(t, fit(name, hcl[1])+"\nentry"+entry)
	}
	for name := range ports {
		wait.Until(t, "the bundle of "+other[name], func() bool {
			out := must(name, sh[2])
			return strings.Contains(out, other[name]+".example") && strings.Contains(out, " fine ")
		})
	}
	must("one", sh[3])
	contains(t, must("two", sh[4]), "spiffe://one.example/agent/front")

	a, b := hosts["one"].x509Source(t), hosts["two"].x509Source(t)
	ids := []spiffeid.ID{spiffeid.RequireFromString("spiffe://one.example/agent/front"), spiffeid.RequireFromString("spiffe://two.example/agent/front")}
	if _, err := greeted(t, b, greet(t, a, ids[1]), ids[0]); err != nil {
		t.Errorf("mTLS from two to one: %v", err)
	}
	if _, err := greeted(t, a, greet(t, b, ids[0]), ids[1]); err != nil {
		t.Errorf("mTLS from one to two: %v", err)
	}
}

// The page's blocks for the Web PKI, with a certificate that is replaced while
// both run, and one that is another's.
func TestFederationByTheWebAsThePageSays(t *testing.T) {
	hcl := meshBlocks(t, "Federation", "hcl")
	if len(hcl) != 4 {
		t.Fatalf("the page has %d blocks of HCL, want 4", len(hcl))
	}
	port := loopback.Port(t)
	cert, key, _ := webPair(t)
	files := strings.NewReplacer(
		"0.0.0.0:8443", fmt.Sprintf("127.0.0.1:%d", port),
		"host-two.example.net:8443", fmt.Sprintf("127.0.0.1:%d", port),
		"/etc/deputy/tls/bundle.crt", cert, "/etc/deputy/tls/bundle.key", key, "/etc/deputy/tls/ca.crt", cert,
	)
	two := start(t, "two.example", files.Replace(hcl[2]))
	one := start(t, "one.example", files.Replace(hcl[3]))
	list := func() string { return one.Run(t, "federation", "list") }
	wait.Until(t, "the bundle of two", func() bool { return strings.Contains(list(), " fine ") })
	show := func(d *host) string { return d.Run(t, "bundle", "show", "two.example") }
	if got, want := show(one), show(two); got != want {
		t.Errorf("got %s, want two's own bundle %s", got, want)
	}

	refresh := func() error { return one.Try("federation", "refresh", "two.example") }
	replace := func(with string, files ...string) {
		t.Helper()
		for i, from := range []string{with, strings.TrimSuffix(with, ".crt") + ".key"}[:len(files)] {
			text, err := os.ReadFile(from)
			if err == nil {
				err = os.WriteFile(files[i], text, 0o600)
			}
			if err != nil {
				t.Fatal(err)
			}
		}
	}
	old := filepath.Join(t.TempDir(), "old.crt")
	replace(cert, old)
	next, _, _ := webPair(t)
	replace(next, cert, key) // at the server, and with it the CA that one knows
	wait.Until(t, "two's next certificate", func() bool { return refresh() == nil })
	replace(old, cert) // now one wants the certificate of before, and two keeps the last pair
	if err := refresh(); err == nil || !strings.Contains(err.Error(), "server is not the bundle endpoint") {
		t.Errorf("got %v, want that it is the wrong server", err)
	}
	if got := list(); !strings.Contains(got, "two.example: 1 failure: server is not the bundle endpoint") {
		t.Errorf("got %q, want the failure", got)
	}
	if got, want := show(one), show(two); got != want {
		t.Error("the last good bundle is gone")
	}
}

// Three trust domains whose CAs live for half a minute: one and two by X509-SVIDs
// both ways, three by the Web PKI. Calls go on across all of them while each
// follows the others' rotations.
func TestFederationThroughRotations(t *testing.T) {
	names := []string{"one", "two", "three"}
	ports, web := map[string]int{}, t.TempDir()
	for _, name := range names {
		ports[name] = loopback.Port(t)
	}
	cert, key, _ := webPair(t)
	agent := func(name string) string {
		var with []string
		for _, n := range names {
			if n != name {
				with = append(with, fmt.Sprintf("%q", n+".example"))
			}
		}
		return "\nauthority \"local\" { ca_ttl = \"30s\" }\n" + own("a", "  x509_ttl = \"5s\"\n  federates_with = ["+strings.Join(with, ", ")+"]\n")
	}
	endpoint := func(name string) string {
		profile := `profile "https_spiffe" {}`
		if name == "three" {
			profile = fmt.Sprintf("profile \"https_web\" {\n cert_file = %q\n key_file = %q\n }", cert, key)
		}
		return fmt.Sprintf("  bundle_endpoint {\n address = \"127.0.0.1:%d\"\n %s\n }\n", ports[name], profile)
	}
	all := map[string]*host{}
	for _, name := range names {
		all[name] = start(t, name+".example", "federation {\n"+endpoint(name)+"}\n"+agent(name))
	}
	for _, name := range names {
		scratch.Write(t, filepath.Join(web, name+".json"), all[name].Run(t, "bundle", "show", "--format", "spiffe"))
	}
	for _, name := range names {
		config := "federation {\n" + endpoint(name)
		for _, to := range names {
			profile := fmt.Sprintf("profile \"https_spiffe\" {\n endpoint_spiffe_id = \"spiffe://%s.example/spire/agent/deputy/local\"\n bootstrap_bundle = %q\n }",
				to, filepath.Join(web, to+".json"))
			switch to {
			case name:
				continue
			case "three":
				profile = fmt.Sprintf("profile \"https_web\" { ca_file = %q }", cert)
			}
			config += fmt.Sprintf("  federates_with \"%s.example\" {\n bundle_endpoint_url = %q\n %s\n }\n", to, endpointURL(ports[to]), profile)
		}
		all[name].Configure(t, config+"}\n"+agent(name))
	}
	for _, name := range names {
		wait.Until(t, name+" to follow both others", func() bool {
			out := all[name].Run(t, "federation", "list")
			return strings.Count(out, " fine ") == 2
		})
	}
	// Each calls each until both sides of each pair have changed their CA twice.
	var calls sync.WaitGroup
	for _, pair := range [][2]string{{"one", "two"}, {"two", "one"}, {"one", "three"}, {"three", "two"}} {
		from, to := all[pair[0]].x509Source(t), all[pair[1]].x509Source(t)
		fromID := spiffeid.RequireFromString("spiffe://" + pair[0] + ".example/agent/a")
		toID := spiffeid.RequireFromString("spiffe://" + pair[1] + ".example/agent/a")
		address := greet(t, to, fromID)
		calls.Go(func() {
			cas := map[string]bool{}
			for end := time.Now().Add(100 * time.Second); len(cas) < 3; time.Sleep(100 * time.Millisecond) {
				c, err := greeted(t, from, address, toID)
				if err != nil {
					t.Errorf("%s calls %s after %d CAs: %v", pair[0], pair[1], len(cas), err)
					return
				}
				if cas[string(c.AuthorityKeyId)] = true; time.Now().After(end) {
					t.Errorf("%s calls %s: got %d CAs, want three", pair[0], pair[1], len(cas))
					return
				}
			}
		})
	}
	calls.Wait()
}

// Stock go-spiffe fetches and watches our endpoints by both profiles.
func TestGoSPIFFEFollowsOurEndpoint(t *testing.T) {
	cert, key, client := webPair(t)
	roots := client.Transport.(*http.Transport).TLSClientConfig.RootCAs
	td := spiffeid.RequireTrustDomainFromString("peers.example")
	for _, profile := range []string{"https_spiffe", "https_web"} {
		t.Run(profile, func(t *testing.T) {
			t.Parallel()
			port := loopback.Port(t)
			block := fmt.Sprintf("profile %q {}", profile)
			if profile == "https_web" {
				block = fmt.Sprintf("profile %q {\n cert_file = %q\n key_file = %q\n}", profile, cert, key)
			}
			d := start(t, "peers.example", fmt.Sprintf("authority \"local\" { ca_ttl = \"30s\" }\nfederation {\n bundle_endpoint {\n address = \"127.0.0.1:%d\"\n %s\n }\n}\n", port, block))
			first, err := spiffebundle.Parse(td, []byte(d.Run(t, "bundle", "show", "--format", "spiffe")))
			if err != nil {
				t.Fatal(err)
			}
			set := spiffebundle.NewSet(first)
			option := federation.WithWebPKIRoots(roots)
			if profile == "https_spiffe" {
				option = federation.WithSPIFFEAuth(set, spiffeid.RequireFromString("spiffe://peers.example/spire/agent/deputy/local"))
			}
			w := &watcher{set: set, seen: make(chan *spiffebundle.Bundle, 100)}
			ctx, cancel := context.WithTimeout(t.Context(), 70*time.Second)
			defer cancel()
			done := make(chan error, 1)
			go func() { done <- federation.WatchBundle(ctx, td, endpointURL(port), w, option) }()
			// The first, the second announced, the first gone, a third announced.
			for n := 0; ; {
				select {
				case b := <-w.seen:
					if s, _ := b.SequenceNumber(); n == 0 || !b.HasX509Authority(first.X509Authorities()[0]) {
						n++
						t.Logf("sequence %d: %d X.509 authorities", s, len(b.X509Authorities()))
					}
					if n < 2 {
						continue
					}
				case err := <-done:
					t.Fatalf("after %d bundles: %v", n, err)
				}
				break
			}
			cancel()
			<-done
			if _, err := federation.FetchBundle(t.Context(), td, endpointURL(port)); err == nil {
				t.Error("a bundle came from a server that the system's CAs do not know")
			}
		})
	}
}

// watcher keeps up as go-spiffe's documentation says. A failed fetch is an error.
type watcher struct {
	set  *spiffebundle.Set
	seen chan *spiffebundle.Bundle
}

func (w *watcher) NextRefresh(hint time.Duration) time.Duration { return hint }

func (w *watcher) OnUpdate(b *spiffebundle.Bundle) {
	w.set.Add(b)
	w.seen <- b
}

func (w *watcher) OnError(err error) { panic(err) }

// A stock SPIRE server and a Deputy federate both ways with X509-SVIDs, with the
// page's lines, and SPIRE's command line looks after it on our side.
func TestFederationWithASPIREServer(t *testing.T) {
	hcl, conf := meshBlocks(t, "Federation", "hcl"), meshBlocks(t, "Federation", "conf")
	if len(conf) != 1 {
		t.Fatalf("the page has %d blocks of SPIRE's configuration, want one", len(conf))
	}
	mine, theirs := loopback.Port(t), loopback.Port(t)
	local := strings.NewReplacer(
		"0.0.0.0:8443", fmt.Sprintf("127.0.0.1:%d", mine),
		`"0.0.0.0"`, `"127.0.0.1"`, "= 8443", fmt.Sprintf("= %d", theirs),
		"host-one.example.net:8443", fmt.Sprintf("127.0.0.1:%d", mine),
		"host-two.example.net:8443", fmt.Sprintf("127.0.0.1:%d", theirs),
		// The sample's server is of example.org.
		"two.example/spire/agent/deputy/local", "example.org/spire/server",
		"two.example", "example.org",
	)
	s := newSPIRE(t, changes{agent: withoutAttest, server: func(sample string) string {
		sample = without(`CredentialComposer "deputy"`)(sample)
		return strings.Replace(sample, "server {\n", "server {\n"+local.Replace(conf[0]), 1)
	}})
	s.startServer(t)
	dir := t.TempDir()
	bootstrap := scratch.Write(t, filepath.Join(dir, "example.org.json"), s.cli(t, "bundle", "show", "-format", "spiffe"))
	text := strings.ReplaceAll(local.Replace(hcl[1]), "/etc/deputy/example.org.json", bootstrap)
	d := start(t, "one.example", text+"authority \"local\" { ca_ttl = \"30s\" }\n"+own("here", "  federates_with = [\"example.org\"]\n"))

	// They follow us.
	bundle := scratch.Write(t, filepath.Join(dir, "one.example.json"), d.Run(t, "bundle", "show", "--format", "spiffe"))
	s.cli(t, "bundle", "set", "-format", "spiffe", "-id", "spiffe://one.example", "-path", bundle)
	// theyHave is our bundle as they have it, once it is fetched.
	theyHave := func() *spiffebundle.Bundle {
		contains(t, s.cli(t, "federation", "refresh", "-id", "one.example"), "refreshed")
		b, err := spiffebundle.Parse(spiffeid.RequireTrustDomainFromString("one.example"), []byte(s.cli(t, "bundle", "list", "-format", "spiffe", "-id", "spiffe://one.example")))
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	first := theyHave().X509Authorities()
	wait.Until(t, "SPIRE to follow our rotation", func() bool { return len(theyHave().X509Authorities()) == len(first)+1 })

	// We follow them; SPIRE's command line sees it.
	wait.Until(t, "us to follow SPIRE", func() bool {
		return strings.Contains(d.Run(t, "federation", "list"), " fine ")
	})
	contains(t, d.cli(t, "federation", "list"), "Found 1 federation relationship", "example.org", fmt.Sprintf("https://127.0.0.1:%d/", theirs), "https_spiffe", "spiffe://example.org/spire/server")
	contains(t, d.cli(t, "federation", "show", "-trustDomain", "example.org"), "example.org", "https_spiffe")
	contains(t, d.cli(t, "federation", "refresh", "-id", "example.org"), "refreshed")
	contains(t, d.cliFails(t, "federation", "refresh", "-id", "other.example"), "there is no federation relationship")
	contains(t, d.cliFails(t, "federation", "delete", "-id", "example.org"), "relationships are the configuration file's")
	contains(t, d.cliFails(t, "federation", "create", "-trustDomain", "x.example", "-bundleEndpointURL", "https://x.example", "-bundleEndpointProfile", "https_web"), "relationships are the configuration file's")

	// They announce another CA.
	run(t, s.serverBin, "localauthority", "x509", "prepare", "-socketPath", s.serverSock)
	wait.Until(t, "us to follow SPIRE's rotation", func() bool {
		d.Run(t, "federation", "refresh", "example.org")
		return strings.Count(d.Run(t, "bundle", "show", "example.org"), "BEGIN CERTIFICATE") == 2
	})

	// What their server signs, our agent's bundle verifies.
	source := d.x509Source(t)
	b, err := source.GetX509BundleForTrustDomain(spiffeid.RequireTrustDomainFromString("example.org"))
	if err != nil {
		t.Fatal(err)
	}
	pool := x509.NewCertPool()
	for _, c := range b.X509Authorities() {
		pool.AddCert(c)
	}
	conn, err := tls.Dial("tcp", net.JoinHostPort("127.0.0.1", fmt.Sprint(theirs)), &tls.Config{InsecureSkipVerify: true})
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if _, err := conn.ConnectionState().PeerCertificates[0].Verify(x509.VerifyOptions{Roots: pool}); err != nil {
		t.Errorf("SPIRE's server does not verify: %v", err)
	}
}
