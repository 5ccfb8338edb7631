package main

import (
	"bytes"
	"context"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"os"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"
	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"

	"github.com/deputy-id/deputy/internal/bounded"
)

// maxBundle bounds what bundle set reads.
const maxBundle = 4 << 20

func newBundle(out *output) *cobra.Command {
	var e endpoints
	cmd := newGroup("bundle", "Manage the bundles of this and other trust domains",
		newBundleShow(out, &e), newBundleList(out, &e), newBundleSet(out, &e), newBundleDelete(out, &e))
	e.flags(cmd)
	return cmd
}

// withBundles makes calls to the bundle service.
func (e *endpoints) withBundles(ctx context.Context, call func(context.Context, bundlev1.BundleClient) error) error {
	return e.within(ctx, e.operator, func(ctx context.Context, c *client) error {
		return call(ctx, bundlev1.NewBundleClient(c))
	})
}

func newBundleShow(out *output, e *endpoints) *cobra.Command {
	var format string
	cmd := &cobra.Command{
		Use:   "show [TRUST-DOMAIN]",
		Short: "Print a bundle, by default our own",
		Example: `  sudo deputy bundle show --format spiffe > example.org.json
  sudo deputy bundle show partner.example`,
		Args: cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := checkFormat(format); err != nil {
				return err
			}
			return e.withBundles(cmd.Context(), func(ctx context.Context, c bundlev1.BundleClient) error {
				b, err := c.GetBundle(ctx, &bundlev1.GetBundleRequest{})
				if err != nil {
					return err
				}
				if len(args) > 0 {
					td, err := trustDomain(args[0])
					if err != nil {
						return err
					}
					if td.Name() != b.TrustDomain {
						if b, err = c.GetFederatedBundle(ctx, &bundlev1.GetFederatedBundleRequest{TrustDomain: td.Name()}); err != nil {
							return fmt.Errorf("bundle of %s: %w", td, err)
						}
					}
				}
				return printBundle(out, b, format)
			})
		},
	}
	cmd.Flags().StringVar(&format, "format", "pem", "print in this `format`, pem (the X.509 authorities) or spiffe (all, as JSON)")
	return cmd
}

func newBundleList(out *output, e *endpoints) *cobra.Command {
	return &cobra.Command{
		Use:     "list",
		Short:   "List the bundles of other trust domains",
		Example: "  sudo deputy bundle list",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return e.withBundles(cmd.Context(), func(ctx context.Context, c bundlev1.BundleClient) error {
				all := &bundlev1.ListFederatedBundlesResponse{}
				for req := (&bundlev1.ListFederatedBundlesRequest{PageSize: 500}); ; {
					resp, err := c.ListFederatedBundles(ctx, req)
					if err != nil {
						return err
					}
					all.Bundles = append(all.Bundles, resp.Bundles...)
					if resp.NextPageToken == "" {
						break
					}
					req.PageToken = resp.NextPageToken
				}
				if out.json() {
					return out.message(all)
				}
				if len(all.Bundles) == 0 {
					return nil
				}
				w := tabwriter.NewWriter(out.w, 0, 0, 2, ' ', 0)
				fmt.Fprintln(w, "TRUST DOMAIN\tX.509 AUTHORITIES\tJWT AUTHORITIES")
				for _, b := range all.Bundles {
					fmt.Fprintf(w, "%s\t%d\t%d\n", b.TrustDomain, len(b.X509Authorities), len(b.JwtAuthorities))
				}
				return w.Flush()
			})
		},
	}
}

