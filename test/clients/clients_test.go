// Package clients runs small programs in Python, Java and Rust, over the client
// of the Workload API that each language's registry has, against the daemon. It
// is a module of its own and a task of its own (make test-clients), for it needs
// the languages' tools.
//
// Each program finds the socket by SPIFFE_ENDPOINT_SOCKET. "fetch" asks for
// everything once, "watch" leaves the rest to what the client has for long-lived
// use. They print a line for each thing that they got, all binary in base64:
//
//	x509 SPIFFE-ID CERTIFICATE...            the chain, of each SVID
//	x509-bundle TRUST-DOMAIN CERTIFICATE...
//	updated                                  the end of one X.509 context
//	jwt SPIFFE-ID TOKEN                      for the audiences tool and second
//	valid SPIFFE-ID                          the token's, as the daemon validated it
//	jwt-bundle TRUST-DOMAIN KEY-ID...
//	error STEP REASON                        as the client worded it
//	watching, done
package clients

import (
	"bufio"
	"bytes"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/deputy-id/deputy/test/binary"
	"github.com/deputy-id/deputy/test/daemon"
	"github.com/deputy-id/deputy/test/page"
	"github.com/deputy-id/deputy/test/process"
	"github.com/deputy-id/deputy/test/scratch"
)

// cached is the path of what is made once for this machine: where the tests of
// test/peers, too, keep such things.
func cached(name string) string {
	cache, err := os.UserCacheDir()
	if err != nil {
		cache = os.TempDir()
	}
	return filepath.Join(cache, "deputy-peers", name)
}

// build makes something in a directory of the cache that is named after the
// content of files, unless it is there.
func build(name string, files []string, make func(dir string) error) (string, error) {
	sum := sha256.New()
	for _, file := range files {
		content, err := os.ReadFile(file)
		if err != nil {
			return "", err
		}
		fmt.Fprintf(sum, "%s %d\n%s", file, len(content), content)
	}
	dir := cached(fmt.Sprintf("clients-%s-%x", name, sum.Sum(nil)[:6]))
	done := filepath.Join(dir, "done")
	if _, err := os.Stat(done); err == nil {
		return dir, nil
	}
	fmt.Fprintf(os.Stderr, "building %s (once)\n", filepath.Base(dir))
	if err := os.RemoveAll(dir); err != nil {
		return "", err
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return "", err
	}
	if err := make(dir); err != nil {
		return "", fmt.Errorf("build the client in %s: %w", name, err)
	}
	return dir, os.WriteFile(done, nil, 0o644)
}

func do(dir, name string, args ...string) error {
	cmd := exec.Command(name, args...)
	cmd.Dir = dir
	_, err := process.Try(cmd)
	return err
}

func TestPython(t *testing.T) {
	t.Parallel()
	dir, err := build("python", []string{"python/requirements.txt"}, func(dir string) error {
		if err := do(".", "python3", "-m", "venv", dir); err != nil {
			return err
		}
		return do(".", filepath.Join(dir, "bin/python"), "-m", "pip", "install", "-q", "-r", "python/requirements.txt")
	})
	if err != nil {
		t.Fatal(err)
	}
	exercise(t, filepath.Join(dir, "bin/python"), "python/client.py")
}

func TestJava(t *testing.T) {
	t.Parallel()
	dir, err := build("java", []string{"java/pom.xml", "java/src/main/java/Client.java", "java/src/main/java/Agent.java"}, func(dir string) error {
		return do("java", "mvn", "-q", "-B", "compile", "-Dout="+dir)
	})
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "classes") + ":" + filepath.Join(dir, "lib/*")
	exercise(t, "java", "-cp", path, "Client")
	ofThePage(t, "java", "java/src/main/java/Agent.java", "java", "-cp", path, "Agent")
}

// The crate needs a newer compiler than Debian 12 has. Without one this fails:
// whoever runs this task wants to know.
func TestRust(t *testing.T) {
	t.Parallel()
	var major, minor int
	out, err := exec.Command("rustc", "--version").Output()
	if err != nil {
		t.Fatalf("rustc --version: %v: the client in Rust needs rustc 1.88 and cargo, which Debian 12 does not have (rustup has)", err)
	}
	if _, err := fmt.Sscanf(string(out), "rustc %d.%d", &major, &minor); err != nil {
		t.Fatalf("rustc says %q: %v", out, err)
	}
	if major == 1 && minor < 88 {
		t.Fatalf("%s is too old: the client in Rust needs 1.88, which Debian 12 does not have (rustup has)", bytes.TrimSpace(out))
	}
	// cargo itself knows what is to be built again.
	target := cached("clients-rust")
	if err := do("rust", "cargo", "build", "--quiet", "--locked", "--target-dir", target); err != nil {
		t.Fatal(err)
	}
	exercise(t, filepath.Join(target, "debug/client"))
	ofThePage(t, "rust", "rust/src/bin/agent.rs", filepath.Join(target, "debug/agent"))
}

