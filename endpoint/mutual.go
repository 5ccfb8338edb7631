package endpoint

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"slices"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/exp/proto/spiffe/broker"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	grpcpeer "google.golang.org/grpc/peer"

	"github.com/deputy-id/deputy/attestor/peer"
)

// Brokering is the Broker API's part of a Config.
type Brokering struct {
	// Identity is the daemon's own SVID, and the bundles that clients are
	// verified with.
	Identity interface {
		x509svid.Source
		x509bundle.Source
	}
	Pods pods // nil: references to Kubernetes objects are not resolved
}

// Bounds of what brokers, and those who would be, may hold open.
const (
	brokerConns   = 64 // of one broker
	strangerConns = 16 // of all that have an SVID and are not on the list
)

// brokerShaker is the transport credentials of the Broker API: TLS with
// X.509-SVIDs on both sides (SPIFFE Broker Endpoint §3.1).
type brokerShaker struct {
	s     *Server
	place func(*peer.Process) string // owner, but for tests
}

func (h *brokerShaker) ClientHandshake(context.Context, string, net.Conn) (net.Conn, credentials.AuthInfo, error) {
	return nil, nil, errServerOnly
}

func (h *brokerShaker) Info() credentials.ProtocolInfo {
	return credentials.ProtocolInfo{SecurityProtocol: "tls"}
}

func (h *brokerShaker) Clone() credentials.TransportCredentials { return h }

func (h *brokerShaker) OverrideServerName(string) error { return errServerOnly }

// ServerHandshake runs in a goroutine of the connection and may wait.
func (h *brokerShaker) ServerHandshake(raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	b := &brokerLink{s: h.s, over: make(chan struct{}), closed: make(chan struct{})}
	from, err := h.seat(raw, b)
	if err == nil {
		err = h.shake(raw, b, from)
	}
	if err == nil {
		go b.watch()
		return b, b, nil
	}
	if from.denials.Allow() {
		h.s.Log.Info("broker refused", "from", from.name, "address", raw.RemoteAddr().String(), "reason", legible(err.Error()))
	}
	b.leave()
	raw.Close()
	return nil, nil, err
}

// seat finds out whose a connection is before anybody has shown an SVID. On a
// Unix socket it counts for the container, unit or user that it comes from, as
// on the others: a container's root must not use up what the host's has.
func (h *brokerShaker) seat(raw net.Conn, b *brokerLink) (from *account, err error) {
	c, ok := raw.(*peer.Conn)
	if !ok {
		b.tcp = true
		from, b.leave = h.s.budget.hold("tcp")
		return from, nil
	}
	theirs, err := c.Process().Namespace("pid")
	ours, ownErr := ownNamespace("pid")
	b.elsewhere = err != nil || ownErr != nil || theirs != ours
	seat := h.s.budget.seat(c.Credentials().EUID)
	b.leave = seat.leave
	b.proc = c
	err = seat.move(h.place(c.Process()))
	return seat.account(), err
}

func (h *brokerShaker) shake(raw net.Conn, b *brokerLink, from *account) error {
	if err := h.handshake(raw, b, from); err != nil {
		return err
	}
	cs := b.Conn.ConnectionState()
	if cs.NegotiatedProtocol != "h2" {
		return errors.New("client does not speak HTTP/2")
	}
	b.chain = cs.PeerCertificates
	var err error
	if b.id, err = x509svid.IDFromCert(b.chain[0]); err != nil {
		return err
	}
	b.until = slices.MinFunc(b.chain, func(x, y *x509.Certificate) int { return x.NotAfter.Compare(y.NotAfter) }).NotAfter
	owner, most := "broker", strangerConns
	if h.s.listed(b.id) != nil {
		owner, most = "broker "+b.id.String(), brokerConns
	}
	b.acct, b.release, err = h.s.budget.claim(owner, most)
	return err
}

func (h *brokerShaker) handshake(raw net.Conn, b *brokerLink, from *account) error {
	serving, stop := h.s.serving()
	defer stop()
	if b.tcp {
		// Nobody knows who is behind it: those who come to wait would be
		// without number.
		select {
		case from.challenge <- struct{}{}:
		default:
			return fmt.Errorf("%w: too many handshakes over TCP", errBudget)
		}
	} else if err := enter(serving, from.challenge); err != nil {
		return err
	}
	defer func() { <-from.challenge }()
	ctx, cancel := context.WithTimeout(serving, challengeTime)
	defer cancel()
	b.Conn = tls.Server(raw, h.s.brokerTLS())
	return b.Conn.HandshakeContext(ctx)
}

// brokerTLS verifies in VerifyConnection, and there is no resumption, which
// would pass by it.
func (s *Server) brokerTLS() *tls.Config {
	return &tls.Config{
		MinVersion:             tls.VersionTLS12,
		NextProtos:             []string{"h2"},
		ClientAuth:             tls.RequireAnyClientCert,
		SessionTicketsDisabled: true,
		GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) {
			own, err := s.Brokering.Identity.GetX509SVID()
			if err != nil {
				return nil, err
			}
			c := &tls.Certificate{PrivateKey: own.PrivateKey, Leaf: own.Certificates[0]}
			for _, one := range own.Certificates {
				c.Certificate = append(c.Certificate, one.Raw)
			}
			return c, nil
		},
		VerifyConnection: func(cs tls.ConnectionState) error { return s.verifyBroker(cs.PeerCertificates) },
	}
}