func newBundleSet(out *output, e *endpoints) *cobra.Command {
	var format, path string
	cmd := &cobra.Command{
		Use:   "set TRUST-DOMAIN",
		Short: "Set the bundle of another trust domain, read from standard input",
		Example: `  sudo deputy bundle set partner.example < partner.json
  sudo deputy bundle set partner.example --path partner.pem`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			td, err := trustDomain(args[0])
			if err != nil {
				return err
			}
			if err := named(cmd, "format", "path"); err != nil {
				return err
			}
			if format != "" {
				if err := checkFormat(format); err != nil {
					return err
				}
			}
			in := cmd.InOrStdin()
			if path != "" {
				f, err := os.Open(path)
				if err != nil {
					return err
				}
				defer f.Close()
				in = f
			}
			data, err := bounded.Read(in, maxBundle)
			if err != nil {
				return fmt.Errorf("read bundle: %w", err)
			}
			b, err := parseBundle(td, data, format)
			if err != nil {
				return err
			}
			return e.withBundles(cmd.Context(), func(ctx context.Context, c bundlev1.BundleClient) error {
				resp, err := c.BatchSetFederatedBundle(ctx, &bundlev1.BatchSetFederatedBundleRequest{Bundle: []*types.Bundle{b}})
				if err != nil {
					return err
				}
				for _, r := range resp.Results {
					if r.Status.GetCode() != int32(codes.OK) {
						return fmt.Errorf("set bundle of %s: %w", td, statusError(r.Status))
					}
					if out.json() {
						return out.message(r.Bundle)
					}
				}
				_, err = fmt.Fprintln(out.w, td.Name())
				return err
			})
		},
	}
	cmd.Flags().StringVar(&format, "format", "", "read this `format`, pem or spiffe; by default what the content looks like")
	cmd.Flags().StringVar(&path, "path", "", "read this `file`")
	return cmd
}

func newBundleDelete(out *output, e *endpoints) *cobra.Command {
	var dissociate bool
	cmd := &cobra.Command{
		Use:   "delete TRUST-DOMAIN",
		Short: "Delete the bundle of another trust domain",
		Long: `Deletes the bundle of another trust domain. It is refused while an entry federates
with it, unless --dissociate takes it out of those entries. Out of entries of the
configuration file only the file takes it, and out of its federation block.`,
		Example: "  sudo deputy bundle delete partner.example",
		Args:    cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			td, err := trustDomain(args[0])
			if err != nil {
				return err
			}
			req := &bundlev1.BatchDeleteFederatedBundleRequest{TrustDomains: []string{td.Name()}}
			if dissociate {
				req.Mode = bundlev1.BatchDeleteFederatedBundleRequest_DISSOCIATE
			}
			return e.withBundles(cmd.Context(), func(ctx context.Context, c bundlev1.BundleClient) error {
				resp, err := c.BatchDeleteFederatedBundle(ctx, req)
				if err != nil {
					return err
				}
				for _, r := range resp.Results {
					if r.Status.GetCode() != int32(codes.OK) {
						return fmt.Errorf("delete bundle of %s: %w", td, statusError(r.Status))
					}
				}
				if out.json() {
					return out.value(map[string][]string{"deleted": {td.Name()}})
				}
				_, err = fmt.Fprintln(out.w, td.Name())
				return err
			})
		},
	}
	cmd.Flags().BoolVar(&dissociate, "dissociate", false, "take the trust domain out of entries that federate with it")
	return cmd
}

func trustDomain(s string) (spiffeid.TrustDomain, error) {
	td, err := spiffeid.TrustDomainFromString(s)
	if err != nil {
		return td, usage(fmt.Errorf("%q is no trust domain: %w", s, err))
	}
	return td, nil
}

func checkFormat(format string) error {
	if format != "pem" && format != "spiffe" {
		return usage(fmt.Errorf("--format is pem or spiffe, not %q", format))
	}
	return nil
}

func printBundle(out *output, b *types.Bundle, format string) error {
	if out.json() {
		return out.message(b)
	}
	if format == "pem" {
		for _, a := range b.X509Authorities {
			if err := pem.Encode(out.w, &pem.Block{Type: "CERTIFICATE", Bytes: a.Asn1}); err != nil {
				return err
			}
		}
		return nil
	}
	standard, err := standardBundle(b)
	if err != nil {
		return err
	}
	text, err := standard.Marshal()
	if err != nil {
		return err
	}
	var tidy bytes.Buffer
	if err := json.Indent(&tidy, text, "", "  "); err != nil {
		return err
	}
	_, err = fmt.Fprintf(out.w, "%s\n", &tidy)
	return err
}