func TestMain(m *testing.M) {
	code := m.Run()
	binary.Remove()
	os.Exit(code)
}

// A program is a client that runs.
type program struct {
	cmd   *exec.Cmd
	lines chan []string // the words of each; closed at the end
	ended error         // once lines is closed
}

// launch runs a client for the length of the test.
func launch(t *testing.T, d *daemon.Daemon, client []string, task string) *program {
	t.Helper()
	p := &program{cmd: exec.Command(client[0], append(client[1:len(client):len(client)], task)...), lines: make(chan []string)}
	p.cmd.Env = d.Env()
	var stderr bytes.Buffer
	p.cmd.Stderr = &stderr
	out, err := p.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		for lines := bufio.NewReader(out); ; {
			line, err := lines.ReadString('\n')
			if err != nil {
				break
			}
			p.lines <- strings.Fields(line)
		}
		io.Copy(io.Discard, out)
		p.ended = p.cmd.Wait()
		close(p.lines)
	}()
	t.Cleanup(func() {
		p.cmd.Process.Kill()
		for range p.lines {
		}
		if t.Failed() {
			t.Logf("errors of the client:\n%s", &stderr)
		}
	})
	return p
}

// next is the next line, and false at the end.
func (p *program) next(t *testing.T) ([]string, bool) {
	t.Helper()
	select {
	case line, ok := <-p.lines:
		return line, ok
	case <-time.After(60 * time.Second):
		t.Fatal("the client says nothing")
		return nil, false
	}
}

// until reads on until a line of a kind, and returns what stood before it.
func (p *program) until(t *testing.T, kind string) [][]string {
	t.Helper()
	var before [][]string
	for {
		line, ok := p.next(t)
		if !ok {
			t.Fatalf("the client ended (%v), want a line %s", p.ended, kind)
		}
		if line[0] == kind {
			return before
		}
		before = append(before, line)
	}
}

// all reads to the end, which has to be a good one.
func (p *program) all(t *testing.T) [][]string {
	t.Helper()
	lines := p.until(t, "done")
	if line, ok := p.next(t); ok || p.ended != nil {
		t.Fatalf("got %q, %v after the client was done", line, p.ended)
	}
	return lines
}

// of picks the lines of a kind, without that word.
func of(lines [][]string, kind string) (found [][]string) {
	for _, line := range lines {
		if line[0] == kind {
			found = append(found, line[1:])
		}
	}
	return found
}

// ttl is the life of the SVIDs that are to be renewed.
const ttl = 10 * time.Second

// renewed reads X.509 contexts until there is one that was issued since then,
// and returns its certificate, which has to be good.
func (p *program) renewed(t *testing.T, since time.Time) *x509.Certificate {
	t.Helper()
	for end := time.Now().Add(60 * time.Second); time.Now().Before(end); {
		lines := p.until(t, "updated")
		svids := of(lines, "x509")
		if len(svids) != 1 || svids[0][0] != id {
			t.Fatalf("got SVIDs %q, want one of %s", svids, id)
		}
		if leaf := verified(t, lines, svids[0][1:]); !leaf.NotAfter.Before(since.Add(ttl)) {
			return leaf
		}
	}
	t.Fatal("the client got no other certificate")
	return nil
}

// verified is the first certificate of a chain that the bundle of clients.example
// among the lines vouches for.
func verified(t *testing.T, lines [][]string, chain []string) *x509.Certificate {
	t.Helper()
	roots, between := x509.NewCertPool(), x509.NewCertPool()
	for _, bundle := range of(lines, "x509-bundle") {
		if bundle[0] == "clients.example" {
			for _, one := range bundle[1:] {
				roots.AddCert(certificate(t, one))
			}
		}
	}
	for _, one := range chain[1:] {
		between.AddCert(certificate(t, one))
	}
	leaf := certificate(t, chain[0])
	if _, err := leaf.Verify(x509.VerifyOptions{Roots: roots, Intermediates: between}); err != nil {
		t.Fatal(err)
	}
	return leaf
}

