package peers

import (
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"

	"github.com/deputy-id/deputy/test/loopback"
	"github.com/deputy-id/deputy/test/need"
	"github.com/deputy-id/deputy/test/process"
	"github.com/deputy-id/deputy/test/wait"
)

// ghostunnel is built with C: at 1.8.4 it does not compile without.
var ghostunnel = sync.OnceValues(func() (string, error) {
	const module = "github.com/ghostunnel/ghostunnel"
	return buildAlone("ghostunnel", "ghostunnel", module, module)
})

// tunnels are the two command lines of the page, and where the test has put
// what they name.
type tunnels struct {
	*host
	server, client   string // command lines
	backend, between string // addresses
}

func newTunnels(t *testing.T, config string) *tunnels {
	t.Helper()
	need.Root(t, "the page's lines, which use sudo")
	binary := built(t, ghostunnel)
	lines := meshBlocks(t, "ghostunnel", "sh")
	if len(lines) != 2 {
		t.Fatalf("got %d command lines on the page, want a server's and a client's", len(lines))
	}
	d := start(t, "example.org", config)
	d.place(t, "ghostunnel", binary)
	return &tunnels{d, lines[0], lines[1], echo(t), loopback.Address(t)}
}

const publicSocket = "unix:///run/deputy/public/workload.sock"

// serve runs the page's server.
func (u *tunnels) serve(t *testing.T) *process.Process {
	t.Helper()
	r := u.asRoot(t, u.server, publicSocket, "unix://"+u.Workload, "127.0.0.1:8443", u.between, "127.0.0.1:8080", u.backend)
	u.listens(t, r, u.between)
	return r
}

// connect runs the page's client, with replacements of a test's own, and
// returns it with the address that it listens on.
func (u *tunnels) connect(t *testing.T, replace ...string) (*process.Process, string) {
	t.Helper()
	at := loopback.Address(t)
	r := u.asRoot(t, u.client, append([]string{publicSocket, "unix://" + u.Workload, "127.0.0.1:8081", at, "127.0.0.1:8443", u.between}, replace...)...)
	u.listens(t, r, at)
	return r, at
}

// listens waits for ghostunnel, which listens as soon as it has an identity.
func (u *tunnels) listens(t *testing.T, r *process.Process, address string) {
	t.Helper()
	r.Says(t, "listening for connections on "+address)
}

// echo is a service that knows nothing of TLS.
func echo(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
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
				io.Copy(c, c)
				c.Close()
			}()
		}
	}()
	return l.Addr().String()
}

// say sends a word through an open connection and wants it back.
func say(c net.Conn, word string) error {
	c.SetDeadline(time.Now().Add(10 * time.Second))
	if _, err := io.WriteString(c, word); err != nil {
		return err
	}
	got := make([]byte, len(word))
	if _, err := io.ReadFull(c, got); err != nil {
		return fmt.Errorf("after %q: %w", got, err)
	}
	if string(got) != word {
		return fmt.Errorf("got %q, want %q", got, word)
	}
	return nil
}

// echoed makes a connection, says a word on it and ends it.
func echoed(address, word string) error {
	c, err := net.Dial("tcp", address)
	if err != nil {
		return err
	}
	defer c.Close()
	return say(c, word)
}

