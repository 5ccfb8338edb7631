// Command agent is a workload for tests: a static program that fits into an
// image of its own, waits, and fetches its identity with go-spiffe from the
// socket that SPIFFE_ENDPOINT_SOCKET names. It prints JSON, a value a line.
package main

import (
	"context"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"syscall"
	"time"

	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
)

const usage = `usage: agent COMMAND [ARGUMENT...]

  sleep            wait for SIGTERM
  x509             print the X.509 context once
  jwt AUDIENCE...  print JWT-SVIDs for these audiences
  watch            print each X.509 context as it comes, until SIGTERM
  unshare          become the parent of a "sleep" in a user namespace of its own
`

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	if len(os.Args) < 2 {
		fmt.Fprint(os.Stderr, usage)
		os.Exit(2)
	}
	if err := run(ctx, os.Args[1], os.Args[2:]); err != nil {
		fmt.Fprintln(os.Stderr, "agent:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, command string, args []string) error {
	switch command {
	case "sleep":
		<-ctx.Done()
		return nil
	case "x509":
		ctx, cancel := context.WithTimeout(ctx, patience)
		defer cancel()
		x, err := workloadapi.FetchX509Context(ctx)
		if err != nil {
			return err
		}
		return printX509(x)
	case "jwt":
		if len(args) == 0 {
			return errors.New("jwt: no audience")
		}
		ctx, cancel := context.WithTimeout(ctx, patience)
		defer cancel()
		svids, err := workloadapi.FetchJWTSVIDs(ctx, jwtsvid.Params{Audience: args[0], ExtraAudiences: args[1:]})
		if err != nil {
			return err
		}
		return printJWT(svids)
	case "watch":
		err := workloadapi.WatchX509Context(ctx, watcher{})
		if ctx.Err() != nil {
			return nil
		}
		return err
	case "unshare":
		return unshare(ctx)
	}
	return fmt.Errorf("no command %q", command)
}

// patience is how long a fetch may take, with the client's own retries.
const patience = 10 * time.Second

type identity struct {
	ID       string    `json:"spiffe_id"`
	Hint     string    `json:"hint,omitempty"`
	Expires  time.Time `json:"expires"`
	Serial   string    `json:"serial,omitempty"`
	DNSNames []string  `json:"dns_names,omitempty"`
	Audience []string  `json:"audience,omitempty"`
	Token    string    `json:"token,omitempty"`
}

func printX509(x *workloadapi.X509Context) error {
	var out struct {
		SVIDs   []identity          `json:"svids"`
		Bundles map[string][]string `json:"bundles"` // serial numbers by trust domain
	}
	for _, s := range x.SVIDs {
		leaf := s.Certificates[0]
		out.SVIDs = append(out.SVIDs, identity{
			ID: s.ID.String(), Hint: s.Hint, Expires: leaf.NotAfter, Serial: leaf.SerialNumber.String(), DNSNames: leaf.DNSNames,
		})
	}
	out.Bundles = make(map[string][]string)
	for _, b := range x.Bundles.Bundles() {
		out.Bundles[b.TrustDomain().Name()] = serials(b.X509Authorities())
	}
	return json.NewEncoder(os.Stdout).Encode(out)
}

func serials(certs []*x509.Certificate) []string {
	var out []string
	for _, c := range certs {
		out = append(out, c.SerialNumber.String())
	}
	return out
}

func printJWT(svids []*jwtsvid.SVID) error {
	var out struct {
		SVIDs []identity `json:"svids"`
	}
	for _, s := range svids {
		out.SVIDs = append(out.SVIDs, identity{
			ID: s.ID.String(), Hint: s.Hint, Expires: s.Expiry, Audience: s.Audience, Token: s.Marshal(),
		})
	}
	return json.NewEncoder(os.Stdout).Encode(out)
}

type watcher struct{}

func (watcher) OnX509ContextUpdate(x *workloadapi.X509Context) {
	if err := printX509(x); err != nil {
		fmt.Fprintln(os.Stderr, "agent:", err)
	}
}

func (watcher) OnX509ContextWatchError(err error) { fmt.Fprintln(os.Stderr, "agent:", err) }

// unshare starts this program once more, in a user namespace of its own where
// it is root, and waits.
func unshare(ctx context.Context) error {
	cmd := exec.CommandContext(ctx, "/proc/self/exe", "sleep")
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:  syscall.CLONE_NEWUSER,
		UidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getuid(), Size: 1}},
		GidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getgid(), Size: 1}},
	}
	err := cmd.Run()
	if ctx.Err() != nil {
		return nil
	}
	return err
}
