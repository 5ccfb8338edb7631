// Package mesh runs Envoy as docs/mesh.md says that it is run in earnest: as a
// unit of a real systemd, and in a container. What it does with its
// certificates is tested in test/peers.
package mesh

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"testing/fstest"
	"time"

	"github.com/deputy-id/deputy/test/binary"
	"github.com/deputy-id/deputy/test/engine"
	"github.com/deputy-id/deputy/test/systemd"
)

func TestMain(m *testing.M) {
	code := engine.Main(m)
	binary.Remove()
	os.Exit(code)
}

// block returns the block of the page whose first line is this comment.
func block(t *testing.T, title string) string {
	t.Helper()
	text, err := os.ReadFile("../../docs/mesh.md")
	if err != nil {
		t.Fatal(err)
	}
	_, rest, ok := strings.Cut(string(text), "\n# "+title+"\n")
	block, _, ok2 := strings.Cut(rest, "\n```")
	if !ok || !ok2 {
		t.Fatalf("the page has no block %q", title)
	}
	return block + "\n"
}

// change is strings.NewReplacer that wants every old text to be there.
func change(t *testing.T, text string, oldnew ...string) string {
	t.Helper()
	for i := 0; i < len(oldnew); i += 2 {
		if !strings.Contains(text, oldnew[i]) {
			t.Fatalf("no %q in:\n%s", oldnew[i], text)
		}
	}
	return strings.NewReplacer(oldnew...).Replace(text)
}

// place makes a directory that everybody may enter, with these files.
func place(t *testing.T, files map[string]string) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "mesh") // short: sockets may come to stand in it
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	for name, text := range files {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// envoy puts Envoy into a directory in which every user finds it.
func envoy(t *testing.T, dir string) {
	t.Helper()
	out, err := exec.Command("../envoy").Output()
	if err != nil {
		t.Fatalf("get Envoy: %v", err)
	}
	from, err := os.Open(strings.TrimSpace(string(out)))
	if err != nil {
		t.Fatal(err)
	}
	defer from.Close()
	to, err := os.OpenFile(filepath.Join(dir, "envoy"), os.O_WRONLY|os.O_CREATE, 0o755)
	if err != nil {
		t.Fatal(err)
	}
	defer to.Close()
	if _, err := io.Copy(to, from); err != nil {
		t.Fatal(err)
	}
}

func needRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() == 0 {
		return
	}
	if os.Getenv("CI") != "" {
		t.Fatal("not root")
	}
	t.Skip("LOUD: Envoy was not tested as a unit or in a container: not root")
}

func eventually(t *testing.T, what string, check func() error) {
	t.Helper()
	for end := time.Now().Add(30 * time.Second); ; <-time.After(50 * time.Millisecond) { // other programs' starts
		err := check()
		if err == nil {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("%s: %v", what, err)
		}
	}
}

// service says whom Envoy names as the caller.
const service = `
from http.server import BaseHTTPRequestHandler, HTTPServer

class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(self.headers.get("x-forwarded-client-cert", "nobody").encode())

HTTPServer(("127.0.0.1", 8080), Handler).serve_forever()
`

