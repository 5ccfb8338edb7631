package main

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/deputy-id/deputy/attestor"
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
			c, err := e.operator()
			if err != nil {
				return err
			}
			defer c.Close()
			ctx, cancel := e.deadline(cmd.Context())
			defer cancel()
			resp, err := entryv1.NewEntryClient(c).BatchDeleteEntry(ctx, &entryv1.BatchDeleteEntryRequest{Ids: args})
			if err != nil {
				return c.fail(err)
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
					fmt.Fprintln(out.w, id)
				}
			}
			return errors.Join(append(failed, err)...)
		},
	}
}

// withAdmin makes calls to the admin service.
func (e *endpoints) withAdmin(ctx context.Context, call func(context.Context, adminClient) error) error {
	c, err := e.operator()
	if err != nil {
		return err
	}
	defer c.Close()
	ctx, cancel := e.deadline(ctx)
	defer cancel()
	return c.fail(call(ctx, adminClient{adminv1.NewAdminClient(c), bundlev1.NewBundleClient(c)}))
}

// An adminClient calls the admin service, and knows the daemon's trust domain.
type adminClient struct {
	adminv1.AdminClient
	bundles bundlev1.BundleClient
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
		return nil, err
	}
	if len(resp.Entries) != 1 {
		return nil, fmt.Errorf("no entry %s", id)
	}
	return resp.Entries[0], nil
}

// entryFlags are the fields of an entry as flags.
type entryFlags struct {
	selectors, dnsNames, federatesWith, audiences []string
	x509TTL, jwtTTL                               time.Duration
	hint                                          string
	instance, allowTraced, jwtFresh               bool
}

func (f *entryFlags) add(flags *pflag.FlagSet) {
	flags.StringArrayVar(&f.selectors, "selector", nil, "`selector` that a process must have; may be repeated")
	flags.DurationVar(&f.x509TTL, "x509-ttl", 0, "life of X.509-SVIDs, whole seconds (0s: the daemon's default)")
	flags.DurationVar(&f.jwtTTL, "jwt-ttl", 0, "life of JWT-SVIDs, whole seconds (0s: the daemon's default)")
	flags.StringArrayVar(&f.dnsNames, "dns-name", nil, "DNS `name` of the X.509-SVID; may be repeated")
	flags.StringVar(&f.hint, "hint", "", "a `word` that tells the process what the identity is for")
	flags.StringArrayVar(&f.federatesWith, "federates-with", nil, "`trust domain` whose bundle the process gets; may be repeated")
	flags.StringArrayVar(&f.audiences, "audience", nil, "the only `audience` that JWT-SVIDs may have; may be repeated")
	flags.BoolVar(&f.instance, "instance", false, "append an ID of the process, so that each run is a principal of its own")
	flags.BoolVar(&f.allowTraced, "allow-traced", false, "serve a process that is being traced")
	flags.BoolVar(&f.jwtFresh, "jwt-fresh", false, "make a new JWT-SVID for each request")
}

// apply sets the fields whose flags were given.
func (f *entryFlags) apply(flags *pflag.FlagSet, e *adminv1.Entry) (err error) {
	seconds := func(name string, d time.Duration, to *int32) {
		if !flags.Changed(name) || err != nil {
			return
		}
		if d < 0 || d%time.Second != 0 || d > 1<<31*time.Second-time.Second {
			err = usage(fmt.Errorf("--%s %s is not a number of whole seconds", name, d))
			return
		}
		*to = int32(d / time.Second)
	}
	list := func(name string, values []string, to *[]string) {
		if !flags.Changed(name) {
			return
		}
		*to = nil
		for _, v := range values {
			if v != "" {
				*to = append(*to, v)
			}
		}
	}
	flag := func(name string, value bool, to *bool) {
		if flags.Changed(name) {
			*to = value
		}
	}
	if flags.Changed("selector") {
		if e.Entry.Selectors, err = parseSelectors(f.selectors); err != nil {
			return err
		}
	}
	seconds("x509-ttl", f.x509TTL, &e.Entry.X509SvidTtl)
	seconds("jwt-ttl", f.jwtTTL, &e.Entry.JwtSvidTtl)
	list("dns-name", f.dnsNames, &e.Entry.DnsNames)
	list("federates-with", f.federatesWith, &e.Entry.FederatesWith)
	list("audience", f.audiences, &e.Audiences)
	flag("instance", f.instance, &e.Instance)
	flag("allow-traced", f.allowTraced, &e.AllowTraced)
	if flags.Changed("hint") {
		e.Entry.Hint = f.hint
	}
	if flags.Changed("jwt-fresh") {
		if e.Entry.AdditionalAttributes == nil {
			e.Entry.AdditionalAttributes = &types.Entry_AdditionalAttributes{}
		}
		e.Entry.AdditionalAttributes.JwtSvidIncludeJti = f.jwtFresh
	}
	return err
}

func parseSelectors(texts []string) ([]*types.Selector, error) {
	var selectors []*types.Selector
	for _, text := range texts {
		s, err := attestor.ParseSelector(text)
		if err != nil {
			return nil, usage(err)
		}
		selectors = append(selectors, &types.Selector{Type: s.Type, Value: s.Value})
	}
	return selectors, nil
}

