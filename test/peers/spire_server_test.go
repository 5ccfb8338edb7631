package peers

import (
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"fmt"
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

	"github.com/deputy-id/deputy/test/scratch"
	"github.com/deputy-id/deputy/test/wait"
)

// cli runs a command of SPIRE's server against the admin socket of the daemon.
func (d *host) cli(t *testing.T, noun, verb string, args ...string) string {
	t.Helper()
	return run(t, built(t, spireServer), d.words(noun, verb, args)...)
}

// words are a noun with its verb, if it has one, and the socket of the daemon.
func (d *host) words(noun, verb string, args []string) []string {
	words := []string{noun, verb, "-socketPath", d.Admin}
	if verb == "" {
		words = []string{noun, "-socketPath", d.Admin}
	}
	return append(words, args...)
}

func (d *host) cliFails(t *testing.T, noun, verb string, args ...string) string {
	t.Helper()
	return fail(t, built(t, spireServer), d.words(noun, verb, args)...)
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
		{"an ID that is taken", []string{"-entryID", "first", "-spiffeID", "spiffe://peers.example/agent/x", "-parentID", "spiffe://peers.example/spire/server", "-selector", "unix:uid:1"}, "AlreadyExists"},
		{"an unknown federated bundle", []string{"-federatesWith", "spiffe://unknown.example", "-spiffeID", "spiffe://peers.example/agent/x", "-parentID", "spiffe://peers.example/spire/server", "-selector", "unix:uid:1"}, "unable to find federated bundle"},
		{"a reserved ID", []string{"-spiffeID", "spiffe://peers.example/spire/x", "-parentID", "spiffe://peers.example/spire/server", "-selector", "unix:uid:1"}, "InvalidArgument"},
		{"a misspelt selector", []string{"-spiffeID", "spiffe://peers.example/agent/x", "-parentID", "spiffe://peers.example/spire/server", "-selector", "unix:uidd:1"}, "unix has no"},
		{"too short a life", []string{"-x509SVIDTTL", "3", "-spiffeID", "spiffe://peers.example/agent/x", "-parentID", "spiffe://peers.example/spire/server", "-selector", "unix:uid:1"}, "shorter than 5s"},
		{"a bad DNS name", []string{"-dns", "-x", "-spiffeID", "spiffe://peers.example/agent/x", "-parentID", "spiffe://peers.example/spire/server", "-selector", "unix:uid:1"}, "InvalidArgument"},
		{"storeSVID", []string{"-storeSVID", "-spiffeID", "spiffe://peers.example/agent/x", "-parentID", "spiffe://peers.example/spire/server", "-selector", "unix:uid:1"}, "store"},
	} {
		t.Run("create refuses "+c.name, func(t *testing.T) { contains(t, d.cliFails(t, "entry", "create", c.args...), c.want) })
	}

	for _, c := range []struct {
		name string
		args []string
		want string
	}{
		{"no such entry", []string{"-entryID", "none", "-spiffeID", "spiffe://peers.example/agent/x", "-parentID", "spiffe://peers.example/spire/server", "-selector", "unix:uid:1"}, "NotFound"},
		{"one that would be another's twin", []string{"-entryID", "first", "-spiffeID", "spiffe://peers.example/agent/b", "-parentID", "spiffe://peers.example/spire/server", "-selector", "unix:uid:1000"}, "AlreadyExists"},
	} {
		t.Run("update refuses "+c.name, func(t *testing.T) { contains(t, d.cliFails(t, "entry", "update", c.args...), c.want) })
	}
	for _, c := range []struct {
		name string
		args []string
		want string
	}{
		{"no such entry", []string{"-entryID", "none"}, "NotFound"},
		{"an ID without a path", []string{"-spiffeID", "spiffe://peers.example"}, "no path"},
		{"an ID of another trust domain", []string{"-spiffeID", "spiffe://other.example/x"}, "not a member"},
	} {
		t.Run("show refuses "+c.name, func(t *testing.T) { contains(t, d.cliFails(t, "entry", "show", c.args...), c.want) })
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

// Many at once, from a file: each has a status of its own.
func TestSpireServerEntryFiles(t *testing.T) {
	d := start(t, "peers.example", "")
	file := filepath.Join(t.TempDir(), "entries.json")
	write := func(text string) {
		t.Helper()
		scratch.Write(t, file, text)
	}
	const one = `{"entry_id": "%s", "spiffe_id": "spiffe://peers.example/agent/%[1]s", "parent_id": "spiffe://peers.example/spire/server", "selectors": [{"type": "unix", "value": "uid:%d"}], "hint": "%s"}`
	many := func(hint string) string {
		return `{"entries": [` + fmt.Sprintf(one, "a", 1, hint) + "," + fmt.Sprintf(one, "b", 2, hint) + "]}"
	}
	write(many("x"))
	contains(t, d.cli(t, "entry", "create", "-data", file), "agent/a", "agent/b")
	contains(t, d.cliFails(t, "entry", "create", "-data", file), "AlreadyExists")
	write(many("y"))
	contains(t, d.cli(t, "entry", "update", "-data", file), "agent/a", "agent/b")
	contains(t, d.cli(t, "entry", "show", "-hint", "y"), "Found 2 entries")
	write(`{"ids": ["a", "none"]}`)
	contains(t, d.cliFails(t, "entry", "delete", "-file", file), "none", "NotFound")
	contains(t, d.cli(t, "entry", "count"), "1 registration entry")
}

// An entry of ours whose path is a template does not upset SPIRE's tools.
func TestSpireServerShowsTemplates(t *testing.T) {
	d := start(t, "peers.example", "")
	d.Run(t, "entry", "create", "/user/{{unix.user}}", "--selector", "unix:uid:1", "--instance", "--audience", "a")
	contains(t, d.cli(t, "entry", "show"), "Found 1 entry", "/user/{{unix.user}}")
}

func TestSpireServerEntryExpires(t *testing.T) {
	d := start(t, "peers.example", "")
	at := time.Now().Add(3 * time.Second)
	d.cli(t, "entry", "create", "-spiffeID", "spiffe://peers.example/agent/short", "-parentID", "spiffe://peers.example/spire/server",
		"-selector", "unix:uid:0", "-entryExpiry", strconv.FormatInt(at.Unix(), 10))
	contains(t, d.Run(t, "fetch", "x509"), "spiffe://peers.example/agent/short")
	wait.Until(t, "the end of the entry", func() bool { return strings.Contains(d.cli(t, "entry", "count"), "0 registration entries") })
	contains(t, fail(t, d.Binary, "fetch", "x509", "--socket", d.Workload), "no identity")
}

func TestSpireServerBundleCommands(t *testing.T) {
	d, other := start(t, "peers.example", ""), start(t, "other.example", "")
	td := spiffeid.RequireTrustDomainFromString("other.example")

	contains(t, d.cli(t, "bundle", "show"), "BEGIN CERTIFICATE")
	theirs := other.cli(t, "bundle", "show", "-format", "spiffe")
	file := scratch.Write(t, filepath.Join(t.TempDir(), "bundle.json"), theirs)
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
	d.cli(t, "entry", "create", "-spiffeID", "spiffe://peers.example/agent/g", "-parentID", "spiffe://peers.example/spire/server", "-selector", "unix:uid:0")
	for _, how := range []string{"exact", "any", "superset", "subset"} {
		contains(t, d.cli(t, "entry", "show", "-federatesWith", "spiffe://other.example", "-matchFederatesWithOn", how), "Found 1 entry")
		contains(t, d.cli(t, "entry", "count", "-federatesWith", "spiffe://third.example", "-matchFederatesWithOn", how), "0 registration entries")
	}
	contains(t, d.cliFails(t, "bundle", "set", "-id", "spiffe://peers.example", "-format", "spiffe", "-path", file), "own trust domain")
	contains(t, d.cliFails(t, "bundle", "list", "-id", "spiffe://third.example"), "NotFound")
	contains(t, d.cliFails(t, "bundle", "delete", "-id", "spiffe://third.example"), "not found")
	contains(t, d.cliFails(t, "bundle", "delete", "-id", "spiffe://other.example"), "federated")
	contains(t, d.cli(t, "bundle", "delete", "-id", "spiffe://other.example", "-mode", "dissociate"), "bundle deleted")
	if strings.Contains(d.cli(t, "entry", "show", "-entryID", "f"), "other.example") {
		t.Error("the entry still federates with the deleted bundle's trust domain")
	}
	contains(t, d.cli(t, "bundle", "count"), "1 bundle")

	// PEM, and the mode that takes the entries along.
	pem := scratch.Write(t, filepath.Join(t.TempDir(), "bundle.pem"), other.cli(t, "bundle", "show"))
	d.cli(t, "bundle", "set", "-id", "spiffe://other.example", "-path", pem)
	d.cli(t, "entry", "update", "-spiffeID", "spiffe://peers.example/agent/f", "-parentID", "spiffe://peers.example/spire/server",
		"-selector", "unix:uid:0", "-federatesWith", "spiffe://other.example", "-entryID", "f")
	contains(t, d.cli(t, "bundle", "delete", "-id", "spiffe://other.example", "-mode", "delete"), "bundle deleted")
	contains(t, d.cli(t, "entry", "count"), "1 registration entry")
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
	contains(t, d.cli(t, "x509", "mint", "-spiffeID", "spiffe://peers.example/minted", "-ttl", "100h"), "capped shorter")
	contains(t, d.cli(t, "jwt", "mint", "-spiffeID", "spiffe://peers.example/minted", "-audience", "a", "-ttl", "100h"), "capped shorter")
	for _, id := range []string{"spiffe://other.example/minted", "spiffe://peers.example", "spiffe://peers.example/spire/minted"} {
		contains(t, d.cliFails(t, "x509", "mint", "-spiffeID", id), "InvalidArgument")
		contains(t, d.cliFails(t, "jwt", "mint", "-spiffeID", id, "-audience", "a"), "InvalidArgument")
	}
}

func TestSpireServerLoggerCommands(t *testing.T) {
	d := start(t, "peers.example", "")
	contains(t, strings.ToLower(d.cli(t, "logger", "set", "-level", "debug")), "debug")
	contains(t, strings.ToLower(d.cli(t, "logger", "get")), "debug")
	contains(t, strings.ToLower(d.cli(t, "logger", "reset")), "info")
}

func TestSpireServerHealthcheck(t *testing.T) {
	d := start(t, "peers.example", "")
	contains(t, d.cli(t, "healthcheck", ""), "healthy")
}

func TestSpireServerCommandsOfOtherServicesSaySo(t *testing.T) {
	d := start(t, "peers.example", "")
	for _, c := range [][2]string{{"agent", "list"}, {"agent", "count"}, {"token", "generate"}} {
		contains(t, d.cliFails(t, c[0], c[1]), "Unimplemented")
	}
}
