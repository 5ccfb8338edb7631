package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"

	"github.com/hashicorp/go-hclog"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"golang.org/x/sync/errgroup"

	"github.com/deputy-id/deputy/attestor"
	"github.com/deputy-id/deputy/attestor/peer"
	"github.com/deputy-id/deputy/conf"
	"github.com/deputy-id/deputy/endpoint"
	"github.com/deputy-id/deputy/plugins/claims"
	"github.com/deputy-id/deputy/svid"
	"github.com/deputy-id/deputy/svid/federation"
	"github.com/deputy-id/deputy/svid/local"
	"github.com/deputy-id/deputy/svid/registry"
)

// database is the file of API entries in data_dir.
const database = "entries.db"

// A daemon joins the stages of the pipeline as its settings say.
type daemon struct {
	file     string
	settings *settings // those that are in force; after the start, of the reload's goroutine
	reloads  *reloads
	log      hclog.Logger
	store    *registry.Store
	book     *claims.Rulebook
	follower *federation.Follower
	server   *endpoint.Server
	here     func(spiffeid.TrustDomain) bool // whether there is a bundle
}

func (d *daemon) warn(doubtful conf.Problems) {
	for _, w := range doubtful {
		d.log.Warn("doubtful configuration", "at", position(w), "reason", w.Reason)
	}
}

// run serves until the context ends. What it opens it closes, the last first.
func (d *daemon) run(ctx context.Context) (err error) {
	var opened []func() error
	defer func() {
		for i := len(opened) - 1; i >= 0; i-- {
			err = errors.Join(err, opened[i]())
		}
	}()
	c := d.settings.Config
	d.warn(d.settings.warnings)
	if d.reloads.blind != nil {
		d.log.Warn("configuration file is not watched, only SIGHUP reloads it", "error", d.reloads.blind)
	}

	group, err := adminGroup(c)
	if err != nil {
		return err
	}
	table, legacy, err := peer.NewTable()
	if err != nil {
		return fmt.Errorf("pin processes: %w", err)
	}
	opened = append(opened, table.Close)
	for _, l := range legacy {
		d.log.Warn("kernel is older than it could be", "instead", l)
	}

	d.book = claims.NewRulebook(d.log)
	d.book.Put(d.settings.claims)
	options := authorityOptions(c, d.log)
	options.Claims = d.book
	options.WIT = c.Experimental.WITSVID.Value
	if err := makeDataDir(c.DataDir.Value); err != nil {
		return err
	}
	authority, err := local.Open(ctx, options)
	if err != nil {
		return upstreamProblem(c, err)
	}
	opened = append(opened, authority.Close)
	d.here = func(td spiffeid.TrustDomain) bool {
		all, _ := authority.Bundles()
		_, ok := all.Of(td)
		return ok
	}
	d.warn(d.settings.bundleless(d.here))
	if w := authority.Warning(); w != "" {
		d.log.Warn("development mode", "reason", w)
	}

	d.store, err = registry.Open(ctx, filepath.Join(c.DataDir.Value, database), c.TrustDomain.Value, d.log)
	if err != nil {
		return err
	}
	opened = append(opened, d.store.Close)
	if err := d.store.ReplaceFile(d.settings.entries); err != nil {
		return err
	}

	src, err := newSources(c, table, d.demand, d.log)
	if err != nil {
		return err
	}
	opened = append(opened, src.Close)

	d.follower = federation.NewFollower(authority, d.log)
	d.follower.Follow(d.settings.relationships)
	keeper := svid.NewKeeper(authority, svid.KeeperOptions{KeyType: svid.KeyType(c.Authority.WorkloadKeyType.Value), Log: d.log})
	lent, err := newLending(c, authority, d.log)
	opened = append(opened, lent.Close)
	if err != nil {
		return err
	}
	d.server = endpoint.New(endpoint.Config{
		TrustDomain: c.TrustDomain.Value,
		Attestors:   attestor.NewSet(d.log, d.demand, src.list...),
		Registry:    d.store,
		Keeper:      keeper,
		Authority:   authority,
		Log:         d.log,
		Processes:   table,
		Minter:      authority,
		Federation:  authority,
		Follower:    d.follower,
		Names:       src.names,
		AdminGroup:  group,
		Borrowers:   borrowers(c),
		Brokering:   lent.brokering,
		Lent:        lent.keeper,
		WIT:         options.WIT,

		SecretNames:     secretNames(c),
		PlainValidation: c.SDS.DisableSPIFFECertValidation.Value,
	})

	if err := makeDirs(c, group); err != nil {
		return err
	}
	if dir := impassable(c.WorkloadSocket.Path.Value); dir != "" && os.Geteuid() == 0 {
		d.log.Warn("other users cannot reach the workload socket", "socket", c.WorkloadSocket.Path.Value, "closed_directory", dir)
	}
	workload, err := peer.Listen(c.WorkloadSocket.Path.Value, table, peer.Options{Mode: 0o666, Group: -1, Admit: d.server.Admit, Log: d.log})
	if err != nil {
		return err
	}
	opened = append(opened, closing(workload))
	mode := os.FileMode(0o600)
	if group >= 0 {
		mode = 0o660
	}
	admin, err := peer.Listen(c.AdminSocket.Path.Value, table, peer.Options{Mode: mode, Group: group, Log: d.log})
	if err != nil {
		return err
	}
	opened = append(opened, closing(admin))
	if err := lent.listen(table, d.server); err != nil {
		return err
	}
	relying, err := listenDiscovery(c, authority, d.log)
	if err != nil {
		return cannotListen(c.OIDCDiscovery.Address, err)
	}
	if relying != nil {
		opened = append(opened, relying.Close)
	}
	bundles, err := listenBundle(c, authority, d.log)
	if err != nil {
		return cannotListen(c.Federation.Endpoint.Address, err)
	}
	if bundles != nil {
		opened = append(opened, bundles.Close)
	}
	work, ctx := errgroup.WithContext(ctx)
	work.Go(func() error { return d.server.Run(ctx) })
	work.Go(func() error { return d.server.ServeWorkload(workload) })
	work.Go(func() error { return d.server.ServeAdmin(admin) })
	lent.serve(d.server, work)
	work.Go(func() error { return authority.Run(ctx) })
	work.Go(func() error { return d.store.Run(ctx) })
	work.Go(func() error { return d.book.Run(ctx) })
	work.Go(func() error { return followClaims(ctx, d.book, keeper) })
	work.Go(func() error { return d.follow(ctx, d.reloads) })
	work.Go(func() error { return d.follower.Run(ctx) })
	if bundles != nil {
		work.Go(func() error { return bundles.run(ctx) })
	}
	if relying != nil {
		work.Go(func() error { return relying.Run(ctx) })
	}

	set, _ := d.store.Set()
	d.log.Info("started", "version", version, "trust_domain", c.TrustDomain.Value.Name(), "entries", set.Len(),
		"attestors", src.String(), "socket", c.WorkloadSocket.Path.Value, "admin_socket", c.AdminSocket.Path.Value, "data_dir", c.DataDir.Value)
	d.tell("READY=1")
	<-ctx.Done()
	d.log.Info("stopping")
	d.tell("STOPPING=1")
	if err := work.Wait(); !errors.Is(err, context.Canceled) {
		return err
	}
	return nil // as it was told
}

