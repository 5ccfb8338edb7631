// Package mesh runs Envoy as docs/mesh.md says that it is run in earnest: as a
// unit of a real systemd, and in a container. What it does with its
// certificates is tested in test/peers.
package mesh

import (
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
	"testing"

	"github.com/deputy-id/deputy/test/binary"
	"github.com/deputy-id/deputy/test/daemon"
	"github.com/deputy-id/deputy/test/engine"
	"github.com/deputy-id/deputy/test/loopback"
	"github.com/deputy-id/deputy/test/need"
	"github.com/deputy-id/deputy/test/page"
	"github.com/deputy-id/deputy/test/process"
	"github.com/deputy-id/deputy/test/scratch"
	"github.com/deputy-id/deputy/test/systemd"
	"github.com/deputy-id/deputy/test/wait"
)

func TestMain(m *testing.M) {
	code := engine.Main(m)
	binary.Remove()
	os.Exit(code)
}

// envoy puts Envoy into a directory in which every user finds it.
func envoy(t *testing.T, dir string) {
	t.Helper()
	out, err := exec.Command("../envoy").Output()
	if err != nil {
		t.Fatalf("get Envoy: %v", err)
	}
	scratch.Program(t, filepath.Join(dir, "envoy"), strings.TrimSpace(string(out)))
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
	need.Root(t, "a systemd")
	mesh := page.Open(t, "../../docs/mesh.md")
	web := mesh.Block(t, "in /etc/deputy/deputy.hcl")
	_, entry, _ := strings.Cut(web, "\n\n")
	dir := scratch.Dir(t)
	scratch.Write(t, filepath.Join(dir, "deputy.hcl"), "trust_domain = \"example.org\"\n"+web+page.Change(t, entry, "web", "shop"))
	scratch.Write(t, filepath.Join(dir, "web.yaml"), mesh.Block(t, "/etc/envoy/web.yaml"))
	// The node has no name server.
	scratch.Write(t, filepath.Join(dir, "shop.yaml"), page.Change(t, mesh.Block(t, "/etc/envoy/shop.yaml"), "address: web.example.org", "address: 127.0.0.1"))
	script := scratch.Write(t, filepath.Join(dir, "service.py"), service)
	envoy(t, dir)
	sample, err := os.ReadFile("../../conf/samples/deputy.service")
	if err != nil {
		t.Fatal(err)
	}
	logged := "[Service]\nStandardError=append:" + systemd.Log(t) + "\n"
	unit := page.Change(t, mesh.Block(t, "/etc/systemd/system/web-envoy.service"), "User=envoy", "User=nobody",
		"/usr/local/bin/envoy", dir+"/envoy", "/etc/envoy", dir, "[Service]\n", logged)
	node := systemd.Start(t, systemd.Units{
		"deputy.service": page.Change(t, string(sample), "/usr/local/bin/deputy", binary.Deputy(t), "/etc/deputy", dir,
			"PrivateTmp=yes", "PrivateTmp=no", "[Service]\n", logged),
		"web.service":        "[Service]\nExecStart=/usr/bin/python3 " + script + "\nUser=nobody\n",
		"web-envoy.service":  unit,
		"shop-envoy.service": page.Change(t, unit, "web", "shop"),
	})
	for _, unit := range []string{"deputy", "web", "web-envoy", "shop-envoy"} {
		node.Run(t, "systemctl", "start", unit)
	}
	const caller = "By=spiffe://example.org/mesh/web;"
	wait.UntilNil(t, func() error {
		out, err := process.Try(node.Command("/usr/bin/python3", "-c",
			`from urllib.request import urlopen; print(urlopen("http://127.0.0.1:8081/").read().decode())`))
		if err == nil && (!strings.HasPrefix(out, caller) || !strings.HasSuffix(out, ";URI=spiffe://example.org/mesh/shop\n")) {
			t.Fatalf("got %q", out)
		}
		return err
	})
	out := node.Run(t, "sh", "-ec", mesh.Block(t, "what Envoy holds"))
	for _, want := range []string{`"uri": "spiffe://example.org/mesh/web"`, `"name": "default"`, `"name": "ROOTCA"`, "sds.default.update_rejected: 0", "ssl.handshake: "} {
		if !strings.Contains(out, want) {
			t.Errorf("got %s\nwant %q in it", out, want)
		}
	}
}

// The page's command runs a container by its name; another of the same image is
// nobody.
func TestEnvoyInContainer(t *testing.T) {
	need.Root(t, "a container")
	mesh := page.Open(t, "../../docs/mesh.md")
	e := engine.Start(t)
	image := publish(t, e)
	repository, _, _ := strings.Cut(image, ":v")
	d := daemon.Start(t, "example.org", page.Change(t, mesh.Block(t, "for the container"), "/run/docker.sock", e.Socket(), "docker.io/envoyproxy/envoy", repository))
	etc := scratch.Dir(t)
	scratch.Write(t, filepath.Join(etc, "web.yaml"), page.Change(t, mesh.Block(t, "/etc/envoy/web.yaml"),
		"address: 0.0.0.0, port_value: 8443", fmt.Sprint("address: 127.0.0.1, port_value: ", loopback.Port(t))))
	words := strings.Fields(page.Change(t, mesh.Block(t, "a container that is an Envoy"), "\\\n", " ",
		"/run/deputy/public:/", d.Dir+"/public:/", "/etc/envoy:/", etc+":/", "envoyproxy/envoy:v1.40.0", image))
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
	wait.UntilNil(t, func() error {
		ids, err := certificates(web)
		if err == nil && (len(ids) != 1 || ids[0] != "spiffe://example.org/mesh/web") {
			err = fmt.Errorf("got %q", ids)
		}
		return err
	})
	wait.UntilNil(t, func() error {
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
	dir := scratch.Dir(t)
	scratch.Write(t, filepath.Join(dir, "Dockerfile"), "FROM scratch\nCOPY . /\nUSER 101\nENTRYPOINT [\"/envoy\"]\n")
	envoy(t, dir)
	out, err := exec.Command("ldd", filepath.Join(dir, "envoy")).Output()
	if err != nil {
		t.Fatalf("ldd: %v", err)
	}
	for _, word := range strings.Fields(string(out)) {
		if strings.HasPrefix(word, "/") {
			scratch.Program(t, filepath.Join(dir, word), word)
		}
	}
	name := e.Registry(t).Address() + "/envoyproxy/envoy:v1.40.0"
	e.Docker(t, "build", "--quiet", "--tag", name, dir)
	e.Docker(t, "push", "--quiet", name)
	return name
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