// Both Envoys are units, by the page's; so is the daemon, by the sample.
func TestEnvoyAsUnit(t *testing.T) {
	needRoot(t)
	web := block(t, "in /etc/deputy/deputy.hcl")
	_, entry, _ := strings.Cut(web, "\n\n")
	dir := place(t, map[string]string{
		"deputy.hcl": "trust_domain = \"example.org\"\n" + web + change(t, entry, "web", "shop"),
		"web.yaml":   block(t, "/etc/envoy/web.yaml"),
		// The node has no name server.
		"shop.yaml":  change(t, block(t, "/etc/envoy/shop.yaml"), "address: web.example.org", "address: 127.0.0.1"),
		"service.py": service,
	})
	envoy(t, dir)
	sample, err := os.ReadFile("../../conf/samples/deputy.service")
	if err != nil {
		t.Fatal(err)
	}
	const header, bare = "[Unit]\n", "[Unit]\nDefaultDependencies=no\n"
	unit := change(t, block(t, "/etc/systemd/system/web-envoy.service"), header, bare, "User=envoy", "User=nobody",
		"/usr/local/bin/envoy", dir+"/envoy", "/etc/envoy", dir, "[Service]\n", "[Service]\nStandardError=append:"+dir+"/log\n")
	file := func(text string) *fstest.MapFile { return &fstest.MapFile{Data: []byte(text)} }
	node := systemd.Start(t, fstest.MapFS{
		"deputy.service": file(change(t, string(sample), "/usr/local/bin/deputy", binary.Deputy(t), "/etc/deputy", dir,
			"PrivateTmp=yes", "PrivateTmp=no", header, bare, "[Service]\n", "[Service]\nStandardError=append:"+dir+"/log\n")),
		"web.service":        file(bare + "[Service]\nExecStart=/usr/bin/python3 " + dir + "/service.py\nUser=nobody\n"),
		"web-envoy.service":  file(unit),
		"shop-envoy.service": file(change(t, unit, "web", "shop")),
	})
	t.Cleanup(func() {
		if log, err := os.ReadFile(filepath.Join(dir, "log")); err == nil && t.Failed() {
			t.Logf("log of the units:\n%s", log)
		}
	})
	for _, unit := range []string{"deputy", "web", "web-envoy", "shop-envoy"} {
		if out, err := node.Command("systemctl", "start", unit).CombinedOutput(); err != nil {
			t.Fatalf("start %s: %v\n%s", unit, err, out)
		}
	}
	const caller = "By=spiffe://example.org/mesh/web;"
	eventually(t, "call through both", func() error {
		out, err := node.Command("/usr/bin/python3", "-c",
			`from urllib.request import urlopen; print(urlopen("http://127.0.0.1:8081/").read().decode())`).CombinedOutput()
		if err == nil && (!strings.HasPrefix(string(out), caller) || !strings.HasSuffix(string(out), ";URI=spiffe://example.org/mesh/shop\n")) {
			t.Fatalf("got %q", out)
		}
		if err != nil {
			return fmt.Errorf("%w: %s", err, out)
		}
		return nil
	})
	out, err := node.Command("sh", "-ec", block(t, "what Envoy holds")).CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	for _, want := range []string{`"uri": "spiffe://example.org/mesh/web"`, `"name": "default"`, `"name": "ROOTCA"`, "sds.default.update_rejected: 0", "ssl.handshake: "} {
		if !strings.Contains(string(out), want) {
			t.Errorf("got %s\nwant %q in it", out, want)
		}
	}
}

// The page's command runs a container by its name; another of the same image is
// nobody.
func TestEnvoyInContainer(t *testing.T) {
	needRoot(t)
	e := engine.Start(t)
	image := publish(t, e)
	dir := place(t, nil)
	repository, _, _ := strings.Cut(image, ":v")
	if err := os.WriteFile(filepath.Join(dir, "deputy.hcl"), []byte(fmt.Sprintf(
		"trust_domain = \"example.org\"\ndata_dir = \"%[1]s/data\"\nworkload_socket { path = \"%[1]s/public/workload.sock\" }\nadmin_socket { path = \"%[1]s/private/admin.sock\" }\n", dir)+
		change(t, block(t, "for the container"), "/run/docker.sock", e.Socket(), "docker.io/envoyproxy/envoy", repository)), 0o600); err != nil {
		t.Fatal(err)
	}
	deputy(t, dir)

	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	port := l.Addr().(*net.TCPAddr).Port
	l.Close()
	etc := place(t, map[string]string{"web.yaml": change(t, block(t, "/etc/envoy/web.yaml"),
		"address: 0.0.0.0, port_value: 8443", fmt.Sprint("address: 127.0.0.1, port_value: ", port))})
	words := strings.Fields(change(t, block(t, "a container that is an Envoy"), "\\\n", " ",
		"/run/deputy/public:/", dir+"/public:/", "/etc/envoy:/", etc+":/", "envoyproxy/envoy:v1.40.0", image))
	start := func(name string) (pid string) {
		var args []string
		for _, w := range words[1:] { // after docker
			if w == "web-envoy" {
				w = name
			}
			args = append(args, w)
		}
		e.Docker(t, args...)
		t.Cleanup(func() {
			if t.Failed() {
				t.Logf("log of %s:\n%s", name, e.Docker(t, "logs", name))
			}
			e.Docker(t, "rm", "--force", name)
		})
		return e.Docker(t, "inspect", "--format", "{{.State.Pid}}", name)
	}
	web, other := start("web-envoy"), start("other-envoy")
	eventually(t, "its certificate", func() error {
		ids, err := certificates(web)
		if err == nil && (len(ids) != 1 || ids[0] != "spiffe://example.org/mesh/web") {
			err = fmt.Errorf("got %q", ids)
		}
		return err
	})
	eventually(t, "its refusal", func() error {
		text, err := ask(other, "/stats?filter=sds.default.update_failure")
		if err == nil && strings.HasSuffix(strings.TrimSpace(text), ": 0") {
			err = errors.New("no stream of its has ended yet")
		}
		return err
	})
	if ids, err := certificates(other); err != nil || len(ids) != 0 {
		t.Errorf("got %q, %v for another container of the image, want none", ids, err)
	}
}

