package discovery

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/http"
	"time"

	"github.com/hashicorp/go-hclog"

	"github.com/deputy-id/deputy/internal/crowd"
)

// Bounds of what clients, who may be anybody, can take.
const (
	maxConns     = 256
	maxHostConns = 64 // more than a federation endpoint's, since all may come through one proxy
	maxHeaders   = 8 << 10
	readTime     = 5 * time.Second // of the TLS handshake, and of each request
	writeTime    = 10 * time.Second
	idleTime     = 30 * time.Second
	grace        = 3 * time.Second // for requests that are on their way when the server stops
)

// A Server serves a handler over TLS.
type Server struct {
	http *http.Server
	l    net.Listener
}

// Listen opens the address and serves nothing yet. The certificate is asked
// for at each handshake.
func Listen(address string, h http.Handler, cert func(*tls.ClientHelloInfo) (*tls.Certificate, error), log hclog.Logger) (*Server, error) {
	l, err := net.Listen("tcp", address)
	if err != nil {
		return nil, err
	}
	return &Server{
		l: crowd.Limit(l, crowd.Bounds{All: maxConns, Host: maxHostConns}),
		http: &http.Server{
			Handler:           h,
			TLSConfig:         &tls.Config{MinVersion: tls.VersionTLS12, GetCertificate: cert},
			ReadHeaderTimeout: readTime,
			ReadTimeout:       readTime,
			WriteTimeout:      writeTime,
			IdleTimeout:       idleTime,
			MaxHeaderBytes:    maxHeaders,
			HTTP2:             &http.HTTP2Config{MaxConcurrentStreams: 32},
			// What a client does wrong is not for the operator to act on.
			ErrorLog: log.StandardLogger(&hclog.StandardLoggerOptions{ForceLevel: hclog.Debug}),
		},
	}, nil
}

// Addr is where it listens.
func (s *Server) Addr() net.Addr { return s.l.Addr() }

// Close gives up the address. Run does so by itself.
func (s *Server) Close() error {
	if err := s.l.Close(); err != nil && !errors.Is(err, net.ErrClosed) {
		return err
	}
	return nil
}

// Run serves until the context ends.
func (s *Server) Run(ctx context.Context) error {
	stopped := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(stopped)
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), grace)
		defer cancel()
		if s.http.Shutdown(ctx) != nil {
			s.http.Close()
		}
	})
	err := s.http.ServeTLS(s.l, "", "")
	if stop() {
		return fmt.Errorf("serve %s: %w", s.l.Addr(), err)
	}
	<-stopped
	return nil
}
