package federation

import (
	"bufio"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	gospiffe "github.com/spiffe/go-spiffe/v2/federation"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/deputy-id/deputy/svid"
)

// serving runs an endpoint with this certificate on loopback.
func serving(t *testing.T, m *memory, cert *tls.Certificate) (address string) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	e := NewEndpoint(m, func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return cert, nil }, hclog.NewNullLogger())
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- e.Serve(ctx, l) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; !errors.Is(err, context.Canceled) {
			t.Errorf("Serve: got %v, want what the context says", err)
		}
	})
	return l.Addr().String()
}

func TestEndpointAnswers(t *testing.T) {
	own := bundle(t, ours, 7, 5*time.Minute, newCA(t))
	m := newMemory(own, bundle(t, theirs, 1, 0, newCA(t)))
	e := NewEndpoint(m, nil, hclog.NewNullLogger())
	for _, c := range []struct {
		method, path string
		status       int
	}{
		{"GET", "/", 200},
		{"GET", "/?x=y", 200},
		{"HEAD", "/", 405},
		{"POST", "/", 405},
		{"PUT", "/", 405},
		{"DELETE", "/", 405},
		{"OPTIONS", "/", 405},
		{"GET", "/bundle.json", 404},
		{"GET", "/../etc/passwd", 404},
		{"GET", "//", 404},
	} {
		t.Run(c.method+" "+c.path, func(t *testing.T) {
			w := httptest.NewRecorder()
			e.ServeHTTP(w, httptest.NewRequest(c.method, "https://ours.example"+c.path, strings.NewReader("x")))
			if w.Code != c.status {
				t.Fatalf("got status %d, want %d", w.Code, c.status)
			}
			if c.status != 200 {
				return
			}
			if got := w.Header().Get("Content-Type"); got != "application/json" {
				t.Errorf("got type %q, want application/json", got)
			}
			got, err := svid.ParseBundle(ours, w.Body.Bytes())
			if err != nil || !got.Equal(own) {
				t.Errorf("got %+v, %v, want our own bundle with its number and hint", got, err)
			}
		})
	}
}

func TestEndpointServesWhatIsNew(t *testing.T) {
	m := newMemory(nil)
	e := NewEndpoint(m, nil, hclog.NewNullLogger())
	ask := func() *httptest.ResponseRecorder {
		w := httptest.NewRecorder()
		e.ServeHTTP(w, httptest.NewRequest("GET", "/", nil))
		return w
	}
	if w := ask(); w.Code != http.StatusServiceUnavailable {
		t.Errorf("got status %d before there is a bundle, want 503", w.Code)
	}
	for sequence := range uint64(3) {
		own := bundle(t, ours, sequence+1, 0, newCA(t))
		m.value.Store(&svid.Bundles{Own: own})
		for range 2 {
			if got, err := svid.ParseBundle(ours, ask().Body.Bytes()); err != nil || !got.Equal(own) {
				t.Errorf("got %+v, %v, want the bundle of now", got, err)
			}
		}
	}
}

// Stock go-spiffe fetches it by both profiles, and so does our own client.
func TestEndpointIsFetchedByBothProfiles(t *testing.T) {
	const id = "spiffe://ours.example/spire/agent/deputy/local"
	mine, web := newCA(t), newCA(t)
	own := bundle(t, ours, 7, 5*time.Minute, mine)
	roots := x509.NewCertPool()
	roots.AddCert(web.cert)
	for _, c := range []struct {
		name string
		cert *tls.Certificate
		with gospiffe.FetchOption
		r    Relationship
	}{
		{"https_web", web.server(t, "localhost"), gospiffe.WithWebPKIRoots(roots), Relationship{TrustDomain: ours, Roots: web.file(t)}},
		{"https_spiffe", mine.server(t, id), gospiffe.WithSPIFFEAuth(spiffebundle.NewSet(own.SPIFFE()), spiffeid.RequireFromString(id)),
			Relationship{TrustDomain: ours, EndpointID: spiffeid.RequireFromString(id)}},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, port, err := net.SplitHostPort(serving(t, newMemory(own), c.cert))
			if err != nil {
				t.Fatal(err)
			}
			url := "https://localhost:" + port + "/"
			got, err := gospiffe.FetchBundle(t.Context(), ours, url, c.with)
			if err != nil || !got.Equal(own.SPIFFE()) {
				t.Errorf("go-spiffe: got %+v, %v, want our bundle", got, err)
			}
			c.r.URL = url
			mine, err := dial((&net.Dialer{}).DialContext).fetch(t.Context(), c.r, &svid.Bundles{Own: own})
			if err != nil || !mine.bundle.Equal(own) {
				t.Errorf("our client: got %+v, %v, want our bundle", mine, err)
			}
			if c.r.Profile() != c.name {
				t.Errorf("got profile %s, want %s", c.r.Profile(), c.name)
			}
		})
	}
}

