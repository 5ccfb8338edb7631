package peers

import (
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/jwtbundle"
	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
)

// cli runs a command of SPIRE's server against the admin socket of the daemon.
func (d *daemon) cli(t *testing.T, noun, verb string, args ...string) string {
	t.Helper()
	binary, err := spireServer()
	if err != nil {
		t.Fatal(err)
	}
	return run(t, binary, append([]string{noun, verb, "-socketPath", d.admin}, args...)...)
}

func (d *daemon) cliFails(t *testing.T, noun, verb string, args ...string) string {
	t.Helper()
	binary, err := spireServer()
	if err != nil {
		t.Fatal(err)
	}
	return fail(t, binary, append([]string{noun, verb, "-socketPath", d.admin}, args...)...)
}

func contains(t *testing.T, got string, want ...string) {
	t.Helper()
	for _, w := range want {
		if !strings.Contains(got, w) {
			t.Errorf("got %q, want %q in it", got, w)
		}
	}
}

const fileEntry = `
entry "/agent/filed" {
  selectors = ["unix:uid:4242"]
}
`

func TestSpireServerEntryCommands(t *testing.T) {
	d := start(t, "peers.example", fileEntry)

	out := d.cli(t, "entry", "create", "-spiffeID", "spiffe://peers.example/agent/a", "-parentID", "spiffe://peers.example/spire/agent/deputy/local",
		"-selector", "unix:uid:1000", "-selector", "docker:label:role:x", "-x509SVIDTTL", "600", "-jwtSVIDTTL", "60",
		"-dns", "a.example", "-hint", "internal", "-entryID", "first", "-jwtSVIDIncludeJTI")
	contains(t, out, "first", "spiffe://peers.example/agent/a", "unix:uid:1000", "docker:label:role:x", "600", "a.example", "internal")
	d.cli(t, "entry", "create", "-spiffeID", "spiffe://peers.example/agent/b", "-parentID", "spiffe://peers.example/spire/server", "-selector", "unix:uid:1000")

	for _, c := range []struct {
		name string
		args []string
		want string
	}{
		{"all", nil, "Found 3 entries"},
		{"by ID", []string{"-entryID", "first"}, "Found 1 entry"},
		{"by SPIFFE ID", []string{"-spiffeID", "spiffe://peers.example/agent/b"}, "Found 1 entry"},
		{"by parent", []string{"-parentID", "spiffe://peers.example/spire/server"}, "Found 1 entry"},
		{"by hint", []string{"-hint", "internal"}, "Found 1 entry"},
		{"by selector, superset", []string{"-selector", "unix:uid:1000"}, "Found 2 entries"},
		{"by selector, exact", []string{"-selector", "unix:uid:1000", "-matchSelectorsOn", "exact"}, "Found 1 entry"},
		{"by selector, subset", []string{"-selector", "unix:uid:1000", "-selector", "unix:gid:7", "-matchSelectorsOn", "subset"}, "Found 1 entry"},
		{"by selector, any", []string{"-selector", "docker:label:role:x", "-selector", "unix:uid:4242", "-matchSelectorsOn", "any"}, "Found 2 entries"},
		{"none", []string{"-spiffeID", "spiffe://peers.example/agent/none"}, "Found 0 entries"},
	} {
		t.Run("show "+c.name, func(t *testing.T) { contains(t, d.cli(t, "entry", "show", c.args...), c.want) })
	}
	contains(t, d.cli(t, "entry", "count"), "3 registration entries")
	contains(t, d.cli(t, "entry", "count", "-hint", "internal"), "1 registration entry")

	out = d.cli(t, "entry", "update", "-entryID", "first", "-spiffeID", "spiffe://peers.example/agent/c",
		"-parentID", "spiffe://peers.example/spire/agent/deputy/local", "-selector", "unix:uid:1001")
	contains(t, out, "spiffe://peers.example/agent/c", "unix:uid:1001")
	contains(t, d.cli(t, "entry", "show", "-entryID", "first"), "spiffe://peers.example/agent/c")

	for _, c := range []struct {
		name string
		args []string
		want string
	}{
		{"similar", []string{"-spiffeID", "spiffe://peers.example/agent/b", "-parentID", "spiffe://peers.example/spire/server", "-selector", "unix:uid:1000"}, "already exists"},
		{"of another parent", []string{"-spiffeID", "spiffe://peers.example/agent/x", "-parentID", "spiffe://peers.example/spire/agent/other", "-selector", "unix:uid:1"}, "parent"},
		{"of another trust domain", []string{"-spiffeID", "spiffe://other.example/agent/x", "-parentID", "spiffe://peers.example/spire/server", "-selector", "unix:uid:1"}, "trust domain"},
		{"admin", []string{"-admin", "-spiffeID", "spiffe://peers.example/agent/x", "-parentID", "spiffe://peers.example/spire/server", "-selector", "unix:uid:1"}, "admin"},
		{"downstream", []string{"-downstream", "-spiffeID", "spiffe://peers.example/agent/x", "-parentID", "spiffe://peers.example/spire/server", "-selector", "unix:uid:1"}, "downstream"},
		{"storeSVID", []string{"-storeSVID", "-spiffeID", "spiffe://peers.example/agent/x", "-parentID", "spiffe://peers.example/spire/server", "-selector", "unix:uid:1"}, "store"},
	} {
		t.Run("create refuses "+c.name, func(t *testing.T) { contains(t, d.cliFails(t, "entry", "create", c.args...), c.want) })
	}

	var shown struct {
		Entries []struct{ Id string }
	}
	if err := json.Unmarshal([]byte(d.cli(t, "entry", "show", "-spiffeID", "spiffe://peers.example/agent/filed", "-output", "json")), &shown); err != nil || len(shown.Entries) != 1 {
		t.Fatalf("got %+v, %v, want the entry of the file", shown, err)
	}
	contains(t, d.cliFails(t, "entry", "delete", "-entryID", shown.Entries[0].Id), "FailedPrecondition")
	d.cli(t, "entry", "delete", "-entryID", "first")
	contains(t, d.cliFails(t, "entry", "delete", "-entryID", "first"), "NotFound")
	contains(t, d.cli(t, "entry", "count"), "2 registration entries")
}