func certificate(t *testing.T, text string) *x509.Certificate {
	t.Helper()
	der, err := base64.StdEncoding.DecodeString(text)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return cert
}

// part decodes one part of a token.
func part(t *testing.T, token string, n int, into any) {
	t.Helper()
	parts := strings.Split(token, ".")
	if len(parts) != 3 {
		t.Fatalf("got %q, want a token of three parts", token)
	}
	text, err := base64.RawURLEncoding.DecodeString(parts[n])
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(text, into); err != nil {
		t.Fatal(err)
	}
}

// authorities are the certificates of a bundle that the command line prints, as
// the clients print them.
func authorities(t *testing.T, d *daemon.Daemon) (all []string) {
	t.Helper()
	for rest := []byte(d.Run(t, "bundle", "show")); ; {
		var block *pem.Block
		if block, rest = pem.Decode(rest); block == nil {
			return all
		}
		all = append(all, base64.StdEncoding.EncodeToString(block.Bytes))
	}
}

// keys are the IDs of a bundle's JWT keys.
func keys(t *testing.T, bundle string) (ids []string) {
	t.Helper()
	var set struct {
		Keys []struct{ Use, Kid string }
	}
	if err := json.Unmarshal([]byte(bundle), &set); err != nil {
		t.Fatal(err)
	}
	for _, key := range set.Keys {
		if key.Use == "jwt-svid" {
			ids = append(ids, key.Kid)
		}
	}
	return ids
}

// denied reports whether a client's words are those of PermissionDenied. The
// client in Rust has an error of its own for what it means here.
func denied(reason []string) bool {
	text := strings.NewReplacer("_", "", " ", "").Replace(strings.ToLower(strings.Join(reason, " ")))
	return strings.Contains(text, "permissiondenied") || text == "noidentityissued"
}

const id = "spiffe://clients.example/agent"

