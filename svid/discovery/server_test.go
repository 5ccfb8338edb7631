package discovery_test

import (
	"bufio"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"math/big"
	"net"
	"net/http"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"

	"github.com/deputy-id/deputy/svid"
	"github.com/deputy-id/deputy/svid/discovery"
)

// served runs a server and returns its address and a client that trusts it.
func served(t *testing.T, h http.Handler) (string, *tls.Config) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), IPAddresses: []net.IP{{127, 0, 0, 1}}, NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	pair := &tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
	s, err := discovery.Listen("127.0.0.1:0", h, func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return pair, nil }, hclog.NewNullLogger())
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("got %v at the end", err)
		}
		if err := s.Close(); err != nil {
			t.Errorf("closed twice: %v", err)
		}
		if c, err := net.Dial("tcp", s.Addr().String()); err == nil {
			c.Close()
			t.Error("the address is still served")
		}
	})
	roots := x509.NewCertPool()
	roots.AddCert(cert)
	return s.Addr().String(), &tls.Config{RootCAs: roots}
}

func TestServedOverTLSOnly(t *testing.T) {
	addr, config := served(t, newHandler(t, "https://i.example", &keys{one(newKey(t, svid.ECP256))}))
	client := &http.Client{Transport: &http.Transport{TLSClientConfig: config, ForceAttemptHTTP2: true}}
	defer client.CloseIdleConnections()
	r, err := client.Get("https://" + addr + "/keys")
	if err != nil {
		t.Fatal(err)
	}
	defer r.Body.Close()
	if text := body(t, r); r.StatusCode != 200 || r.ProtoMajor != 2 || !strings.Contains(text, `"sig"`) {
		t.Errorf("got %s %d %s", r.Proto, r.StatusCode, text)
	}
	if r, err := http.Get("http://" + addr + "/keys"); err == nil {
		r.Body.Close()
		if r.StatusCode == 200 {
			t.Error("served without TLS")
		}
	}
	old := config.Clone()
	old.MaxVersion = tls.VersionTLS11
	if c, err := tls.Dial("tcp", addr, old); err == nil {
		c.Close()
		t.Error("TLS 1.1 was accepted")
	}
}

func TestLargeHeadersAreRefused(t *testing.T) {
	addr, config := served(t, newHandler(t, "https://i.example", &keys{one(newKey(t, svid.ECP256))}))
	c, err := tls.Dial("tcp", addr, config)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	// The server may answer and close before it has read all.
	go io.WriteString(c, "GET /keys HTTP/1.1\r\nHost: i.example\r\nX: "+strings.Repeat("x", 64<<10)+"\r\n\r\n")
	r, err := http.ReadResponse(bufio.NewReader(c), nil)
	if err != nil {
		return // cut off is as good
	}
	if r.StatusCode != http.StatusRequestHeaderFieldsTooLarge {
		t.Errorf("got %d, want 431", r.StatusCode)
	}
}

// A host that takes all that it can, and asks just often enough to keep it,
// keeps no other from the keys.
func TestAHostKeepsNoOtherOut(t *testing.T) {
	addr, config := served(t, newHandler(t, "https://i.example", &keys{one(newKey(t, svid.ECP256))}))
	for range discovery.MaxHostConns {
		c, err := tls.Dial("tcp", addr, config)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		if _, err := io.WriteString(c, "GET /keys HTTP/1.1\r\nHost: i.example\r\n\r\n"); err != nil {
			t.Fatal(err)
		}
		if r, err := http.ReadResponse(bufio.NewReader(c), nil); err != nil || r.StatusCode != 200 {
			t.Fatalf("got %v, %v", r, err)
		}
	}
	if c, err := tls.Dial("tcp", addr, config); err == nil {
		c.Close()
		t.Error("one more than allowed is served")
	}
	other := &net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 0, 0, 2)}}
	client := &http.Client{Transport: &http.Transport{DialContext: other.DialContext, TLSClientConfig: config}, Timeout: discovery.ReadTime}
	defer client.CloseIdleConnections()
	r, err := client.Get("https://" + addr + "/keys")
	if err != nil {
		t.Fatalf("from another address: %v", err)
	}
	r.Body.Close()
	if r.StatusCode != 200 {
		t.Errorf("got %d", r.StatusCode)
	}
}

// Clients that say nothing keep their connections for a while only.
func TestSilentClientsGiveWay(t *testing.T) {
	addr, config := served(t, newHandler(t, "https://i.example", &keys{one(newKey(t, svid.ECP256))}))
	var silent []net.Conn
	for range discovery.MaxHostConns {
		c, err := net.Dial("tcp", addr)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		silent = append(silent, c)
	}
	for _, c := range silent {
		c.SetReadDeadline(time.Now().Add(2 * discovery.ReadTime))
		if _, err := c.Read(make([]byte, 1)); errors.Is(err, os.ErrDeadlineExceeded) || err == nil {
			t.Fatalf("a connection that says nothing is still there: %v", err)
		}
	}
	client := &http.Client{Transport: &http.Transport{TLSClientConfig: config, DisableKeepAlives: true}, Timeout: discovery.ReadTime}
	r, err := client.Get("https://" + addr + "/keys")
	if err != nil {
		t.Fatal(err)
	}
	r.Body.Close()
	if r.StatusCode != 200 {
		t.Errorf("got %d", r.StatusCode)
	}
}

func TestAnAddressInUseIsAnError(t *testing.T) {
	addr, _ := served(t, http.NotFoundHandler())
	_, err := discovery.Listen(addr, http.NotFoundHandler(), nil, hclog.NewNullLogger())
	var op *net.OpError
	if !errors.As(err, &op) || !strings.Contains(err.Error(), addr) {
		t.Errorf("got %v, want an error that names the address", err)
	}
}
