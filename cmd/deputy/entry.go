package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"

	"github.com/spf13/cobra"
	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	adminv1 "github.com/deputy-id/deputy/proto/deputy/admin/v1"
)

func newEntry(out *output) *cobra.Command {
	var e endpoints
	cmd := newGroup("entry", "Manage the entries that map selectors to SPIFFE IDs",
		newEntryCreate(out, &e), newEntryList(out, &e), newEntryShow(out, &e), newEntryUpdate(out, &e), newEntryDelete(out, &e))
	cmd.Long = `Manages entries over the admin socket. Those of the configuration file are listed
too, but change only with the file.`
	e.flags(cmd)
	return cmd
}

func newEntryCreate(out *output, e *endpoints) *cobra.Command {
	var f entryFlags
	cmd := &cobra.Command{
		Use:   "create PATH",
		Short: "Create an entry",
		Long: `Creates an entry: a process that has all of the selectors is entitled to the
SPIFFE ID. PATH is the path of the ID ("/agent/x", "/user/{{unix.user}}"), or the
full ID.`,
		Example: `  sudo deputy entry create /agent/researcher --selector cgroup:unit:researcher.service --selector process:leader:true`,
		Args:    cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			// An entry without audiences may have any.
			if err := named(cmd, "audience", "dns-name", "federates-with", "hint"); err != nil {
				return err
			}
			id, err := parseID(args[0])
			if err != nil {
				return err
			}
			entry := &adminv1.Entry{Entry: &types.Entry{SpiffeId: id}}
			if err := f.apply(cmd.Flags(), entry); err != nil {
				return err
			}
			if len(entry.Entry.Selectors) == 0 {
				return usage(errors.New("entry create needs a --selector"))
			}
			return e.withAdmin(cmd.Context(), func(ctx context.Context, c adminClient) error {
				if err := c.complete(ctx, id); err != nil {
					return err
				}
				resp, err := c.CreateEntry(ctx, &adminv1.CreateEntryRequest{Entry: entry})
				if err != nil {
					return err
				}
				c.noteBundleless(ctx, cmd.ErrOrStderr(), resp.Entry)
				f.noteTTLs(cmd.ErrOrStderr(), cmd.Flags(), resp.LongestTtl)
				return printEntry(out, resp.Entry)
			})
		},
	}
	f.add(cmd.Flags())
	return cmd
}

func newEntryList(out *output, e *endpoints) *cobra.Command {
	var selectors []string
	var id string
	cmd := &cobra.Command{
		Use:   "list",
		Short: "List entries",
		Example: `  sudo deputy entry list
  sudo deputy entry list --selector unix:uid:1000`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := named(cmd, "spiffe-id"); err != nil {
				return err
			}
			wanted, err := parseSelectors(selectors)
			if err != nil {
				return err
			}
			return e.withAdmin(cmd.Context(), func(ctx context.Context, c adminClient) error {
				if id != "" {
					full, err := parseID(id)
					if err != nil {
						return err
					}
					if err := c.complete(ctx, full); err != nil {
						return err
					}
					id = idText(full)
				}
				resp, err := c.ListEntries(ctx, &adminv1.ListEntriesRequest{Selectors: wanted, SpiffeId: id})
				if err != nil {
					return err
				}
				return printEntries(out, resp.Entries)
			})
		},
	}
	cmd.Flags().StringArrayVar(&selectors, "selector", nil, "only entries that have this `selector`; may be repeated")
	cmd.Flags().StringVar(&id, "spiffe-id", "", "only entries with this SPIFFE `ID` or path")
	return cmd
}

func newEntryShow(out *output, e *endpoints) *cobra.Command {
	return &cobra.Command{
		Use:     "show ID",
		Short:   "Show an entry",
		Example: "  sudo deputy entry show 0f5e2b9c-6a1d-4c07-9d3e-2b8f4a6c1e70",
		Args:    cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return e.withAdmin(cmd.Context(), func(ctx context.Context, c adminClient) error {
				entry, err := oneEntry(ctx, c, args[0])
				if err != nil {
					return err
				}
				return printEntry(out, entry)
			})
		},
	}
}

func newEntryUpdate(out *output, e *endpoints) *cobra.Command {
	var f entryFlags
	var path string
	cmd := &cobra.Command{
		Use:   "update ID",
		Short: "Change an entry",
		Long: `Changes what is named by flags and leaves the rest. A flag that may be repeated
replaces all of its values; with an empty value it removes them.`,
		Example: `  sudo deputy entry update 0f5e2b9c-6a1d-4c07-9d3e-2b8f4a6c1e70 --x509-ttl 30m --dns-name ''`,
		Args:    cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return e.withAdmin(cmd.Context(), func(ctx context.Context, c adminClient) error {
				entry, err := oneEntry(ctx, c, args[0])
				if err != nil {
					return err
				}
				if cmd.Flags().Changed("spiffe-id") {
					if entry.Entry.SpiffeId, err = parseID(path); err != nil {
						return err
					}
					if err := c.complete(ctx, entry.Entry.SpiffeId); err != nil {
						return err
					}
				}
				if err := f.apply(cmd.Flags(), entry); err != nil {
					return err
				}
				resp, err := c.UpdateEntry(ctx, &adminv1.UpdateEntryRequest{Entry: entry})
				if err != nil {
					return err
				}
				c.noteBundleless(ctx, cmd.ErrOrStderr(), resp.Entry)
				f.noteTTLs(cmd.ErrOrStderr(), cmd.Flags(), resp.LongestTtl)
				return printEntry(out, resp.Entry)
			})
		},
	}
	f.add(cmd.Flags())
	cmd.Flags().StringVar(&path, "spiffe-id", "", "another `path` or SPIFFE ID")
	return cmd
}

