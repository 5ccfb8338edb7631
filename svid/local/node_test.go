package local

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"

	"github.com/deputy-id/deputy/svid"
	"github.com/deputy-id/deputy/svid/registry"
	"github.com/deputy-id/deputy/test/bubble"
)

func TestNodeAuthorityKnowsOneIDAndNobodyElseHasIt(t *testing.T) {
	td := spiffeid.RequireTrustDomainFromString("example.org")
	a := open(t, Options{TrustDomain: td})
	key, err := svid.ECP256.Generate()
	if err != nil {
		t.Fatal(err)
	}
	own := registry.NodeID(td)
	if chain, err := a.Node().X509(t.Context(), registry.Entry{SPIFFEID: own}, key); err != nil || chain[0].URIs[0].String() != own.String() {
		t.Errorf("got %v, %v, want a certificate of %s", chain, err, own)
	}
	other := spiffeid.RequireFromPath(td, "/agent/x")
	if _, err := a.Node().X509(t.Context(), registry.Entry{SPIFFEID: other}, key); err == nil {
		t.Errorf("signed for %s, which is not the node", other)
	}
	if _, err := a.X509(t.Context(), registry.Entry{SPIFFEID: own}, key); err == nil {
		t.Error("an entry got the node's ID")
	}
	if _, err := a.MintX509(own, key.Public(), nil, 0); err == nil {
		t.Error("an administrator minted the node's ID")
	}
	if _, err := a.Node().JWT(t.Context(), registry.Entry{SPIFFEID: own}, []string{"a"}); err == nil {
		t.Error("the node got a token")
	}
}

func TestSelfIsAnIdentityForTLS(t *testing.T) {
	td := spiffeid.RequireTrustDomainFromString("example.org")
	a := open(t, Options{TrustDomain: td})
	s := svid.NewSelf(a.Node(), registry.NodeID(td), nil)
	defer s.Close()
	serial := handshake(t, s)
	if again := handshake(t, s); again != serial {
		t.Error("got another SVID while the first was fresh")
	}
	other := spiffeid.RequireTrustDomainFromString("other.example")
	if _, err := s.GetX509BundleForTrustDomain(other); !errors.Is(err, svid.ErrNoBundle) {
		t.Errorf("got %v, want no bundle of %s", err, other)
	}
}

func TestSelfRenewsAndEnds(t *testing.T) {
	bubble.Test(t, func(t *testing.T) {
		td := spiffeid.RequireTrustDomainFromString("example.org")
		a := open(t, Options{TrustDomain: td})
		s := svid.NewSelf(a.Node(), registry.NodeID(td), nil)
		first, err := s.GetX509SVID()
		if err != nil {
			t.Fatal(err)
		}
		time.Sleep(35 * time.Minute)
		next, err := s.GetX509SVID()
		if err != nil || next.Certificates[0].SerialNumber.Cmp(first.Certificates[0].SerialNumber) == 0 {
			t.Errorf("got %v, %v, want another SVID after half of its life", next, err)
		}
		s.Close()
		bubble.Wait()
		if _, err := s.GetX509SVID(); err == nil {
			t.Error("got an SVID after Close")
		}
	})
}

// handshake returns the serial number that a client saw.
func handshake(t *testing.T, s *svid.Self) string {
	t.Helper()
	client, server := net.Pipe()
	defer client.Close()
	go func() {
		defer server.Close()
		tls.Server(server, tlsconfig.TLSServerConfig(s)).HandshakeContext(context.Background())
		io.Copy(io.Discard, server)
	}()
	id, err := s.GetX509SVID()
	if err != nil {
		t.Fatal(err)
	}
	c := tls.Client(client, tlsconfig.TLSClientConfig(s, tlsconfig.AuthorizeID(id.ID)))
	if err := c.HandshakeContext(t.Context()); err != nil {
		t.Fatal(err)
	}
	return c.ConnectionState().PeerCertificates[0].SerialNumber.String()
}