// standardBundle turns SPIRE's message into the SPIFFE bundle that it stands for.
func standardBundle(b *types.Bundle) (*spiffebundle.Bundle, error) {
	td, err := spiffeid.TrustDomainFromString(b.TrustDomain)
	if err != nil {
		return nil, err
	}
	out := spiffebundle.New(td)
	out.SetSequenceNumber(b.SequenceNumber)
	if b.RefreshHint > 0 {
		out.SetRefreshHint(time.Duration(b.RefreshHint) * time.Second)
	}
	for _, a := range b.X509Authorities {
		certs, err := x509.ParseCertificates(a.Asn1)
		if err != nil {
			return nil, fmt.Errorf("parse X.509 authority of %s: %w", td, err)
		}
		for _, c := range certs {
			out.AddX509Authority(c)
		}
	}
	for _, a := range b.JwtAuthorities {
		key, err := x509.ParsePKIXPublicKey(a.PublicKey)
		if err != nil {
			return nil, fmt.Errorf("parse JWT authority %q of %s: %w", a.KeyId, td, err)
		}
		if err := out.AddJWTAuthority(a.KeyId, key); err != nil {
			return nil, err
		}
	}
	for _, a := range b.WitAuthorities {
		key, err := x509.ParsePKIXPublicKey(a.PublicKey)
		if err != nil {
			return nil, fmt.Errorf("parse WIT authority %q of %s: %w", a.KeyId, td, err)
		}
		if err := out.AddWITAuthority(a.KeyId, key); err != nil {
			return nil, err
		}
	}
	return out, nil
}

// parseBundle reads a bundle as PEM or SPIFFE JSON; without a format it looks.
func parseBundle(td spiffeid.TrustDomain, data []byte, format string) (*types.Bundle, error) {
	if format == "" {
		format = "pem"
		if bytes.HasPrefix(bytes.TrimSpace(data), []byte("{")) {
			format = "spiffe"
		}
	}
	var b *spiffebundle.Bundle
	if format == "spiffe" {
		parsed, err := spiffebundle.Parse(td, data)
		if err != nil {
			return nil, err
		}
		b = parsed
	} else {
		b = spiffebundle.New(td)
		for rest := data; ; {
			var block *pem.Block
			if block, rest = pem.Decode(rest); block == nil {
				break
			}
			if block.Type != "CERTIFICATE" {
				return nil, fmt.Errorf("parse bundle of %s: a PEM block of type %q is no certificate", td, plain(block.Type))
			}
			cert, err := x509.ParseCertificate(block.Bytes)
			if err != nil {
				return nil, fmt.Errorf("parse bundle of %s: %w", td, err)
			}
			b.AddX509Authority(cert)
		}
	}
	if b.Empty() {
		return nil, fmt.Errorf("parse bundle of %s: %w", td, errors.New("no authority in it"))
	}
	return wireBundle(b)
}

func wireBundle(b *spiffebundle.Bundle) (*types.Bundle, error) {
	out := &types.Bundle{TrustDomain: b.TrustDomain().Name()}
	if n, ok := b.SequenceNumber(); ok {
		out.SequenceNumber = n
	}
	if d, ok := b.RefreshHint(); ok {
		out.RefreshHint = int64(d.Seconds())
	}
	for _, c := range b.X509Authorities() {
		out.X509Authorities = append(out.X509Authorities, &types.X509Certificate{Asn1: c.Raw})
	}
	for id, key := range b.JWTAuthorities() {
		der, err := x509.MarshalPKIXPublicKey(key)
		if err != nil {
			return nil, fmt.Errorf("encode JWT authority %q of %s: %w", id, b.TrustDomain(), err)
		}
		out.JwtAuthorities = append(out.JwtAuthorities, &types.JWTKey{KeyId: id, PublicKey: der})
	}
	for id, key := range b.WITAuthorities() {
		der, err := x509.MarshalPKIXPublicKey(key)
		if err != nil {
			return nil, fmt.Errorf("encode WIT authority %q of %s: %w", id, b.TrustDomain(), err)
		}
		out.WitAuthorities = append(out.WitAuthorities, &types.WITKey{KeyId: id, PublicKey: der})
	}
	return out, nil
}
