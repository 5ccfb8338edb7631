package peers

import (
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/spiffe/go-spiffe/v2/bundle/jwtbundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/deputy-id/deputy/test/need"
	"github.com/deputy-id/deputy/test/page"
	"github.com/deputy-id/deputy/test/process"
	"github.com/deputy-id/deputy/test/scratch"
)

var spiffeHelper = sync.OnceValues(func() (string, error) {
	const module = "github.com/spiffe/spiffe-helper"
	return buildAlone("spiffe-helper", "spiffe-helper", module, module+"/cmd/spiffe-helper")
})

// identity reads the files that the page names, and wants them to fit together.
func identity(dir string) (*x509.Certificate, error) {
	pair, err := tls.LoadX509KeyPair(filepath.Join(dir, "svid.pem"), filepath.Join(dir, "svid.key"))
	if err != nil {
		return nil, err
	}
	bundle, err := os.ReadFile(filepath.Join(dir, "bundle.pem"))
	if err != nil {
		return nil, err
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(bundle)
	if _, err := pair.Leaf.Verify(x509.VerifyOptions{Roots: roots}); err != nil {
		return nil, err
	}
	if got, want := fmt.Sprint(pair.Leaf.URIs), "[spiffe://example.org/agent/app]"; got != want {
		return nil, fmt.Errorf("got a certificate of %s, want %s", got, want)
	}
	return pair.Leaf, nil
}

// The page's helper.conf: files with their modes, renewed, and a signal to the
// program each time.
func TestSPIFFEHelperOfThePage(t *testing.T) {
	t.Parallel()
	need.Root(t, "the page's lines, which use sudo")
	binary := built(t, spiffeHelper)
	confs, lines := meshBlocks(t, "spiffe-helper", "hcl"), meshBlocks(t, "spiffe-helper", "sh")
	if len(confs) != 1 || len(lines) != 1 {
		t.Fatalf("got %d configurations and %d command lines on the page, want one each", len(confs), len(lines))
	}
	// Five seconds for what has no TTL of its own.
	d := start(t, "example.org", "\nauthority \"local\" { ca_ttl = \"30s\" }\n")
	d.place(t, "spiffe-helper", binary)
	user, err := strconv.Atoi(strings.TrimSpace(run(t, "id", "-u", "proxy"))) // every Debian has it
	if err != nil {
		t.Fatal(err)
	}
	dir, pidFile := filepath.Join(d.Dir, "identity"), filepath.Join(d.Dir, "app.pid")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.Chown(dir, user, -1); err != nil {
		t.Fatal(err)
	}
	conf := page.Change(t, confs[0], "/run/deputy/public/workload.sock", d.Workload, "/var/lib/app/identity", dir, "/run/app/app.pid", pidFile)
	file := scratch.Write(t, filepath.Join(d.Dir, "helper.conf"), conf)

	// The program says when it is told to read its files again.
	app := process.Start(t, exec.Command("setpriv", "--reuid="+strconv.Itoa(user), "--clear-groups", "sh", "-c",
		`trap 'echo again' HUP; trap 'exit 0' TERM; echo ready; while :; do sleep 1 & wait $!; done`))
	app.Says(t, "^ready\n")
	scratch.Write(t, pidFile, strconv.Itoa(app.PID()))
	told := func() int { return strings.Count(app.Log(), "again") }

	helper := d.asRoot(t, lines[0], "helper.conf", file)
	var unfit error // it may be writing just now
	defer func() {
		if t.Failed() && unfit != nil {
			t.Log(unfit)
		}
	}()
	serials := map[string]bool{}
	helper.Until(t, "three certificates and as many signals", func() bool {
		var cert *x509.Certificate
		if cert, unfit = identity(dir); unfit == nil {
			serials[cert.SerialNumber.String()] = true
		} else if errors.Is(unfit, fs.ErrNotExist) && told() > 0 {
			t.Fatalf("a signal before the files: %v", unfit)
		}
		return len(serials) >= 3 && told() >= 3
	})

	// The token and the keys follow on their own; they bring no signal.
	token := func() string {
		b, err := os.ReadFile(filepath.Join(dir, "api.jwt"))
		if err != nil && !os.IsNotExist(err) {
			t.Fatal(err)
		}
		return string(b)
	}
	helper.Until(t, "a token", func() bool { return token() != "" })
	first := token()
	got := d.Run(t, "validate", "--audience", "https://api.example.org", first)
	contains(t, got, "spiffe://example.org/agent/app")
	helper.Until(t, "another token", func() bool { now := token(); return now != "" && now != first })
	var sets map[string][]byte // JWKS by trust domain
	text, err := os.ReadFile(filepath.Join(dir, "bundle.json"))
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(text, &sets); err != nil {
		t.Fatal(err)
	}
	if keys, err := jwtbundle.Parse(spiffeid.RequireTrustDomainFromString("example.org"), sets["example.org"]); err != nil || keys.Empty() {
		t.Errorf("got keys %s, %v, want those of example.org", sets["example.org"], err)
	}

	for name, want := range map[string]fs.FileMode{"svid.pem": 0o644, "bundle.pem": 0o644, "svid.key": 0o600} {
		info, err := os.Stat(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		if got := info.Mode(); got != want {
			t.Errorf("%s: got mode %s, want %s", name, got, want)
		}
		if got := info.Sys().(*syscall.Stat_t).Uid; int(got) != user {
			t.Errorf("%s belongs to %d, want %d", name, got, user)
		}
	}
}
