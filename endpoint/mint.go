package endpoint

import (
	"context"
	"crypto"
	"crypto/x509"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"

	"github.com/deputy-id/deputy/attestor"
	"github.com/deputy-id/deputy/svid"
	"github.com/deputy-id/deputy/svid/registry"
)

// minter signs outside of entries, as only an authority with a key of its own
// can. A TTL of zero is the authority's default.
type minter interface {
	MintX509(id spiffeid.ID, pub crypto.PublicKey, dnsNames []string, ttl time.Duration) ([]*x509.Certificate, error)
	MintJWT(id spiffeid.ID, audience []string, ttl time.Duration) (svid.Token, error)
	LongestTTL() time.Duration
}

// mint is SPIRE's SVID API as far as it is for administrators. What its agents
// and downstream servers ask for is not offered.
type mint struct {
	svidv1.UnimplementedSVIDServer
	s *Server
}

func (a *mint) MintX509SVID(_ context.Context, in *svidv1.MintX509SVIDRequest) (*svidv1.MintX509SVIDResponse, error) {
	if a.s.Minter == nil {
		return nil, adminStatus(errElsewhere)
	}
	csr, id, err := a.readCSR(in.Csr)
	if err != nil {
		return nil, adminStatus(err)
	}
	if in.Ttl < 0 {
		return nil, adminStatus(invalid("ttl is negative"))
	}
	chain, err := a.s.Minter.MintX509(id, csr.PublicKey, csr.DNSNames, time.Duration(in.Ttl)*time.Second)
	if err != nil {
		return nil, adminStatus(err)
	}
	out := &types.X509SVID{Id: spireID(id), ExpiresAt: chain[0].NotAfter.Unix()}
	for _, c := range chain {
		out.CertChain = append(out.CertChain, c.Raw)
	}
	a.s.Log.Info("X.509-SVID minted", "spiffe_id", id, "expires", chain[0].NotAfter.UTC().Format(time.RFC3339))
	return &svidv1.MintX509SVIDResponse{Svid: out}, nil
}

// readCSR reads a request whose signature holds, with one SPIFFE ID of a
// workload of ours and DNS names that an entry could have too.
func (a *mint) readCSR(der []byte) (*x509.CertificateRequest, spiffeid.ID, error) {
	if len(der) == 0 {
		return nil, spiffeid.ID{}, invalid("missing CSR")
	}
	csr, err := x509.ParseCertificateRequest(der)
	if err != nil {
		return nil, spiffeid.ID{}, invalid("malformed CSR: %v", err)
	}
	if err := csr.CheckSignature(); err != nil {
		return nil, spiffeid.ID{}, invalid("CSR signature does not hold: %v", err)
	}
	if len(csr.URIs) != 1 {
		return nil, spiffeid.ID{}, invalid("CSR has %d URI SANs, one is needed", len(csr.URIs))
	}
	id, err := spiffeid.FromURI(csr.URIs[0])
	if err != nil {
		return nil, spiffeid.ID{}, invalid("CSR URI SAN is invalid: %v", err)
	}
	if _, err := workloadID(spireID(id), a.s.TrustDomain); err != nil {
		return nil, spiffeid.ID{}, invalid("CSR URI SAN is invalid: %v", err)
	}
	// What is minted is what an entry could have given.
	as := registry.Entry{SPIFFEID: id, DNSNames: csr.DNSNames, Selectors: []attestor.Selector{onHost}}
	if _, err := as.Check(a.s.TrustDomain); err != nil {
		return nil, spiffeid.ID{}, err
	}
	return csr, id, nil
}

func (a *mint) MintJWTSVID(_ context.Context, in *svidv1.MintJWTSVIDRequest) (*svidv1.MintJWTSVIDResponse, error) {
	if a.s.Minter == nil {
		return nil, adminStatus(errElsewhere)
	}
	id, err := workloadID(in.Id, a.s.TrustDomain)
	if err != nil {
		return nil, adminStatus(invalid("invalid SPIFFE ID: %v", err))
	}
	if err := checkAudiences(in.Audience); err != nil {
		return nil, adminStatus(err)
	}
	if in.Ttl < 0 {
		return nil, adminStatus(invalid("ttl is negative"))
	}
	token, err := a.s.Minter.MintJWT(id, in.Audience, time.Duration(in.Ttl)*time.Second)
	if err != nil {
		return nil, adminStatus(err)
	}
	a.s.Log.Info("JWT-SVID minted", "spiffe_id", id, "expires", token.Expires.UTC().Format(time.RFC3339))
	return &svidv1.MintJWTSVIDResponse{Svid: &types.JWTSVID{
		Token:     token.Compact,
		Id:        spireID(id),
		ExpiresAt: token.Expires.Unix(),
		IssuedAt:  token.Issued.Unix(),
	}}, nil
}