// exercise is what each client has to manage.
func exercise(t *testing.T, client ...string) {
	own := fmt.Sprintf("unix:uid:%d", os.Getuid())

	t.Run("gets and validates everything", func(t *testing.T) {
		other := daemon.Start(t, "other.example", "")
		d := daemon.Start(t, "clients.example", fmt.Sprintf("entry \"/agent\" {\n  selectors = [%q]\n  federates_with = [\"other.example\"]\n}\n", own))
		theirs := other.Run(t, "bundle", "show", "--format", "spiffe")
		d.Run(t, "bundle", "set", "other.example", "--path", scratch.Write(t, filepath.Join(d.Dir, "other.json"), theirs))

		lines := launch(t, d, client, "fetch").all(t)
		svids := of(lines, "x509")
		if len(svids) != 1 || svids[0][0] != id {
			t.Fatalf("got SVIDs %q, want one of %s", svids, id)
		}
		if got := verified(t, lines, svids[0][1:]).URIs; len(got) != 1 || got[0].String() != id {
			t.Errorf("got a certificate of %v, want %s", got, id)
		}
		// Once with the SVID, and once by themselves.
		wantX509 := map[string][]string{"clients.example": authorities(t, d), "other.example": authorities(t, other)}
		if got := of(lines, "x509-bundle"); len(got) != 4 {
			t.Errorf("got %d X.509 bundles, want two at each of two calls", len(got))
		}
		for _, got := range of(lines, "x509-bundle") {
			if want := wantX509[got[0]]; len(want) == 0 || !slices.Equal(got[1:], want) {
				t.Errorf("X.509 bundle of %s: got %q, want %q", got[0], got[1:], want)
			}
		}
		wantJWT := map[string][]string{"clients.example": keys(t, d.Run(t, "bundle", "show", "--format", "spiffe")), "other.example": keys(t, theirs)}
		if got := of(lines, "jwt-bundle"); len(got) != 2 {
			t.Errorf("got %d JWT bundles, want two", len(got))
		}
		for _, got := range of(lines, "jwt-bundle") {
			if want := wantJWT[got[0]]; len(want) == 0 || !slices.Equal(got[1:], want) {
				t.Errorf("JWT bundle of %s: got keys %q, want %q", got[0], got[1:], want)
			}
		}

		tokens := of(lines, "jwt")
		if len(tokens) != 1 || tokens[0][0] != id {
			t.Fatalf("got tokens %q, want one of %s", tokens, id)
		}
		var header struct{ Kid string }
		part(t, tokens[0][1], 0, &header)
		var claims struct {
			Sub string
			Aud []string
		}
		part(t, tokens[0][1], 1, &claims)
		if slices.Sort(claims.Aud); claims.Sub != id || !slices.Equal(claims.Aud, []string{"second", "tool"}) {
			t.Errorf("got a token of %s for %q, want one of %s for second and tool", claims.Sub, claims.Aud, id)
		}
		if !slices.Contains(wantJWT["clients.example"], header.Kid) {
			t.Errorf("the token's key %s is not in the bundle", header.Kid)
		}
		if got := of(lines, "valid"); len(got) != 1 || got[0][0] != id {
			t.Errorf("got a valid token of %q, want %s", got, id)
		}
		var refused []string
		for _, err := range of(lines, "error") {
			refused = append(refused, err[0])
			if err[0] == "stranger" && !denied(err[1:]) {
				t.Errorf("a token of another ID: got %q, want PermissionDenied", err[1:])
			}
		}
		if want := []string{"audience", "forged", "stranger"}; !slices.Equal(refused, want) {
			t.Errorf("got errors of %q, want %q", refused, want)
		}
	})

	t.Run("is told that it has no identity", func(t *testing.T) {
		d := daemon.Start(t, "clients.example", "")
		lines := launch(t, d, client, "fetch").all(t)
		var refused []string
		for _, line := range lines {
			if line[0] != "error" || !denied(line[2:]) {
				t.Errorf("got %q, want PermissionDenied", line)
			}
			refused = append(refused, line[1])
		}
		if want := []string{"x509", "x509-bundles", "jwt", "stranger", "jwt-bundles"}; !slices.Equal(refused, want) {
			t.Errorf("got errors of %q, want %q", refused, want)
		}
	})

	t.Run("lives through all that happens", func(t *testing.T) {
		d := daemon.Start(t, "clients.example", "")
		p := launch(t, d, client, "watch")
		create := func() string {
			var entry struct{ ID string }
			out := d.Run(t, "entry", "create", "/agent", "--selector", own, "--x509-ttl", ttl.String(), "--output", "json")
			if err := json.Unmarshal([]byte(out), &entry); err != nil || entry.ID == "" {
				t.Fatalf("got %s, %v, want an entry with its ID", out, err)
			}
			return entry.ID
		}
		// It comes before its entry.
		if before := p.until(t, "watching"); len(before) > 0 {
			t.Fatalf("got %q before there was an entry", before)
		}
		asked := fmt.Sprintf("pid=%d ", p.cmd.Process.Pid)
		d.Says(t, asked)
		entry := create()
		first := p.renewed(t, time.Time{})
		if life := time.Until(first.NotAfter); life > ttl {
			t.Fatalf("the SVID lives for %s: nothing would rotate here", life)
		}
		if second := p.renewed(t, first.NotAfter.Add(-ttl/2)); second.SerialNumber.Cmp(first.SerialNumber) == 0 {
			t.Fatal("got the certificate of before")
		}

		// A daemon that stops must not end a stream well: Java's client would take
		// that for the end, and never ask again.
		for _, signal := range []os.Signal{syscall.SIGTERM, syscall.SIGKILL} {
			d.Signal(t, signal)
			if err := d.Wait(t); err != nil && signal != syscall.SIGKILL {
				t.Errorf("deputy run: %v", err)
			}
			since := time.Now()
			d.Start(t)
			p.renewed(t, since)
		}

		// The open stream ends, for it has no identity any more; then it has one again.
		d.Run(t, "entry", "delete", entry)
		var exit *exec.ExitError
		if err := d.Command("fetch", "x509").Run(); !errors.As(err, &exit) || exit.ExitCode() != 3 {
			t.Errorf("deputy fetch: got %v, want status 3", err)
		}
		since := time.Now()
		create()
		p.renewed(t, since)
	})
}

// ofThePage runs the program of docs/mesh.md in a language, which has to be the
// file's.
func ofThePage(t *testing.T, language, file string, agent ...string) {
	t.Run("is what the page shows", func(t *testing.T) {
		source, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		if !slices.Contains(page.Open(t, "../../docs/mesh.md").Blocks(t, language), string(source)) {
			t.Fatalf("the page does not show %s as it is", file)
		}
		d := daemon.Start(t, "clients.example", fmt.Sprintf("entry \"/agent\" { selectors = [\"unix:uid:%d\"] }\n", os.Getuid()))
		if line, _ := launch(t, d, agent, "").next(t); !slices.Equal(line, []string{id}) {
			t.Errorf("got %q, want %s", line, id)
		}
	})
}
