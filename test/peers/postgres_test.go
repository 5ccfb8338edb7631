package peers

import (
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/deputy-id/deputy/test/loopback"
	"github.com/deputy-id/deputy/test/need"
	"github.com/deputy-id/deputy/test/process"
)

// A postgres is a cluster in the place of the page's, run by its user.
type postgres struct {
	*fileHost
	bin, data string
	port      int
	*process.Process
}

// newPostgres makes a cluster with the page's lines; it does not run yet.
func newPostgres(t *testing.T) *postgres {
	t.Helper()
	h := newFileHost(t)
	found, _ := filepath.Glob("/usr/lib/postgresql/*/bin/postgres")
	p := &postgres{fileHost: h, bin: filepath.Dir(need.Program(t, append(found, "postgres")...)),
		data: h.at("/var/lib/postgresql/15/main"), port: loopback.Port(t)}
	run(t, "chown", "-R", "postgres:postgres", h.at("/var/lib/postgresql"))
	run(t, "setpriv", "--reuid=postgres", "--regid=postgres", "--init-groups",
		filepath.Join(p.bin, "initdb"), "-D", p.data, "--no-sync", "--auth=reject", "--encoding=UTF8", "--locale=C")
	for name, lines := range map[string]string{
		"postgresql.conf": fmt.Sprintf("\nlisten_addresses = '127.0.0.1'\nport = %d\nunix_socket_directories = '%s'\nfsync = off\n", p.port, p.data) + h.page(t, "postgresql.conf"),
		"pg_ident.conf":   h.page(t, "pg_ident.conf"),
		"pg_hba.conf":     "local all all trust\n" + h.page(t, "pg_hba.conf"),
	} {
		path := filepath.Join(p.data, name)
		old, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if name == "pg_hba.conf" {
			old = nil // it refuses everybody
		}
		if err := os.WriteFile(path, append(old, lines...), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return p
}

func (p *postgres) start(t *testing.T) {
	t.Helper()
	p.Process = process.Start(t, exec.Command("setpriv", "--reuid=postgres", "--regid=postgres", "--init-groups",
		filepath.Join(p.bin, "postgres"), "-D", p.data))
	p.Until(t, "PostgreSQL", func() bool {
		return exec.Command(filepath.Join(p.bin, "pg_isready"), "-q", "-h", p.data, "-p", fmt.Sprint(p.port)).Run() == nil
	})
}

// psql runs the page's script for a query, as an agent and in a role.
func (p *postgres) psql(t *testing.T, agent, role, query string, changes ...string) (string, error) {
	t.Helper()
	script := strings.NewReplacer(append(changes,
		"/reporting/", "/"+agent+"/",
		"user=reporting", "user="+role,
		"psql ", fmt.Sprintf("PGHOSTADDR=127.0.0.1 PGPORT=%d %s/psql -XAtc %q ", p.port, p.bin, query),
	)...).Replace(p.page(t, "psql.sh"))
	out, err := p.command(script).CombinedOutput()
	return strings.TrimSpace(string(out)), err
}

// certificate is what the server shows to a new connection, checked for its
// name, which begins as PostgreSQL's do.
func (p *postgres) certificate(t *testing.T) (serial string, err error) {
	t.Helper()
	conn, err := net.DialTimeout("tcp", fmt.Sprintf("127.0.0.1:%d", p.port), 10*time.Second)
	if err != nil {
		return "", err
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(10 * time.Second))
	if _, err := conn.Write([]byte{0, 0, 0, 8, 4, 210, 22, 47}); err != nil { // SSLRequest
		return "", err
	}
	var answer [1]byte
	if _, err := io.ReadFull(conn, answer[:]); err != nil || answer[0] != 'S' {
		return "", fmt.Errorf("got %q to an SSLRequest: %w", answer, err)
	}
	c := p.identity(t, "reporting")
	c.ServerName = "db.example.org"
	secured := tls.Client(conn, c)
	if err := secured.Handshake(); err != nil {
		return "", err
	}
	return secured.ConnectionState().PeerCertificates[0].SerialNumber.Text(16), nil
}

// PostgreSQL takes the page's lines: a client's SPIFFE ID makes its role, and
// the next certificates cost no connection.
func TestPostgreSQLMapsASPIFFEIDToARole(t *testing.T) {
	for name, script := range map[string]string{"keys of its user": "db.sh", "keys of its group": "db-group.sh"} {
		t.Run(name, func(t *testing.T) {
			p := newPostgres(t)
			p.watch(t, p.page(t, script), "/run/db")
			for _, agent := range []string{"reporting", "other", "amy"} {
				p.agent(t, agent)
			}
			p.start(t)
			run(t, filepath.Join(p.bin, "psql"), "-Xh", p.data, "-p", fmt.Sprint(p.port), "-U", "postgres", "-c", "CREATE ROLE reporting LOGIN", "-c", "CREATE ROLE amy LOGIN")

			const who = "SELECT current_user, client_dn FROM pg_stat_ssl WHERE pid = pg_backend_pid()"
			for agent, want := range map[string]string{
				"reporting": "reporting|/O=Deputy/UID=spiffe://example.org/agents/reporting",
				"amy":       "amy|/O=Deputy/UID=spiffe://example.org/analysts/amy",
			} {
				if got, err := p.psql(t, agent, agent, who); err != nil || got != want {
					t.Errorf("%s: got %q, %v, want %q", agent, got, err, want)
				}
			}
			// Another agent of the trust domain, or a role that is not the agent's.
			for _, c := range [][2]string{{"other", "reporting"}, {"other", "postgres"}, {"other", "other"}, {"amy", "reporting"}, {"reporting", "amy"}, {"reporting", "postgres"}} {
				if got, err := p.psql(t, c[0], c[1], who); err == nil || !strings.Contains(got, "certificate authentication failed") {
					t.Errorf("%s as %s: got %q, %v, want to be refused", c[0], c[1], got, err)
				}
			}
			if got, err := p.psql(t, "reporting", "reporting", who, "sslcert=$set/svid.0.pem sslkey=$set/svid.0.key", "sslcert=/none"); err == nil || !strings.Contains(got, "certificate") {
				t.Errorf("without a certificate: got %q, %v", got, err)
			}
			if got, err := p.psql(t, "reporting", "reporting", who, "host=db.", "host=web."); err == nil || !strings.Contains(got, "does not match host name") {
				t.Errorf("under another name: got %q, %v", got, err)
			}

			rotates(t, func() (string, error) {
				serial, err := p.certificate(t)
				if err != nil {
					return "", err
				}
				if got, failed := p.psql(t, "reporting", "reporting", "SELECT current_user"); failed != nil || got != "reporting" {
					err = errors.Join(fmt.Errorf("got %q", got), failed)
				}
				return serial, err
			})
			if log := p.Log(); strings.Contains(log, "SSL configuration was not reloaded") {
				t.Errorf("a reload failed:\n%s", log)
			}
		})
	}
}
