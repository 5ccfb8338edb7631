package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/rsa"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

func newFetch(out *output) *cobra.Command {
	var e endpoints
	cmd := newGroup("fetch", "Fetch identities of this process from the Workload API",
		newFetchX509(out, &e), newFetchJWT(out, &e), newFetchBundle(out, &e), newFetchWIT(out, &e))
	cmd.Long = `Fetches what the Workload API gives to this very process: the deputy command, as
started by this user in this cgroup. Another program may get something else.`
	e.flags(cmd)
	return cmd
}

func newFetchX509(out *output, e *endpoints) *cobra.Command {
	var dir string
	var c choice
	cmd := &cobra.Command{
		Use:   "x509",
		Short: "Fetch X.509-SVIDs with their keys and bundles",
		Example: `  deputy fetch x509
  deputy fetch x509 --write /run/agent    # svid.0.pem, svid.0.key, bundle.0.pem`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := named(cmd, "write", "spiffe-id", "hint"); err != nil {
				return err
			}
			if err := c.check(); err != nil {
				return err
			}
			resp, err := first(cmd.Context(), e, fetchX509)
			if err != nil {
				return err
			}
			if err := c.of(resp); err != nil {
				return err
			}
			if dir != "" {
				names, err := writeX509(dir, resp)
				if err != nil {
					return err
				}
				return printWritten(out, names)
			}
			return printX509(out, resp)
		},
	}
	cmd.Flags().StringVar(&dir, "write", "", "write the files to this `directory`, keys with mode 0600")
	c.flags(cmd)
	return cmd
}

func newFetchJWT(out *output, e *endpoints) *cobra.Command {
	var dir, id string
	var audience []string
	cmd := &cobra.Command{
		Use:   "jwt --audience A",
		Short: "Fetch JWT-SVIDs",
		Long: `Fetches a JWT-SVID for each identity of this process and prints the tokens, one a
line, the default identity's first.`,
		Example: `  deputy fetch jwt --audience https://api.example.org
  deputy fetch jwt --audience a --spiffe-id spiffe://example.org/agent/x`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if len(audience) == 0 {
				return usage(errors.New("fetch jwt needs an --audience"))
			}
			if err := named(cmd, "audience", "write", "spiffe-id"); err != nil {
				return err
			}
			if err := checkID(id); err != nil {
				return err
			}
			var resp *workload.JWTSVIDResponse
			err := e.within(cmd.Context(), e.workload, func(ctx context.Context, c *client) (err error) {
				resp, err = workload.NewSpiffeWorkloadAPIClient(c).FetchJWTSVID(ctx,
					&workload.JWTSVIDRequest{Audience: audience, SpiffeId: id})
				return err
			})
			if err != nil {
				return err
			}
			if dir != "" {
				names, err := writeJWT(dir, resp)
				if err != nil {
					return err
				}
				return printWritten(out, names)
			}
			if out.json() {
				return out.message(resp)
			}
			for _, s := range resp.Svids {
				if _, err := fmt.Fprintln(out.w, s.Svid); err != nil {
					return err
				}
			}
			return nil
		},
	}
	cmd.Flags().StringArrayVar(&audience, "audience", nil, "`audience` of the token; may be repeated")
	cmd.Flags().StringVar(&id, "spiffe-id", "", "only the SVID with this `ID`")
	cmd.Flags().StringVar(&dir, "write", "", "write jwt_svid.N.token to this `directory`, with mode 0600")
	return cmd
}

func newFetchBundle(out *output, e *endpoints) *cobra.Command {
	var dir string
	cmd := &cobra.Command{
		Use:   "bundle",
		Short: "Fetch the X.509 bundles that this process verifies others with",
		Example: `  deputy fetch bundle
  deputy fetch bundle --write /run/agent    # bundle.0.pem, federated_bundle.0.0.pem`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := named(cmd, "write"); err != nil {
				return err
			}
			resp, err := first(cmd.Context(), e, fetchBundles)
			if err != nil {
				return err
			}
			if dir != "" {
				// Which of the bundles is our own only an SVID says.
				svids, err := first(cmd.Context(), e, fetchX509)
				if err != nil {
					return err
				}
				names, err := writeBundles(dir, svids)
				if err != nil {
					return err
				}
				return printWritten(out, names)
			}
			return printBundles(out, resp)
		},
	}
	cmd.Flags().StringVar(&dir, "write", "", "write the files to this `directory`")
	return cmd
}