func TestSpireServerEntryExpires(t *testing.T) {
	d := start(t, "peers.example", "")
	at := time.Now().Add(3 * time.Second)
	d.cli(t, "entry", "create", "-spiffeID", "spiffe://peers.example/agent/short", "-parentID", "spiffe://peers.example/spire/server",
		"-selector", "unix:uid:0", "-entryExpiry", strconv.FormatInt(at.Unix(), 10))
	contains(t, run(t, d.binary, "fetch", "x509", "--socket", d.workload), "spiffe://peers.example/agent/short")
	for end := time.Now().Add(15 * time.Second); !strings.Contains(d.cli(t, "entry", "count"), "0 registration entries"); time.Sleep(200 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("the entry did not expire")
		}
	}
	contains(t, fail(t, d.binary, "fetch", "x509", "--socket", d.workload), "no identity")
}

func TestSpireServerBundleCommands(t *testing.T) {
	d, other := start(t, "peers.example", ""), start(t, "other.example", "")
	td := spiffeid.RequireTrustDomainFromString("other.example")

	contains(t, d.cli(t, "bundle", "show"), "BEGIN CERTIFICATE")
	file := filepath.Join(t.TempDir(), "bundle.json")
	theirs := other.cli(t, "bundle", "show", "-format", "spiffe")
	if err := os.WriteFile(file, []byte(theirs), 0o600); err != nil {
		t.Fatal(err)
	}
	want, err := spiffebundle.Parse(td, []byte(theirs))
	if err != nil {
		t.Fatal(err)
	}
	contains(t, d.cli(t, "bundle", "set", "-id", "spiffe://other.example", "-format", "spiffe", "-path", file), "bundle set")
	contains(t, d.cli(t, "bundle", "count"), "2 bundles")
	got, err := spiffebundle.Parse(td, []byte(d.cli(t, "bundle", "list", "-id", "spiffe://other.example", "-format", "spiffe")))
	if err != nil {
		t.Fatal(err)
	}
	if !got.X509Bundle().Equal(want.X509Bundle()) || !got.JWTBundle().Equal(want.JWTBundle()) {
		t.Error("the federated bundle came back changed")
	}

	d.cli(t, "entry", "create", "-spiffeID", "spiffe://peers.example/agent/f", "-parentID", "spiffe://peers.example/spire/server",
		"-selector", "unix:uid:0", "-federatesWith", "spiffe://other.example", "-entryID", "f")
	contains(t, d.cliFails(t, "bundle", "delete", "-id", "spiffe://other.example"), "federated")
	contains(t, d.cli(t, "bundle", "delete", "-id", "spiffe://other.example", "-mode", "dissociate"), "bundle deleted")
	if strings.Contains(d.cli(t, "entry", "show", "-entryID", "f"), "other.example") {
		t.Error("the entry still federates with the deleted bundle's trust domain")
	}
	contains(t, d.cli(t, "bundle", "count"), "1 bundle")
}