func newEntryDelete(out *output, e *endpoints) *cobra.Command {
	return &cobra.Command{
		Use:   "delete ID...",
		Short: "Delete entries",
		Long: `Deletes entries. Streams of processes that were entitled by them go on with what
is left, or end. SVIDs that were handed out live until they expire.`,
		Example: "  sudo deputy entry delete 0f5e2b9c-6a1d-4c07-9d3e-2b8f4a6c1e70",
		Args:    cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			var resp *entryv1.BatchDeleteEntryResponse
			err := e.within(cmd.Context(), e.operator, func(ctx context.Context, c *client) (err error) {
				resp, err = entryv1.NewEntryClient(c).BatchDeleteEntry(ctx, &entryv1.BatchDeleteEntryRequest{Ids: args})
				return err
			})
			if err != nil {
				return err
			}
			deleted := []string{}
			var failed []error
			for _, r := range resp.Results {
				if r.Status.GetCode() == int32(codes.OK) {
					deleted = append(deleted, r.Id)
					continue
				}
				failed = append(failed, fmt.Errorf("delete entry %s: %s", r.Id, message(statusError(r.Status))))
			}
			if out.json() {
				err = out.value(map[string][]string{"deleted": deleted})
			} else {
				for _, id := range deleted {
					if _, err = fmt.Fprintln(out.w, id); err != nil {
						break
					}
				}
			}
			return errors.Join(append(failed, err)...)
		},
	}
}

// withAdmin makes calls to the admin service.
func (e *endpoints) withAdmin(ctx context.Context, call func(context.Context, adminClient) error) error {
	return e.within(ctx, e.operator, func(ctx context.Context, c *client) error {
		return call(ctx, adminClient{adminv1.NewAdminClient(c), bundlev1.NewBundleClient(c), adminv1.NewFederationClient(c)})
	})
}

// An adminClient calls the admin service, and knows the daemon's trust domain.
type adminClient struct {
	adminv1.AdminClient
	bundles    bundlev1.BundleClient
	federation adminv1.FederationClient
}

// noteBundleless warns of an entry that federates with a trust domain whose
// bundle nobody brings. It is taken all the same: the bundle may come later.
func (c adminClient) noteBundleless(ctx context.Context, notes io.Writer, entry *adminv1.Entry) {
	if len(entry.Entry.FederatesWith) == 0 {
		return
	}
	all, err := c.federation.ListRelationships(ctx, &adminv1.ListRelationshipsRequest{})
	if err != nil {
		return // the entry is there, which is what was asked for
	}
	for _, name := range entry.Entry.FederatesWith {
		if slices.ContainsFunc(all.Relationships, func(r *adminv1.Relationship) bool { return r.Relationship.TrustDomain == name }) {
			continue
		}
		_, err := c.bundles.GetFederatedBundle(ctx, &bundlev1.GetFederatedBundleRequest{TrustDomain: name, OutputMask: &types.BundleMask{}})
		if code(err) == codes.NotFound {
			fmt.Fprintf(notes, "deputy: warning: nothing brings the bundle of %s: the daemon does not follow it, so it must be set by hand (deputy bundle set %[1]s)\n", name)
		}
	}
}

// complete makes a path an ID of the daemon's own trust domain.
func (c adminClient) complete(ctx context.Context, id *types.SPIFFEID) error {
	if id.TrustDomain != "" {
		return nil
	}
	own, err := c.bundles.GetBundle(ctx, &bundlev1.GetBundleRequest{OutputMask: &types.BundleMask{}})
	if err != nil {
		return err
	}
	id.TrustDomain = own.TrustDomain
	return nil
}

func statusError(s *types.Status) error {
	return status.Error(codes.Code(s.GetCode()), s.GetMessage())
}

func oneEntry(ctx context.Context, c adminClient, id string) (*adminv1.Entry, error) {
	if id == "" {
		return nil, usage(errors.New("an entry ID is not empty"))
	}
	resp, err := c.ListEntries(ctx, &adminv1.ListEntriesRequest{Id: id})
	if err != nil {
		return nil, fmt.Errorf("entry %s: %w", plain(id), err)
	}
	if len(resp.Entries) != 1 {
		return nil, fmt.Errorf("no entry %s", id)
	}
	return resp.Entries[0], nil
}