// checkID checks a SPIFFE ID that may be left out.
func checkID(id string) error {
	if id == "" {
		return nil
	}
	if _, err := spiffeid.FromString(id); err != nil {
		return usage(fmt.Errorf("--spiffe-id %q is no SPIFFE ID: %w", id, err))
	}
	return nil
}

// An opener starts a stream of the Workload API.
type opener[T any] func(context.Context, workload.SpiffeWorkloadAPIClient) (receiver[T], error)

type receiver[T any] interface{ Recv() (T, error) }

func fetchX509(ctx context.Context, c workload.SpiffeWorkloadAPIClient) (receiver[*workload.X509SVIDResponse], error) {
	return c.FetchX509SVID(ctx, &workload.X509SVIDRequest{})
}

func fetchBundles(ctx context.Context, c workload.SpiffeWorkloadAPIClient) (receiver[*workload.X509BundlesResponse], error) {
	return c.FetchX509Bundles(ctx, &workload.X509BundlesRequest{})
}

// first takes the first message of a stream.
func first[T any](ctx context.Context, e *endpoints, open opener[T]) (resp T, err error) {
	err = e.within(ctx, e.workload, func(ctx context.Context, c *client) error {
		stream, err := open(ctx, workload.NewSpiffeWorkloadAPIClient(c))
		if err != nil {
			return err
		}
		resp, err = stream.Recv()
		if errors.Is(err, io.EOF) {
			return errors.New("the daemon ended the stream without an answer")
		}
		return err
	})
	return resp, err
}

func printX509(out *output, resp *workload.X509SVIDResponse) error {
	if out.json() {
		return out.message(resp)
	}
	for i, s := range resp.Svids {
		if i > 0 {
			fmt.Fprintln(out.w)
		}
		chain, err := x509.ParseCertificates(s.X509Svid)
		if err != nil || len(chain) == 0 {
			return fmt.Errorf("parse X.509-SVID of %s: %w", s.SpiffeId, err)
		}
		authorities, err := x509.ParseCertificates(s.Bundle)
		if err != nil {
			return fmt.Errorf("parse bundle of %s: %w", s.SpiffeId, err)
		}
		if err := out.fields(
			field{"spiffe_id", s.SpiffeId},
			field{"hint", plain(s.Hint)},
			field{"serial", chain[0].SerialNumber.Text(16)},
			field{"key", keyKind(chain[0])},
			field{"dns_names", strings.Join(chain[0].DNSNames, " ")},
			field{"not_before", stamp(chain[0].NotBefore)},
			field{"expires", expiry(chain[0].NotAfter)},
			field{"chain", fmt.Sprint(len(chain))},
			field{"authorities", fmt.Sprint(len(authorities))},
			field{"federated", strings.Join(slices.Sorted(maps.Keys(resp.FederatedBundles)), " ")},
		); err != nil {
			return err
		}
	}
	return nil
}

func printBundles(out *output, resp *workload.X509BundlesResponse) error {
	if out.json() {
		return out.message(resp)
	}
	for _, id := range slices.Sorted(maps.Keys(resp.Bundles)) {
		text, err := certificates(resp.Bundles[id])
		if err != nil {
			return fmt.Errorf("parse bundle of %s: %w", id, err)
		}
		if _, err := fmt.Fprintf(out.w, "# %s\n%s", id, text); err != nil {
			return err
		}
	}
	return nil
}

func printWritten(out *output, names []string) error {
	if out.json() {
		return out.value(map[string][]string{"written": names})
	}
	for _, name := range names {
		if _, err := fmt.Fprintln(out.w, name); err != nil {
			return err
		}
	}
	return nil
}

// certificates turns concatenated DER into PEM.
func certificates(der []byte) ([]byte, error) {
	certs, err := x509.ParseCertificates(der)
	if err != nil {
		return nil, err
	}
	var text []byte
	for _, c := range certs {
		text = append(text, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw})...)
	}
	return text, nil
}

func keyKind(c *x509.Certificate) string {
	switch k := c.PublicKey.(type) {
	case *ecdsa.PublicKey:
		return "ec-" + strings.ToLower(strings.ReplaceAll(k.Params().Name, "-", ""))
	case *rsa.PublicKey:
		return fmt.Sprintf("rsa-%d", k.N.BitLen())
	}
	return c.PublicKeyAlgorithm.String()
}

func expiry(t time.Time) string {
	return fmt.Sprintf("%s (in %s)", stamp(t), time.Until(t).Round(time.Second))
}
