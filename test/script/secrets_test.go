package script

import (
	"context"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"os"
	"strings"

	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	secretv3 "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	"github.com/rogpeppe/go-internal/testscript"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
)

// secrets FILE NAME... asks for secrets as Envoy does, and writes a line for
// each that comes, until the script ends: its name and whose it is.
func secrets(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 1 {
		ts.Fatalf("usage: secrets FILE NAME...")
	}
	out, err := os.Create(ts.MkAbs(args[0]))
	ts.Check(err)
	conn, err := grpc.NewClient(ts.Getenv("SPIFFE_ENDPOINT_SOCKET"), grpc.WithTransportCredentials(insecure.NewCredentials()))
	ts.Check(err)
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan struct{})
	ts.Defer(func() {
		cancel()
		<-ended
		conn.Close()
		out.Close()
	})
	go func() {
		defer close(ended)
		fmt.Fprintln(out, "ended:", follow(ctx, conn, out, args[1:]))
	}()
}

func follow(ctx context.Context, conn *grpc.ClientConn, out *os.File, names []string) error {
	st, err := secretv3.NewSecretDiscoveryServiceClient(conn).StreamSecrets(ctx)
	if err != nil {
		return err
	}
	in := &discoveryv3.DiscoveryRequest{ResourceNames: names}
	for {
		if err := st.Send(in); err != nil {
			return err
		}
		r, err := st.Recv()
		if err != nil {
			return err
		}
		in.VersionInfo, in.ResponseNonce = r.VersionInfo, r.Nonce
		for _, one := range r.Resources {
			var s tlsv3.Secret
			if err := one.UnmarshalTo(&s); err != nil {
				return err
			}
			whose, err := owners(&s)
			if err != nil {
				return err
			}
			fmt.Fprintln(out, s.Name, whose)
		}
	}
}

// owners says whose a secret is: the ID of a certificate, the trust domains of
// a validation context, or that it is withdrawn.
func owners(s *tlsv3.Secret) (string, error) {
	if c := s.GetTlsCertificate(); c != nil {
		return owner(c.GetCertificateChain().GetInlineBytes())
	}
	v := s.GetValidationContext()
	if ca := v.GetTrustedCa(); ca != nil {
		whose, err := owner(ca.GetInlineBytes())
		return "plain " + whose, err
	}
	var c tlsv3.SPIFFECertValidatorConfig
	if err := v.GetCustomValidatorConfig().GetTypedConfig().UnmarshalTo(&c); err != nil {
		return "", err
	}
	var all []string
	for _, td := range c.TrustDomains {
		whose, err := owner(td.GetTrustBundle().GetInlineBytes())
		if err != nil {
			return "", err
		}
		all = append(all, td.Name+" "+whose)
	}
	return strings.Join(all, ", "), nil
}

func owner(text []byte) (string, error) {
	block, _ := pem.Decode(text)
	if block == nil {
		return "", fmt.Errorf("no certificate in %q", text)
	}
	c, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		return "", err
	}
	if len(c.URIs) == 0 {
		return c.Subject.CommonName, nil
	}
	return c.URIs[0].String(), nil
}