// parseID reads a path, which stands for an ID of the daemon's own trust
// domain, or a full ID; either may be a template. What a path may be is the
// daemon's to say.
func parseID(s string) (*types.SPIFFEID, error) {
	if strings.HasPrefix(s, "/") {
		return &types.SPIFFEID{Path: s}, nil
	}
	rest, ok := strings.CutPrefix(s, "spiffe://")
	at := strings.IndexByte(rest, '/')
	if !ok || at < 1 {
		return nil, usage(fmt.Errorf("%q is neither a path that begins with / nor a SPIFFE ID with a path", s))
	}
	return &types.SPIFFEID{TrustDomain: rest[:at], Path: rest[at:]}, nil
}

// An entryView is an entry under the configuration's keys.
type entryView struct {
	ID            string   `json:"id"`
	SPIFFEID      string   `json:"spiffe_id"`
	ParentID      string   `json:"parent_id"`
	Selectors     []string `json:"selectors"`
	X509TTL       string   `json:"x509_ttl,omitempty"`
	JWTTTL        string   `json:"jwt_ttl,omitempty"`
	DNSNames      []string `json:"dns_names,omitempty"`
	Hint          string   `json:"hint,omitempty"`
	FederatesWith []string `json:"federates_with,omitempty"`
	Audiences     []string `json:"audiences,omitempty"`
	Instance      bool     `json:"instance"`
	AllowTraced   bool     `json:"allow_traced"`
	JWTFresh      bool     `json:"jwt_fresh"`
	CreatedAt     string   `json:"created_at,omitempty"`
	ExpiresAt     string   `json:"expires_at,omitempty"`
	Revision      int64    `json:"revision"`
	Origin        string   `json:"origin"`
}

func viewEntry(e *adminv1.Entry) entryView {
	s := e.GetEntry()
	v := entryView{
		ID: s.GetId(), SPIFFEID: idText(s.GetSpiffeId()), ParentID: idText(s.GetParentId()), Selectors: []string{},
		DNSNames: s.GetDnsNames(), Hint: s.GetHint(), FederatesWith: s.GetFederatesWith(), Audiences: e.GetAudiences(),
		Instance: e.GetInstance(), AllowTraced: e.GetAllowTraced(), JWTFresh: s.GetAdditionalAttributes().GetJwtSvidIncludeJti(),
		Revision: s.GetRevisionNumber(), Origin: strings.ToLower(strings.TrimPrefix(e.GetOrigin().String(), "ORIGIN_")),
	}
	for _, sel := range s.GetSelectors() {
		v.Selectors = append(v.Selectors, sel.Type+":"+sel.Value)
	}
	ttl := func(seconds int32) string {
		if seconds == 0 {
			return ""
		}
		return (time.Duration(seconds) * time.Second).String()
	}
	moment := func(unix int64) string {
		if unix == 0 {
			return ""
		}
		return stamp(time.Unix(unix, 0))
	}
	v.X509TTL, v.JWTTTL = ttl(s.GetX509SvidTtl()), ttl(s.GetJwtSvidTtl())
	v.CreatedAt, v.ExpiresAt = moment(s.GetCreatedAt()), moment(s.GetExpiresAt())
	return v
}

func idText(id *types.SPIFFEID) string {
	if id == nil {
		return ""
	}
	return "spiffe://" + id.TrustDomain + id.Path
}

func printEntry(out *output, e *adminv1.Entry) error {
	v := viewEntry(e)
	if out.json() {
		return out.value(v)
	}
	mark := func(set bool) string {
		if set {
			return "true"
		}
		return ""
	}
	fields := []field{{"id", v.ID}, {"spiffe_id", v.SPIFFEID}}
	for _, s := range v.Selectors {
		fields = append(fields, field{"selector", plain(s)})
	}
	return out.fields(append(fields,
		field{"x509_ttl", v.X509TTL},
		field{"jwt_ttl", v.JWTTTL},
		field{"dns_names", strings.Join(v.DNSNames, " ")},
		field{"hint", plain(v.Hint)},
		field{"federates_with", strings.Join(v.FederatesWith, " ")},
		field{"audiences", plain(strings.Join(v.Audiences, " "))},
		field{"instance", mark(v.Instance)},
		field{"allow_traced", mark(v.AllowTraced)},
		field{"jwt_fresh", mark(v.JWTFresh)},
		field{"created_at", v.CreatedAt},
		field{"expires_at", v.ExpiresAt},
		field{"revision", fmt.Sprint(v.Revision)},
		field{"origin", v.Origin},
	)...)
}

func printEntries(out *output, entries []*adminv1.Entry) error {
	if out.json() {
		views := []entryView{}
		for _, e := range entries {
			views = append(views, viewEntry(e))
		}
		return out.value(map[string][]entryView{"entries": views})
	}
	if len(entries) == 0 {
		return nil
	}
	w := tabwriter.NewWriter(out.w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "ID\tSPIFFE ID\tSELECTORS")
	for _, e := range entries {
		v := viewEntry(e)
		fmt.Fprintf(w, "%s\t%s\t%s\n", v.ID, v.SPIFFEID, plain(strings.Join(v.Selectors, " ")))
	}
	return w.Flush()
}
