package main

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"slices"
	"text/tabwriter"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/spf13/cobra"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	trustdomainv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/trustdomain/v1"

	"github.com/deputy-id/deputy/conf"
	"github.com/deputy-id/deputy/internal/owned"
	adminv1 "github.com/deputy-id/deputy/proto/deputy/admin/v1"
	"github.com/deputy-id/deputy/svid"
	"github.com/deputy-id/deputy/svid/federation"
	"github.com/deputy-id/deputy/svid/local"
	"github.com/deputy-id/deputy/svid/registry"
)

// readFederation reads the bootstrap bundles and sets the relationships.
func (s *settings) readFederation() (problems conf.Problems) {
	if s.Federation == nil {
		return nil
	}
	for _, w := range s.Federation.FederatesWith {
		r := federation.Relationship{
			TrustDomain: w.TrustDomain.Value,
			URL:         w.URL.Value,
			EndpointID:  w.EndpointID.Value,
			Roots:       w.CAFile.Value,
		}
		if err := r.CheckRoots(); err != nil {
			problems.Add(w.CAFile.Range, "ca_file: %s", err)
			continue
		}
		if path := w.BootstrapBundle; path.Value != "" {
			b, err := readBootstrap(r, s.TrustDomain.Value, path.Value)
			if err != nil {
				problems.Add(path.Range, "bootstrap_bundle: %s", err)
				continue
			}
			r.Bootstrap = b
		}
		s.relationships = append(s.relationships, r)
	}
	return problems
}

// bundleless warns of entries that federate with a trust domain whose bundle
// nobody brings: no block follows it, and it is not here by hand.
func (s *settings) bundleless(here func(spiffeid.TrustDomain) bool) (warnings conf.Problems) {
	if s.Config == nil {
		return nil // nothing could be read
	}
	for _, e := range s.Entries {
		for _, td := range e.FederatesWith {
			followed := s.Federation != nil && slices.ContainsFunc(s.Federation.FederatesWith, func(w conf.FederatesWith) bool {
				return w.TrustDomain.Value == td.Value
			})
			if !followed && !here(td.Value) {
				warnings.Add(td.Range, "nothing brings the bundle of %s: federation has no block for it, so it must be set by hand (deputy bundle set %[1]s)", td.Value.Name())
			}
		}
	}
	return warnings
}

// readBootstrap reads the file that says whom to trust at first: whoever may
// write it is that trust domain. One that shows by itself to be our own is
// refused here, where it can be said in which line; the authority also knows
// our keys.
func readBootstrap(r federation.Relationship, own spiffeid.TrustDomain, path string) (*svid.Bundle, error) {
	data, err := owned.ReadFile(path, maxBundle)
	if err != nil {
		return nil, err
	}
	if bytes.HasPrefix(bytes.TrimSpace(data), []byte("-----BEGIN")) {
		return nil, fmt.Errorf("%s is PEM, and a SPIFFE bundle is wanted, as deputy bundle show --format spiffe prints it", path)
	}
	b, err := svid.ParseBundle(r.TrustDomain, data)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	if len(b.X509Authorities) == 0 {
		return nil, fmt.Errorf("%s has no X.509 authority, which the endpoint could be verified with", path)
	}
	if err := b.CheckForeign(&svid.Bundle{TrustDomain: own}); err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return b, nil
}

// bundleEndpoint serves our bundle to other trust domains.
type bundleEndpoint struct {
	*federation.Endpoint
	listener net.Listener
	self     *svid.Self // nil for https_web
}

// listenBundle returns what serves our bundle, nil where that is not configured.
func listenBundle(c *conf.Config, a *local.Authority, log hclog.Logger) (_ *bundleEndpoint, err error) {
	if c.Federation == nil || c.Federation.Endpoint == nil {
		return nil, nil
	}
	e := c.Federation.Endpoint
	b := &bundleEndpoint{}
	var certificate func(*tls.ClientHelloInfo) (*tls.Certificate, error)
	if e.Profile.Value == conf.SPIFFE {
		b.self = svid.NewSelf(a.Node(), registry.NodeID(c.TrustDomain.Value), log)
		certificate = tlsconfig.GetCertificate(b.self)
	} else {
		pair, err := openPair(e.CertFile, e.KeyFile, "the bundle endpoint", log)
		if err != nil {
			return nil, fmt.Errorf("bundle_endpoint: %w", err)
		}
		certificate = pair.GetCertificate
	}
	if b.listener, err = net.Listen("tcp", e.Address.Value); err != nil {
		return nil, fmt.Errorf("bundle_endpoint: %w", errors.Join(err, b.Close()))
	}
	b.Endpoint = federation.NewEndpoint(a, certificate, log)
	log.Info("serving the bundle", "address", b.listener.Addr().String(), "profile", e.Profile.Value)
	return b, nil
}

func (b *bundleEndpoint) run(ctx context.Context) error { return b.Serve(ctx, b.listener) }

// Close gives up the listener, which Serve may have closed, and the key.
func (b *bundleEndpoint) Close() error {
	var errs []error
	if b.listener != nil {
		errs = append(errs, closing(b.listener)())
	}
	if b.self != nil {
		errs = append(errs, b.self.Close())
	}
	return errors.Join(errs...)
}

