package main

import (
	"errors"
	"fmt"
	"net"
	"path/filepath"

	"github.com/hashicorp/go-hclog"
	"golang.org/x/sync/errgroup"

	"github.com/deputy-id/deputy/attestor/kubernetes"
	"github.com/deputy-id/deputy/attestor/peer"
	"github.com/deputy-id/deputy/conf"
	"github.com/deputy-id/deputy/endpoint"
	"github.com/deputy-id/deputy/internal/crowd"
	"github.com/deputy-id/deputy/svid"
	"github.com/deputy-id/deputy/svid/local"
	"github.com/deputy-id/deputy/svid/registry"
)

// A lending is what the daemon has for those who get the SVIDs of others.
type lending struct {
	c         *conf.Config
	log       hclog.Logger
	keeper    *svid.Keeper // nobody but its borrower has a key of it; nil without borrowers
	brokering *endpoint.Brokering

	delegated net.Listener
	brokers   []net.Listener
	opened    []func() error
}

// tcpBrokers bounds the connections over TCP, whose descriptors whoever knocks
// would take otherwise. All brokers may be on one host: this one.
const tcpBrokers = 256

// newLending returns what the configuration asks for. The caller closes it,
// also after an error.
func newLending(c *conf.Config, authority *local.Authority, log hclog.Logger) (*lending, error) {
	l := &lending{c: c, log: log}
	if c.DelegatedIdentity == nil && c.Broker == nil {
		return l, nil
	}
	l.keeper = svid.NewKeeper(authority, svid.KeeperOptions{KeyType: svid.KeyType(c.Authority.WorkloadKeyType.Value), Log: log})
	b := c.Broker
	if b == nil {
		return l, nil
	}
	self := svid.NewSelf(authority.Node(), registry.NodeID(c.TrustDomain.Value), log)
	l.opened = append(l.opened, self.Close)
	l.brokering = &endpoint.Brokering{Identity: self}
	if k := b.Kubelet; k != nil {
		node, err := kubernetes.New(kubeletOptions(k))
		if err != nil {
			return l, err
		}
		l.brokering.Pods = node
	}
	return l, nil
}

// borrowers are those that the configuration names.
func borrowers(c *conf.Config) (b endpoint.Borrowers) {
	if d := c.DelegatedIdentity; d != nil {
		b.Delegates = values(d.Delegates)
	}
	if c.Broker == nil {
		return b
	}
	for _, one := range c.Broker.Clients {
		b.Brokers = append(b.Brokers, endpoint.Broker{
			ID: one.ID.Value, References: references(one.References), OverTCP: references(one.OverTCP),
		})
	}
	return b
}

func references(all []conf.Setting[conf.Reference]) (r endpoint.References) {
	for _, one := range all {
		switch one.Value {
		case conf.ReferencePID:
			r.PID = true
		case conf.ReferenceKubernetes:
			r.Kubernetes = true
		}
	}
	return r
}

// listen opens the listeners that the configuration asks for.
func (l *lending) listen(table *peer.Table, server *endpoint.Server) (err error) {
	if d := l.c.DelegatedIdentity; d != nil {
		// Everybody may connect, and is attested.
		if l.delegated, err = l.socket(d.Socket.Value, table, server); err != nil {
			return err
		}
		l.log.Info("delegates are served", "socket", d.Socket.Value)
	}
	b := l.c.Broker
	if b == nil {
		return nil
	}
	if b.Socket.Value != "" {
		// Everybody may connect, and has to show an X.509-SVID.
		s, err := l.socket(b.Socket.Value, table, server)
		if err != nil {
			return err
		}
		l.brokers = append(l.brokers, s)
	}
	if b.Address.Value != "" {
		s, err := net.Listen("tcp", b.Address.Value)
		if err != nil {
			return cannotListen(b.Address, fmt.Errorf("listen for brokers: %w", err))
		}
		l.opened = append(l.opened, closing(s))
		l.brokers = append(l.brokers, crowd.Limit(s, crowd.Bounds{All: tcpBrokers, Host: tcpBrokers}))
	}
	l.log.Info("brokers are served", "socket", b.Socket.Value, "address", b.Address.Value, "clients", len(b.Clients))
	return nil
}

func (l *lending) socket(path string, table *peer.Table, server *endpoint.Server) (net.Listener, error) {
	if err := makeDir(filepath.Dir(path), 0o755, -1); err != nil {
		return nil, err
	}
	s, err := peer.Listen(path, table, peer.Options{Mode: 0o666, Group: -1, Admit: server.Admit, Log: l.log})
	if err != nil {
		return nil, err
	}
	l.opened = append(l.opened, closing(s))
	return s, nil
}

func (l *lending) serve(server *endpoint.Server, work *errgroup.Group) {
	if l.delegated != nil {
		work.Go(func() error { return server.ServeDelegated(l.delegated) })
	}
	for _, s := range l.brokers {
		work.Go(func() error { return server.ServeBroker(s) })
	}
}

func (l *lending) Close() error {
	var err error
	for i := len(l.opened) - 1; i >= 0; i-- {
		err = errors.Join(err, l.opened[i]())
	}
	return err
}

// lendingValues is for needRestart.
func lendingValues(c *conf.Config) (delegated, broker any) {
	if d := c.DelegatedIdentity; d != nil {
		delegated = d.Socket.Value
	}
	if b := c.Broker; b != nil {
		all := []any{b.Socket.Value, b.Address.Value}
		if k := b.Kubelet; k != nil {
			all = append(all, k.URL.Value, k.TokenFile.Value, k.CAFile.Value)
		}
		broker = all
	}
	return delegated, broker
}