// Two processes of one program and one user are two identities.
func TestGhostunnelOfThePage(t *testing.T) {
	t.Parallel()
	u := newTunnels(t, own("probe", ""))
	server := u.serve(t)
	_, front := u.connect(t)
	if err := echoed(front, "hello"); err != nil {
		t.Errorf("the agent's client: %v", err)
	}

	// The server answers for its own identity, and a stranger gets no further.
	conn, err := net.Dial("tcp", u.between)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	source := u.x509Source(t)
	c := tls.Client(conn, tlsconfig.MTLSClientConfig(source, source, tlsconfig.AuthorizeID(spiffeid.RequireFromString("spiffe://example.org/service/api"))))
	if err := c.HandshakeContext(t.Context()); err != nil {
		t.Errorf("the server's certificate: %v", err)
	}
	if err := say(c, "hello"); err == nil {
		t.Error("the server took go-spiffe with another ID")
	}
	const refused = "unauthorized: invalid principal"
	_, stranger := u.connect(t, "--name researcher", "--name stranger", "/agent/researcher", "/agent/stranger")
	if err := echoed(stranger, "hello"); err == nil {
		t.Error("the server took ghostunnel with another ID")
	}
	wait.Until(t, "two refusals in the server's log", func() bool { return strings.Count(server.Log(), refused) == 2 })
	client, doubter := u.connect(t, "--name researcher", "--name doubter", "--entry /agent/researcher", "--entry /agent/doubter", "/service/api", "/service/other")
	if err := echoed(doubter, "hello"); err == nil {
		t.Error("the client took a server with another ID")
	}
	client.Says(t, refused)

	if err := echoed(front, "hello"); err != nil {
		t.Errorf("the agent's client after those refused: %v", err)
	}
}

// Without --entry the process has a name and no identity, until there is one.
func TestGhostunnelWaitsForItsIdentity(t *testing.T) {
	t.Parallel()
	u := newTunnels(t, "")
	u.serve(t)
	front := loopback.Address(t)
	r := u.asRoot(t, u.client, publicSocket, "unix://"+u.Workload, "127.0.0.1:8081", front, "127.0.0.1:8443", u.between, " --entry /agent/researcher", "")
	r.Says(t, "PermissionDenied")
	u.Run(t, "entry", "create", "/agent/researcher", "--selector", "process:exec:researcher")
	u.listens(t, r, front)
	if err := echoed(front, "hello"); err != nil {
		t.Error(err)
	}
}

// Both ends follow their SVIDs, and then the CA, without a restart: no
// connection fails, and one that was made before stays.
func TestGhostunnelThroughRotation(t *testing.T) {
	t.Parallel()
	// Five seconds for what has no x509_ttl of its own, as the page's entries.
	u := newTunnels(t, "\nauthority \"local\" { ca_ttl = \"30s\" }\n")
	u.serve(t)
	_, front := u.connect(t)
	old, err := net.Dial("tcp", front)
	if err != nil {
		t.Fatal(err)
	}
	defer old.Close()
	if err := say(old, "first"); err != nil {
		t.Fatal(err)
	}

	// A server tells its certificate to all that ask. That the client's was
	// renewed, too, shows in that connections succeed long after its first ended.
	shown := func() *x509.Certificate {
		conn, err := net.Dial("tcp", u.between)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		c := tls.Client(conn, &tls.Config{InsecureSkipVerify: true})
		if err := c.HandshakeContext(t.Context()); err != nil {
			t.Fatal(err)
		}
		return c.ConnectionState().PeerCertificates[0]
	}
	first := shown()
	if left := time.Until(first.NotAfter); left > 10*time.Second {
		t.Fatalf("the first SVID lives for %s: nothing would rotate here", left)
	}
	serials, cas, made := map[string]bool{}, map[string]bool{}, 0
	for end := time.Now().Add(45 * time.Second); len(cas) < 2; time.Sleep(100 * time.Millisecond) {
		if err := echoed(front, "hello"); err != nil {
			t.Fatalf("connection %d, after %d SVIDs of %d CAs: %v", made, len(serials), len(cas), err)
		}
		made++
		cert := shown()
		serials[cert.SerialNumber.String()], cas[string(cert.AuthorityKeyId)] = true, true
		if time.Now().After(end) {
			t.Fatalf("got %d SVIDs of %d CAs, want one more CA", len(serials), len(cas))
		}
	}
	if len(serials) < 3 || time.Now().Before(first.NotAfter) {
		t.Errorf("got %d SVIDs of the server, want one each 2.5 s", len(serials))
	}
	if err := say(old, "last"); err != nil {
		t.Errorf("the connection from before: %v", err)
	}
}