func TestSpireServerMintCommands(t *testing.T) {
	d := start(t, "peers.example", "")
	td := spiffeid.RequireTrustDomainFromString("peers.example")
	bundle, err := spiffebundle.Parse(td, []byte(d.cli(t, "bundle", "show", "-format", "spiffe")))
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	d.cli(t, "x509", "mint", "-spiffeID", "spiffe://peers.example/minted", "-dns", "minted.example", "-ttl", "5m", "-write", dir)
	raw, err := os.ReadFile(filepath.Join(dir, "svid.pem"))
	if err != nil {
		t.Fatal(err)
	}
	var chain []*x509.Certificate
	for block, rest := pem.Decode(raw); block != nil; block, rest = pem.Decode(rest) {
		c, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			t.Fatal(err)
		}
		chain = append(chain, c)
	}
	id, _, err := x509svid.Verify(chain, bundle)
	if err != nil || id.String() != "spiffe://peers.example/minted" {
		t.Fatalf("got %s, %v, want spiffe://peers.example/minted", id, err)
	}
	if got := chain[0].DNSNames; len(got) != 1 || got[0] != "minted.example" {
		t.Errorf("got DNS names %v, want minted.example", got)
	}
	token := strings.TrimSpace(d.cli(t, "jwt", "mint", "-spiffeID", "spiffe://peers.example/minted", "-audience", "a"))
	svid, err := jwtsvid.ParseAndValidate(token, jwtbundle.NewSet(bundle.JWTBundle()), []string{"a"})
	if err != nil || svid.ID.String() != "spiffe://peers.example/minted" {
		t.Fatalf("got %v, %v, want spiffe://peers.example/minted", svid, err)
	}
	d.cliFails(t, "x509", "mint", "-spiffeID", "spiffe://other.example/minted")
	d.cliFails(t, "jwt", "mint", "-spiffeID", "spiffe://other.example/minted", "-audience", "a")
}

func TestSpireServerLoggerCommands(t *testing.T) {
	d := start(t, "peers.example", "")
	contains(t, strings.ToLower(d.cli(t, "logger", "set", "-level", "debug")), "debug")
	contains(t, strings.ToLower(d.cli(t, "logger", "get")), "debug")
	contains(t, strings.ToLower(d.cli(t, "logger", "reset")), "info")
}

func TestSpireServerCommandsOfOtherServicesSaySo(t *testing.T) {
	d := start(t, "peers.example", "")
	contains(t, d.cliFails(t, "agent", "list"), "Unimplemented")
}
