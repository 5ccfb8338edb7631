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

// Clients that take every connection and say nothing keep it for a while only.
func TestSilentClientsGiveWay(t *testing.T) {
	addr, config := served(t, newHandler(t, "https://i.example", &keys{one(newKey(t, svid.ECP256))}))
	var first net.Conn
	for range discovery.MaxConns {
		c, err := net.Dial("tcp", addr)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		if first == nil {
			first = c
		}
	}
	client := &http.Client{Transport: &http.Transport{TLSClientConfig: config, DisableKeepAlives: true}, Timeout: 4 * discovery.ReadTime}
	r, err := client.Get("https://" + addr + "/keys")
	if err != nil {
		t.Fatal(err)
	}
	r.Body.Close()
	if r.StatusCode != 200 {
		t.Errorf("got %d", r.StatusCode)
	}
	// It was served in the place of one of them, not beside them.
	first.SetReadDeadline(time.Now().Add(100 * time.Millisecond))
	if _, err := first.Read(make([]byte, 1)); errors.Is(err, os.ErrDeadlineExceeded) || err == nil {
		t.Errorf("the first of the silent ones is still there: %v", err)
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
