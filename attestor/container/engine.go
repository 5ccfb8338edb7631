package container

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"sync/atomic"
	"time"

	cerrdefs "github.com/containerd/errdefs"
	"github.com/hashicorp/go-hclog"
	"github.com/moby/moby/client"
)

// An engine is Docker's API, as far as attestation asks it.
type engine struct {
	log    hclog.Logger
	http   *http.Client
	client atomic.Pointer[client.Client] // nil until a version was agreed upon
}

const (
	// maxResponse bounds what an answer may take of our memory. An inspected
	// container with a thousand mounts and labels is a few hundred KiB.
	maxResponse = 8 << 20
	// maxHeader bounds the head of an answer.
	maxHeader = 64 << 10
	// idleConn ends connections of a host that has come to rest.
	idleConn = 30 * time.Second
)

func newEngine(s socket, log hclog.Logger) *engine {
	return &engine{log: log, http: &http.Client{
		Transport: limited{&http.Transport{
			DialContext:            func(ctx context.Context, _, _ string) (net.Conn, error) { return s.dial(ctx) },
			DisableCompression:     true,
			MaxIdleConnsPerHost:    4,
			MaxConnsPerHost:        16,
			IdleConnTimeout:        idleConn,
			MaxResponseHeaderBytes: maxHeader,
		}},
		CheckRedirect: client.CheckRedirect,
	}}
}

func (e *engine) close() { e.http.CloseIdleConnections() }

// api returns a client that speaks a version which the engine speaks too.
func (e *engine) api(ctx context.Context) (*client.Client, error) {
	if c := e.client.Load(); c != nil {
		return c, nil
	}
	// No environment: DOCKER_HOST of whoever started the daemon is nobody's word.
	c, err := client.New(client.WithHost("unix:///engine"), client.WithHTTPClient(e.http))
	if err != nil {
		return nil, err
	}
	// The client would ignore that this failed, and go on with its own newest version.
	if _, err := c.Ping(ctx, client.PingOptions{NegotiateAPIVersion: true}); err != nil {
		return nil, err
	}
	e.log.Info("docker engine answers", "api_version", c.ClientVersion())
	e.client.Store(c)
	return c, nil
}

// errAbsent says that the engine knows no such container or image.
var errAbsent = errors.New("engine does not know it")

// inspect asks for the container with this full ID.
func (e *engine) inspect(ctx context.Context, id string) (inspected, error) {
	c, err := e.api(ctx)
	if err != nil {
		return inspected{}, fmt.Errorf("agree upon a version of the API: %w", err)
	}
	r, err := c.ContainerInspect(ctx, id, client.ContainerInspectOptions{})
	if err != nil {
		return inspected{}, e.fail("inspect container", c, err)
	}
	return newInspected(id, r.Container)
}

// image asks for the image with this ID.
func (e *engine) image(ctx context.Context, id string) (image, error) {
	c, err := e.api(ctx)
	if err != nil {
		return image{}, fmt.Errorf("agree upon a version of the API: %w", err)
	}
	r, err := c.ImageInspect(ctx, id)
	if err != nil {
		return image{}, e.fail("inspect image", c, err)
	}
	return newImage(id, r.InspectResponse)
}

func (e *engine) fail(act string, c *client.Client, err error) error {
	switch {
	case cerrdefs.IsNotFound(err):
		return errAbsent
	case cerrdefs.IsInvalidArgument(err):
		// As after a restart into a version that does not speak what was agreed.
		e.client.CompareAndSwap(c, nil)
	}
	return fmt.Errorf("%s: %w", act, err)
}

// limited is a transport whose answers end with an error where they are too long.
type limited struct{ *http.Transport }

func (l limited) RoundTrip(r *http.Request) (*http.Response, error) {
	resp, err := l.Transport.RoundTrip(r)
	if err == nil && resp.Body != nil {
		resp.Body = &body{ReadCloser: resp.Body, left: maxResponse}
	}
	return resp, err
}

var errTooLong = fmt.Errorf("answer is longer than %d bytes", maxResponse)

type body struct {
	io.ReadCloser
	left int
}

func (b *body) Read(p []byte) (int, error) {
	if b.left <= 0 {
		return 0, errTooLong
	}
	n, err := b.ReadCloser.Read(p[:min(len(p), b.left)])
	b.left -= n
	return n, err
}