// publish makes an image of Envoy and the libraries that it needs, and returns
// its name at a registry.
func publish(t *testing.T, e *engine.Engine) string {
	t.Helper()
	dir := place(t, map[string]string{"Dockerfile": "FROM scratch\nCOPY . /\nUSER 101\nENTRYPOINT [\"/envoy\"]\n"})
	envoy(t, dir)
	out, err := exec.Command("ldd", filepath.Join(dir, "envoy")).Output()
	if err != nil {
		t.Fatalf("ldd: %v", err)
	}
	for _, word := range strings.Fields(string(out)) {
		if !strings.HasPrefix(word, "/") {
			continue
		}
		text, err := os.ReadFile(word)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.MkdirAll(filepath.Join(dir, filepath.Dir(word)), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, word), text, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	name := e.Registry(t).Address() + "/envoyproxy/envoy:v1.40.0"
	e.Docker(t, "build", "--quiet", "--tag", name, dir)
	e.Docker(t, "push", "--quiet", name)
	return name
}

// deputy runs the daemon with the file in the directory.
func deputy(t *testing.T, dir string) {
	t.Helper()
	cmd := exec.Command(binary.Deputy(t), "run", "--config", filepath.Join(dir, "deputy.hcl"))
	var log bytes.Buffer
	cmd.Stderr = &log
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cmd.Process.Signal(syscall.SIGTERM)
		if err := cmd.Wait(); err != nil {
			t.Errorf("deputy run: %v", err)
		}
		if t.Failed() {
			t.Logf("log of the daemon:\n%s", &log)
		}
	})
	eventually(t, "a healthy daemon", func() error {
		out, err := exec.Command(binary.Deputy(t), "health", "--socket", filepath.Join(dir, "public/workload.sock")).CombinedOutput()
		if err != nil {
			return fmt.Errorf("%w: %s", err, out)
		}
		return nil
	})
}

// ask asks the admin endpoint of the Envoy in a container.
func ask(pid, path string) (string, error) {
	client := http.Client{Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", "/proc/"+pid+"/root/run/envoy-web/admin.sock")
	}}}
	resp, err := client.Get("http://envoy" + path)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	return string(text), err
}

// certificates are the IDs of those that the Envoy in a container has for itself.
func certificates(pid string) (ids []string, err error) {
	text, err := ask(pid, "/certs")
	if err != nil {
		return nil, err
	}
	var certs struct {
		Certificates []struct {
			Chain []struct {
				SANs []struct{ URI string } `json:"subject_alt_names"`
			} `json:"cert_chain"`
		}
	}
	if err := json.Unmarshal([]byte(text), &certs); err != nil {
		return nil, err
	}
	for _, c := range certs.Certificates {
		for _, one := range c.Chain {
			for _, san := range one.SANs {
				ids = append(ids, san.URI)
			}
		}
	}
	return ids, nil
}
