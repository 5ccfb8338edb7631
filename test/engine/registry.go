package engine

import (
	"bufio"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/deputy-id/deputy/test/loopback"
)

// A Registry is a running image registry on loopback.
type Registry struct {
	address string
	server  *process
}

// Registry returns the registry beside the engine and starts it at the first call.
func (e *Engine) Registry(tb testing.TB) *Registry {
	tb.Helper()
	r, err := e.OpenRegistry()
	if err != nil {
		tb.Fatalf("start registry: %v", err)
	}
	return r
}

// Address is the registry's host and port, with which image names begin.
func (r *Registry) Address() string { return r.address }

// Digest asks the registry itself for the digest of a manifest.
func (r *Registry) Digest(tb testing.TB, repository, tag string) string {
	tb.Helper()
	req, err := http.NewRequest(http.MethodHead, fmt.Sprintf("http://%s/v2/%s/manifests/%s", r.address, repository, tag), nil)
	if err != nil {
		tb.Fatal(err)
	}
	req.Header.Set("Accept", "application/vnd.docker.distribution.manifest.v2+json, application/vnd.oci.image.manifest.v1+json")
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		tb.Fatal(err)
	}
	resp.Body.Close()
	digest := resp.Header.Get("Docker-Content-Digest")
	if resp.StatusCode != http.StatusOK || digest == "" {
		tb.Fatalf("registry answers %s for %s:%s", resp.Status, repository, tag)
	}
	return digest
}

// Publish makes an image, pushes it to the registry as repository:tag, and
// returns its name there and the digest of its manifest.
func (e *Engine) Publish(tb testing.TB, repository, tag string, im Image) (name, digest string) {
	tb.Helper()
	r := e.Registry(tb)
	im.Name = r.address + "/" + repository + ":" + tag
	e.Image(tb, im)
	e.Docker(tb, "push", "--quiet", im.Name)
	return im.Name, r.Digest(tb, repository, tag)
}

// Forget removes the images of these names, so that they have to be pulled.
func (e *Engine) Forget(tb testing.TB, names ...string) {
	tb.Helper()
	e.Docker(tb, append([]string{"image", "rm", "--force"}, names...)...)
}

func startRegistry(dir string) (*Registry, error) {
	if err := need("docker-registry"); err != nil {
		return nil, err
	}
	path, err := find("docker-registry")
	if err != nil {
		return nil, err
	}
	port, err := loopback.Find()
	if err != nil {
		return nil, err
	}
	r := &Registry{address: fmt.Sprint("127.0.0.1:", port)}
	config := fmt.Sprintf("version: 0.1\nlog: {level: warn}\nstorage: {filesystem: {rootdirectory: %q}}\nhttp: {addr: %q}\n",
		filepath.Join(dir, "registry"), r.address)
	file := filepath.Join(dir, "registry.yml")
	if err := os.WriteFile(file, []byte(config), 0o600); err != nil {
		return nil, err
	}
	r.server, err = spawn(filepath.Join(dir, "registry.log"), unix.SIGKILL, path, "serve", file)
	if err != nil {
		return nil, err
	}
	err = r.server.await(startTime, func() bool {
		conn, err := net.Dial("tcp", r.address)
		if err != nil {
			return false
		}
		defer conn.Close()
		fmt.Fprintf(conn, "GET /v2/ HTTP/1.0\r\n\r\n")
		line, err := bufio.NewReader(conn).ReadString('\n')
		return err == nil && strings.Contains(line, " 200 ")
	})
	if err != nil {
		r.server.end(unix.SIGKILL)
		return nil, err
	}
	return r, nil
}

var numbers atomic.Int64

// number is one that the engine has not used yet.
func (e *Engine) number() int64 { return numbers.Add(1) }