func TestEndpointTLS(t *testing.T) {
	web := newCA(t)
	address := serving(t, newMemory(bundle(t, ours, 1, 0, newCA(t))), web.server(t, "localhost"))
	roots := x509.NewCertPool()
	roots.AddCert(web.cert)
	for _, c := range []struct {
		name   string
		change func(*tls.Config)
		good   bool
	}{
		{"as it is", func(*tls.Config) {}, true},
		{"TLS 1.2", func(c *tls.Config) { c.MaxVersion = tls.VersionTLS12 }, true},
		{"TLS 1.1", func(c *tls.Config) { c.MinVersion, c.MaxVersion = tls.VersionTLS10, tls.VersionTLS11 }, false},
		{"CBC", func(c *tls.Config) {
			c.MaxVersion, c.CipherSuites = tls.VersionTLS12, []uint16{tls.TLS_ECDHE_ECDSA_WITH_AES_128_CBC_SHA}
		}, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			config := &tls.Config{RootCAs: roots, ServerName: "localhost"}
			asked := false
			config.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
				asked = true
				return &tls.Certificate{}, nil
			}
			c.change(config)
			conn, err := tls.Dial("tcp", address, config)
			if err == nil {
				conn.Close()
			}
			if c.good != (err == nil) {
				t.Errorf("got %v, want a connection: %t", err, c.good)
			}
			if asked {
				t.Error("the server asked for a certificate")
			}
		})
	}
}

// Who holds connections open is closed, and does not keep others out.
func TestEndpointBoundsItsClients(t *testing.T) {
	web := newCA(t)
	address := serving(t, newMemory(bundle(t, ours, 1, 0, newCA(t))), web.server(t, "localhost"))
	var held []net.Conn
	for range maxHostConns {
		c, err := net.Dial("tcp", address)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		held = append(held, c)
	}
	over, err := net.Dial("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	defer over.Close()
	over.SetReadDeadline(time.Now().Add(headerTime / 2))
	if _, err := over.Read(make([]byte, 1)); err == nil || errors.Is(err, context.DeadlineExceeded) || isTimeout(err) {
		t.Errorf("one more than allowed: got %v, want it closed at once", err)
	}
	// Another address is served meanwhile.
	d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 0, 0, 2)}}
	other := dial(d.DialContext)
	r := Relationship{TrustDomain: ours, URL: "https://" + strings.Replace(address, "127.0.0.1", "localhost", 1), Roots: web.file(t)}
	if _, err := other.fetch(t.Context(), r, nil); err != nil {
		t.Errorf("from another address: %v", err)
	}
	for _, c := range held {
		c.SetReadDeadline(time.Now().Add(2 * headerTime))
		if _, err := io.Copy(io.Discard, c); isTimeout(err) {
			t.Fatal("a connection that says nothing was not closed")
		}
	}
	if _, err := dial((&net.Dialer{}).DialContext).fetch(t.Context(), r, nil); err != nil {
		t.Errorf("after they are gone: %v", err)
	}
}

// Who asks on and on needs a connection each time, as everybody does.
func TestEndpointAnswersOnceAConnection(t *testing.T) {
	web := newCA(t)
	address := serving(t, newMemory(bundle(t, ours, 1, 0, newCA(t))), web.server(t, "localhost"))
	roots := x509.NewCertPool()
	roots.AddCert(web.cert)
	conn, err := tls.Dial("tcp", address, &tls.Config{RootCAs: roots, ServerName: "localhost"})
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(headerTime))
	io.WriteString(conn, strings.Repeat("GET / HTTP/1.1\r\nHost: x\r\n\r\n", 2))
	from := bufio.NewReader(conn)
	resp, err := http.ReadResponse(from, nil)
	if err != nil || resp.StatusCode != http.StatusOK {
		t.Fatalf("got %v, %v", resp, err)
	}
	io.Copy(io.Discard, resp.Body)
	if _, err := http.ReadResponse(from, nil); err == nil || isTimeout(err) {
		t.Errorf("a second answer on one connection: got %v, want it closed", err)
	}
}

func isTimeout(err error) bool {
	var n net.Error
	return errors.As(err, &n) && n.Timeout()
}

func TestEndpointRefusesLargeRequests(t *testing.T) {
	web := newCA(t)
	address := serving(t, newMemory(bundle(t, ours, 1, 0, newCA(t))), web.server(t, "localhost"))
	roots := x509.NewCertPool()
	roots.AddCert(web.cert)
	conn, err := tls.Dial("tcp", address, &tls.Config{RootCAs: roots, ServerName: "localhost"})
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	go func() {
		fmt.Fprintf(conn, "GET / HTTP/1.1\r\nHost: x\r\nX: %s\r\n\r\n", strings.Repeat("x", 1<<20))
	}()
	resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil || resp.StatusCode != http.StatusRequestHeaderFieldsTooLarge {
		t.Errorf("got %v, %v, want status 431", resp, err)
	}
}

func TestEndpointSaysThatItCannotServe(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	l.Close()
	cert := newCA(t).server(t, "localhost")
	e := NewEndpoint(newMemory(nil), func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return cert, nil }, hclog.NewNullLogger())
	if err := e.Serve(t.Context(), l); !errors.Is(err, net.ErrClosed) || errors.Is(err, context.Canceled) {
		t.Errorf("got %v, want the listener's error", err)
	}
}
