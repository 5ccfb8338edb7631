package peers

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"

	"github.com/deputy-id/deputy/test/scratch"
)

// own is an entry for the processes of this test.
func own(name, more string) string {
	return fmt.Sprintf("\nentry \"/agent/%s\" {\n  selectors = [\"unix:uid:%d\"]\n%s}\n", name, os.Getuid(), more)
}

func (d *host) x509Source(t *testing.T) *workloadapi.X509Source {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	s, err := workloadapi.NewX509Source(ctx, workloadapi.WithClientOptions(workloadapi.WithAddr("unix://"+d.Workload)))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

// greet serves "hello" over mTLS to one ID and returns the address.
func greet(t *testing.T, s *workloadapi.X509Source, to spiffeid.ID) string {
	t.Helper()
	l, err := spiffetls.ListenWithMode(t.Context(), "tcp", "127.0.0.1:0", spiffetls.MTLSServerWithSource(tlsconfig.AuthorizeID(to), s))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				io.WriteString(c, "hello")
				c.Close()
			}()
		}
	}()
	return l.Addr().String()
}

// greeted calls over mTLS, and returns the peer's certificate.
func greeted(t *testing.T, s *workloadapi.X509Source, address string, by spiffeid.ID) (*x509.Certificate, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	c, err := spiffetls.DialWithMode(ctx, "tcp", address, spiffetls.MTLSClientWithSource(tlsconfig.AuthorizeID(by), s))
	if err != nil {
		return nil, err
	}
	defer c.Close()
	if text, err := io.ReadAll(c); err != nil || string(text) != "hello" {
		return nil, fmt.Errorf("read %q: %w", text, err)
	}
	return c.(interface{ ConnectionState() tls.ConnectionState }).ConnectionState().PeerCertificates[0], nil
}

// federate gives two daemons each other's bundle.
func federate(t *testing.T, a *host, nameA string, b *host, nameB string) {
	t.Helper()
	for _, d := range []struct {
		from, to *host
		name     string
	}{{a, b, nameA}, {b, a, nameB}} {
		file := scratch.Write(t, filepath.Join(t.TempDir(), "bundle.json"), d.from.Run(t, "bundle", "show", "--format", "spiffe"))
		d.to.Run(t, "bundle", "set", d.name, "--path", file)
	}
}

// Two trust domains that hold each other's bundles, by go-spiffe's sources.
func TestGoSPIFFEAcrossTrustDomains(t *testing.T) {
	here := start(t, "peers.example", own("here", "  federates_with = [\"other.example\"]\n"))
	there := start(t, "other.example", own("there", "  federates_with = [\"peers.example\"]\n"))
	federate(t, here, "peers.example", there, "other.example")
	a, b := spiffeid.RequireFromString("spiffe://peers.example/agent/here"), spiffeid.RequireFromString("spiffe://other.example/agent/there")
	mine, theirs := here.x509Source(t), there.x509Source(t)

	if _, err := greeted(t, theirs, greet(t, mine, b), a); err != nil {
		t.Errorf("mTLS across trust domains: %v", err)
	}
	if _, err := greeted(t, theirs, greet(t, mine, a), a); err == nil {
		t.Error("the server took a client with another ID")
	}
	if _, err := greeted(t, theirs, greet(t, mine, b), b); err == nil {
		t.Error("the client took a server with another ID")
	}

	// A token of one is validated by the other's daemon and by go-spiffe.
	client, err := workloadapi.New(t.Context(), workloadapi.WithAddr("unix://"+there.Workload))
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	source, err := workloadapi.NewJWTSource(t.Context(), workloadapi.WithClientOptions(workloadapi.WithAddr("unix://"+here.Workload)))
	if err != nil {
		t.Fatal(err)
	}
	defer source.Close()
	token, err := client.FetchJWTSVID(t.Context(), jwtsvid.Params{Audience: "tool"})
	if err != nil {
		t.Fatal(err)
	}
	if got, err := jwtsvid.ParseAndValidate(token.Marshal(), source, []string{"tool"}); err != nil || got.ID != b {
		t.Errorf("got %v, %v, want %s", got, err, b)
	}
	mineToo, err := workloadapi.New(t.Context(), workloadapi.WithAddr("unix://"+here.Workload))
	if err != nil {
		t.Fatal(err)
	}
	defer mineToo.Close()
	if got, err := mineToo.ValidateJWTSVID(t.Context(), token.Marshal(), "tool"); err != nil || got.ID != b {
		t.Errorf("got %v, %v, want %s", got, err, b)
	}
}

// Calls go on while SVIDs, and then the CA, rotate under an open source.
func TestGoSPIFFEThroughRotation(t *testing.T) {
	d := start(t, "peers.example", "\nauthority \"local\" { ca_ttl = \"30s\" }\n"+own("brief", "  x509_ttl = \"5s\"\n"))
	id := spiffeid.RequireFromString("spiffe://peers.example/agent/brief")
	source := d.x509Source(t)
	address := greet(t, source, id)
	serials, cas := map[string]bool{}, map[string]bool{}
	for end := time.Now().Add(45 * time.Second); len(cas) < 2; time.Sleep(200 * time.Millisecond) {
		cert, err := greeted(t, source, address, id)
		if err != nil {
			t.Fatalf("after %d SVIDs of %d CAs: %v", len(serials), len(cas), err)
		}
		serials[cert.SerialNumber.String()], cas[string(cert.AuthorityKeyId)] = true, true
		if time.Now().After(end) {
			t.Fatalf("got %d SVIDs of %d CAs, want one more CA", len(serials), len(cas))
		}
	}
	if len(serials) < 5 {
		t.Errorf("got %d SVIDs in a CA's life, want one each 2.5 s", len(serials))
	}
}