// demand says which costly selectors the entries ask for now.
func (d *daemon) demand() attestor.Demand {
	set, _ := d.store.Set()
	return set.Demand()
}

func (d *daemon) tell(state string) {
	if err := notify(state); err != nil {
		d.log.Warn("service manager was not told", "state", state, "error", err)
	}
}

func authorityOptions(c *conf.Config, log hclog.Logger) local.Options {
	a := c.Authority
	return local.Options{
		TrustDomain: c.TrustDomain.Value,
		DataDir:     c.DataDir.Value,
		Memory:      a.Keys.Value == conf.Memory,
		CATTL:       a.CATTL.Value,
		X509TTL:     a.X509TTL(),
		JWTTTL:      a.JWTTTL(),
		KeyType:     svid.KeyType(a.KeyType.Value),
		JWTIssuer:   a.JWTIssuer.Value,
		RefreshHint: refreshHint(c),
		Upstream:    local.Upstream{Cert: a.UpstreamCert.Value, Key: a.UpstreamKey.Value, Bundle: a.UpstreamBundle.Value},
		Log:         log,
	}
}

func secretNames(c *conf.Config) endpoint.SecretNames {
	return endpoint.SecretNames{
		SVID:       c.SDS.DefaultSVIDName.Value,
		Bundle:     c.SDS.DefaultBundleName.Value,
		AllBundles: c.SDS.DefaultAllBundlesName.Value,
	}
}

// closing closes a listener that its server may have closed.
func closing(l net.Listener) func() error {
	return func() error {
		if err := l.Close(); err != nil && !errors.Is(err, net.ErrClosed) {
			return err
		}
		return nil
	}
}
