package federation

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/http"
	"sync/atomic"
	"time"

	"github.com/hashicorp/go-hclog"

	"github.com/deputy-id/deputy/internal/crowd"
	"github.com/deputy-id/deputy/svid"
)

// Bounds of what a stranger may take of the endpoint. It answers anybody who
// can reach it (§5.2.1.3), with a few kilobytes that are the same for all.
const (
	maxConns     = 256
	maxHostConns = 32
	headerTime   = 5 * time.Second
	answerTime   = 10 * time.Second
	maxRequest   = 8 << 10 // bytes of headers
	grace        = 3 * time.Second
)

// bundles is where our own bundle comes from.
type bundles interface {
	Bundles() (*svid.Bundles, <-chan struct{})
}

// An Endpoint serves our own bundle to whoever asks, over HTTPS at the path /.
type Endpoint struct {
	bundles     bundles
	certificate func(*tls.ClientHelloInfo) (*tls.Certificate, error)
	log         hclog.Logger
	encoded     atomic.Pointer[encoded]
}

type encoded struct {
	of   *svid.Bundle
	body []byte
}

// NewEndpoint returns one that shows this certificate: an X.509-SVID of ours for
// the profile https_spiffe, one of the Web PKI for https_web.
func NewEndpoint(b bundles, certificate func(*tls.ClientHelloInfo) (*tls.Certificate, error), log hclog.Logger) *Endpoint {
	return &Endpoint{bundles: b, certificate: certificate, log: log}
}

// ServeHTTP implements http.Handler.
func (e *Endpoint) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	e.log.Debug("bundle endpoint asked", "remote", r.RemoteAddr, "method", r.Method)
	w.Header().Set("X-Content-Type-Options", "nosniff")
	switch {
	case r.URL.Path != "/":
		http.Error(w, "the bundle is at /", http.StatusNotFound)
		return
	case r.Method != http.MethodGet:
		w.Header().Set("Allow", http.MethodGet)
		http.Error(w, "only GET is answered", http.StatusMethodNotAllowed)
		return
	}
	body, err := e.body()
	if err != nil {
		if !errors.Is(err, svid.ErrNotReady) {
			e.log.Error("bundle is not served", "error", err)
		}
		http.Error(w, "the bundle is not ready", http.StatusServiceUnavailable)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Cache-Control", "no-cache") // what is between us and a follower may not show him an old one
	w.Write(body)
}

// body is the bundle as it is now, encoded once.
func (e *Endpoint) body() ([]byte, error) {
	all, _ := e.bundles.Bundles()
	if all == nil || all.Own == nil {
		return nil, svid.ErrNotReady
	}
	if c := e.encoded.Load(); c != nil && c.of == all.Own {
		return c.body, nil
	}
	body, err := all.Own.Marshal()
	if err != nil {
		return nil, err
	}
	e.encoded.Store(&encoded{all.Own, body})
	return body, nil
}

// Serve serves on a TCP listener until the context ends, and closes it.
func (e *Endpoint) Serve(ctx context.Context, l net.Listener) error {
	var protocols http.Protocols
	protocols.SetHTTP1(true)
	s := &http.Server{
		Handler:           e,
		ReadHeaderTimeout: headerTime, // which bounds the handshake, too
		ReadTimeout:       answerTime,
		WriteTimeout:      answerTime,
		MaxHeaderBytes:    maxRequest,
		Protocols:         &protocols,
		ErrorLog:          e.log.StandardLogger(&hclog.StandardLoggerOptions{ForceLevel: hclog.Debug}),
		TLSConfig: &tls.Config{
			MinVersion:     tls.VersionTLS12,
			ClientAuth:     tls.NoClientCert, // §5.2.1.3, §5.2.2.3
			GetCertificate: e.certificate,
			// Mozilla's intermediate compatibility (§5.2); TLS 1.3 has its own.
			CipherSuites: []uint16{
				tls.TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256, tls.TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256,
				tls.TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384, tls.TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384,
				tls.TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256, tls.TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256,
			},
		},
	}
	// One short answer a connection: who could ask again on it could keep it.
	s.SetKeepAlivesEnabled(false)
	stopped := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(stopped)
		within, cancel := context.WithTimeout(context.WithoutCancel(ctx), grace)
		defer cancel()
		if s.Shutdown(within) != nil {
			s.Close()
		}
	})
	err := s.ServeTLS(crowd.Limit(l, crowd.Bounds{All: maxConns, Host: maxHostConns}), "", "")
	if !stop() {
		<-stopped
		return ctx.Err()
	}
	return fmt.Errorf("serve %s: %w", l.Addr(), err)
}