// refreshHint is the configured one, 0 where the authority is to choose.
func refreshHint(c *conf.Config) time.Duration {
	if c.Federation == nil || c.Federation.Endpoint == nil {
		return 0
	}
	return c.Federation.Endpoint.RefreshHint.Value
}

// endpointValues are for needRestart.
func endpointValues(c *conf.Config) []string {
	if c.Federation == nil || c.Federation.Endpoint == nil {
		return nil
	}
	e := c.Federation.Endpoint
	return []string{e.Address.Value, e.RefreshHint.Value.String(), string(e.Profile.Value), e.CertFile.Value, e.KeyFile.Value}
}

func newFederation(out *output) *cobra.Command {
	var e endpoints
	cmd := newGroup("federation", "Look at the trust domains whose bundles are followed", newFederationList(out, &e), newFederationRefresh(out, &e))
	e.flags(cmd)
	return cmd
}

func newFederationList(out *output, e *endpoints) *cobra.Command {
	return &cobra.Command{
		Use:   "list",
		Short: "List the trust domains that are followed, and how that goes",
		Long: `Lists the trust domains that the configuration federates with: the sequence number
of the bundle in force, when its endpoint answered last since the daemon started,
and when it is asked again. STATE is fine, failing, or stale: so often failed that
the bundle may lack keys by now. Why it failed the last time stands below.`,
		Example: "  sudo deputy federation list",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return e.within(cmd.Context(), e.operator, func(ctx context.Context, c *client) error {
				all, err := adminv1.NewFederationClient(c).ListRelationships(ctx, &adminv1.ListRelationshipsRequest{})
				if err != nil {
					return err
				}
				if out.json() {
					return printRelationships(out, all.Relationships)
				}
				if len(all.Relationships) == 0 {
					return nil
				}
				w := tabwriter.NewWriter(out.w, 0, 0, 2, ' ', 0)
				fmt.Fprintln(w, "TRUST DOMAIN\tPROFILE\tSEQUENCE\tFETCHED\tNEXT\tSTATE\tURL")
				for _, r := range all.Relationships {
					profile, sequence := "https_web", "none"
					if r.Relationship.GetHttpsSpiffe() != nil {
						profile = "https_spiffe"
					}
					if b := r.Relationship.TrustDomainBundle; b != nil {
						sequence = fmt.Sprint(b.SequenceNumber)
					}
					fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%s\t%s\n", r.Relationship.TrustDomain, profile, sequence,
						moment(r.FetchedAt, "never"), moment(r.NextAt, "now"), relationshipState(r), plain(r.Relationship.BundleEndpointUrl))
				}
				if err := w.Flush(); err != nil {
					return err
				}
				for _, r := range all.Relationships {
					if r.Error == "" {
						continue
					}
					n := int(r.Failures)
					if _, err := fmt.Fprintf(out.w, "%s: %d %s: %s\n", r.Relationship.TrustDomain, n, plural(n, "failure", "failures"), plain(r.Error)); err != nil {
						return err
					}
				}
				return nil
			})
		},
	}
}

// A relationshipView is our message, its times as everywhere else.
type relationshipView struct {
	Relationship json.RawMessage `json:"relationship"`
	FetchedAt    string          `json:"fetched_at,omitempty"`
	NextAt       string          `json:"next_at,omitempty"`
	Failures     int32           `json:"failures"`
	Error        string          `json:"error"`
	Stale        bool            `json:"stale"`
}

func printRelationships(out *output, all []*adminv1.Relationship) error {
	views := []relationshipView{}
	for _, r := range all {
		standard, err := protoJSON(r.Relationship)
		if err != nil {
			return err
		}
		views = append(views, relationshipView{standard, moment(r.FetchedAt, ""), moment(r.NextAt, ""), r.Failures, r.Error, r.Stale})
	}
	return out.value(map[string][]relationshipView{"relationships": views})
}

func moment(epoch int64, none string) string {
	if epoch == 0 {
		return none
	}
	return stamp(time.Unix(epoch, 0))
}

func relationshipState(r *adminv1.Relationship) string {
	switch {
	case r.Stale:
		return "stale"
	case r.Failures > 0:
		return "failing"
	}
	return "fine"
}

func newFederationRefresh(out *output, e *endpoints) *cobra.Command {
	return &cobra.Command{
		Use:     "refresh TRUST-DOMAIN",
		Short:   "Fetch the bundle of a trust domain now",
		Example: "  sudo deputy federation refresh partner.example",
		Args:    cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			td, err := trustDomain(args[0])
			if err != nil {
				return err
			}
			return e.within(cmd.Context(), e.operator, func(ctx context.Context, c *client) error {
				if _, err := trustdomainv1.NewTrustDomainClient(c).RefreshBundle(ctx, &trustdomainv1.RefreshBundleRequest{TrustDomain: td.Name()}); err != nil {
					return err
				}
				if out.json() {
					return out.value(map[string]string{"refreshed": td.Name()})
				}
				_, err := fmt.Fprintln(out.w, td.Name())
				return err
			})
		},
	}
}