// verifyBroker checks an X.509-SVID against the bundle that there is now, of
// our trust domain or of one that some broker on the list is of.
func (s *Server) verifyBroker(chain []*x509.Certificate) error {
	if len(chain) == 0 {
		return errors.New("client has no certificate")
	}
	leaf := chain[0]
	id, err := x509svid.IDFromCert(leaf)
	switch td := id.TrustDomain(); {
	case err != nil:
		return err
	case id.Path() == "":
		return fmt.Errorf("%s is a trust domain, not a workload", id)
	case td != s.TrustDomain && !slices.ContainsFunc(s.brokers(), func(b Broker) bool { return b.ID.MemberOf(td) }):
		return fmt.Errorf("no broker is of the trust domain %s", td)
	case leaf.KeyUsage&x509.KeyUsageDigitalSignature == 0:
		return errors.New("the certificate's key usage lacks digitalSignature") // X509-SVID §4.3, which go-spiffe does not check
	case len(leaf.ExtKeyUsage)+len(leaf.UnknownExtKeyUsage) > 0 && !slices.Contains(leaf.ExtKeyUsage, x509.ExtKeyUsageClientAuth) &&
		!slices.Contains(leaf.ExtKeyUsage, x509.ExtKeyUsageAny):
		return errors.New("the certificate is not for clients")
	}
	_, _, err = x509svid.Verify(chain, s.Brokering.Identity)
	return err
}

// A brokerLink is one connection of the Broker API, whose client has an
// X.509-SVID. Whether that makes it a broker is found out at each call.
type brokerLink struct {
	*tls.Conn
	s         *Server
	id        spiffeid.ID
	tcp       bool
	proc      *peer.Conn // nil over TCP
	elsewhere bool       // its PIDs are not ours
	chain     []*x509.Certificate
	until     time.Time // the first of the certificates ends
	acct      *account  // of the broker
	release   func()
	leave     func()        // gives back what its connection took of where it comes from
	over      chan struct{} // closes when the SVID holds no more
	closing   sync.Once
	closed    chan struct{}
}

// AuthType makes a brokerLink the credentials.AuthInfo of its connection.
func (b *brokerLink) AuthType() string { return "tls" }

func brokerOf(ctx context.Context) *brokerLink {
	p, ok := grpcpeer.FromContext(ctx)
	if !ok {
		return nil
	}
	b, _ := p.AuthInfo.(*brokerLink)
	return b
}

// Close closes the connection and gives back its place.
func (b *brokerLink) Close() error {
	b.closing.Do(func() {
		close(b.closed)
		b.release()
		b.leave()
	})
	return b.Conn.Close()
}

// look is how long the clock is believed to go as it should.
const look = 15 * time.Second

// parting is how long the calls of a broker whose SVID ended have to say so.
const parting = time.Second

// watch ends the connection when the client's SVID expires, or is signed by
// nobody whom its trust domain's bundle still names: an SVID has no other way to
// be revoked.
func (b *brokerLink) watch() {
	for {
		_, stale := b.s.Authority.Bundles()
		if err := b.s.verifyBroker(b.chain); err != nil {
			b.s.Log.Info("broker's connection ends", "spiffe_id", b.id.String(), "reason", legible(err.Error()))
			close(b.over)
			select {
			case <-b.closed:
			case <-time.After(parting):
				b.Close()
			}
			return
		}
		timer := time.NewTimer(min(max(time.Until(b.until), 0)+time.Millisecond, look))
		select {
		case <-b.closed:
			timer.Stop()
			return
		case <-stale:
			timer.Stop()
		case <-timer.C:
		}
	}
}

// check implements caller.
func (b *brokerLink) check(context.Context) error {
	switch {
	case closed(b.over), time.Now().After(b.until):
		return errExpired
	case b.s.listed(b.id) == nil:
		return errBroker
	}
	return nil
}

func (b *brokerLink) account() *account { return b.acct }

func (b *brokerLink) ended() ending { return ending{b.over, func() error { return errExpired }} }

// who is what a line of the log says of the broker: on a Unix socket the process
// that connected, too.
func (b *brokerLink) who() []any {
	if b.proc == nil {
		return []any{"spiffe_id", b.id.String()}
	}
	return []any{"spiffe_id", b.id.String(), "pid", b.proc.Process().PID(), "uid", b.proc.Credentials().EUID}
}

// note logs why a call was denied. The reference is to whom it is about, nil if
// it did not come to that.
func (b *brokerLink) note(method string, ref *broker.WorkloadReference, err error) {
	args := append([]any{"method", method}, b.who()...)
	switch c := code(err); {
	case c == codes.OK, c == codes.Canceled, c == codes.InvalidArgument, errors.Is(err, errEnded):
	case c == codes.Internal:
		b.s.Log.Error("broker could not be served", append(append(args, about(ref)...), "error", err)...)
	default:
		if !b.acct.denials.Allow() {
			b.acct.unsaid.Add(1)
			return
		}
		args = append(append(args, about(ref)...), "reason", err)
		if n := b.acct.unsaid.Swap(0); n > 0 {
			args = append(args, "unsaid", n)
		}
		b.s.Log.Info("broker denied", args...)
	}
}
