package endpoint

import (
	"context"
	"errors"
	"io"
	"maps"
	"slices"
	"time"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	secretv3 "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	"github.com/hashicorp/go-hclog"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/mem"

	"github.com/deputy-id/deputy/svid"
)

// secretDesc is Envoy's secret discovery service (SDS v3). Its calls need no
// header: Envoy could not send it of itself.
var secretDesc = grpc.ServiceDesc{
	ServiceName: secretv3.SecretDiscoveryService_ServiceDesc.ServiceName,
	HandlerType: (*any)(nil),
	Methods: []grpc.MethodDesc{
		method("FetchSecrets", enterPinned, (*Server).fetchSecrets),
	},
	Streams: []grpc.StreamDesc{
		secretStream("StreamSecrets", func(t talker) talk { return &sotw{talker: t} }),
		secretStream("DeltaSecrets", func(t talker) talk { return &delta{talker: t} }),
	},
	Metadata: secretv3.SecretDiscoveryService_ServiceDesc.Metadata,
}

func secretStream(name string, begin func(talker) talk) grpc.StreamDesc {
	return grpc.StreamDesc{
		StreamName:    name,
		ServerStreams: true,
		ClientStreams: true,
		Handler: func(srv any, st grpc.ServerStream) error {
			s := srv.(*Server)
			l, err := enterPinned(st.Context())
			if err != nil {
				return workloadStatus(err)
			}
			t := begin(s.talker(l))
			defer t.leave()
			return s.answer(l, name, s.converse(st.Context(), l, st, name, t))
		},
	}
}

func (s *Server) talker(l *link) talker {
	client := []any{"pid", l.Process().PID(), "uid", l.uid}
	return talker{s: s, account: l.seat.account(), client: client, log: func(message string, args ...any) {
		s.logRarely(l, hclog.Warn, message, append(args, client...)...)
	}}
}

// fetchSecrets answers once.
func (s *Server) fetchSecrets(ctx context.Context, l *link, in *discoveryv3.DiscoveryRequest) (mem.BufferSlice, error) {
	t := sotw{talker: s.talker(l)}
	defer t.leave()
	if _, err := t.heed(in); err != nil {
		return nil, err
	}
	now, err := s.holdings(ctx, l, nil)
	if err != nil {
		return nil, err
	}
	t.miss(s.secretsOf(l, now), now.doubt)
	all, _, err := t.pickAll(s.secretsOf(l, now), now.doubt)
	if err != nil {
		return nil, err
	}
	return discovery(all, t.nextNonce()), nil
}

// A message is what a client says on a stream, or why it says no more. Who has
// dealt with the body says so: it counts until then.
type message struct {
	body  encoded
	err   error
	taken chan<- struct{}
}

// listen reads what the client says, one message at a time, until the stream
// ends.
func listen(ctx context.Context, st grpc.ServerStream) <-chan message {
	said, taken := make(chan message), make(chan struct{}, 1)
	go func() {
		for {
			m := message{taken: taken}
			m.err = st.RecvMsg(&m.body)
			select {
			case said <- m:
			case <-ctx.Done(): // the handler has returned
				return
			}
			if m.err != nil {
				return
			}
			select {
			case <-taken:
			case <-ctx.Done():
				return
			}
		}
	}()
	return said
}

// converse is the loop of an X.509 stream with a client that says which names
// it wants, and changes its mind. It goes on when the process loses its
// identity: a stream that ends takes nothing from Envoy.
//
// It does not wait for a response to be confirmed before it sends the next.
// What is sent and not read is bounded by gRPC's flow control, which then holds
// up this stream alone.
func (s *Server) converse(ctx context.Context, l *link, st grpc.ServerStream, name string, t talk) error {
	said := listen(ctx, st)
	var has *state // what was looked at last
	var clock retry
	defer clock.stop()
	for {
		m, err := s.wait(ctx, l, has, clock.again, said)
		switch {
		case errors.Is(err, io.EOF):
			return nil // it will not confirm what it is sent: its end as well
		case err != nil:
			return err
		case m != nil:
			ask, err := t.take(m.body)
			m.taken <- struct{}{}
			if err != nil {
				return err
			}
			if !ask {
				continue
			}
		}
		now, err := s.secretState(ctx, l, name, has, t.returns())
		if err != nil {
			return err
		}
		has = now
		out, err := t.say(s.secretsOf(l, has), has.doubt)
		if err != nil {
			return err
		}
		if out != nil {
			if err := st.SendMsg(out); err != nil {
				return err
			}
		}
		clock.set(has)
	}
}

// secretState is holdings for a stream that stays open: once the client had an
// identity, on this stream or on one before, having none is a state as well.
func (s *Server) secretState(ctx context.Context, l *link, name string, has *state, returns bool) (*state, error) {
	set, entries := s.Registry.Set() // before the look, so that no change is missed
	now, err := s.holdings(ctx, l, has)
	switch {
	case err == nil:
		if now.snapshot == nil {
			now.bundles = now.bundles.Restrict(federatedWith(now.svids))
		}
		return now, nil
	case has == nil && !(returns && errors.Is(err, errNoIdentity)):
		return nil, err
	case code(err) == codes.PermissionDenied:
		if has == nil || has.bundles != nil {
			s.logDenial(l, name, err)
		}
		// The evidence may change without a word from anybody.
		return &state{entries: entries, again: true}, nil
	case !passing(err):
		return nil, err
	}
	// What could not be found out may have taken a while: whoever is sent a key
	// again is still the one that had it.
	if err := s.check(l); err != nil {
		return nil, err
	}
	// The client keeps what it has while that lives, and its entry; what could
	// not be found out is not held against it. Bundles have no keys in them, and
	// go on.
	now = &state{entries: entries, again: true, doubt: true, bundles: has.bundles}
	now.svids = slices.DeleteFunc(slices.Clone(has.svids), func(x svid.X509) bool {
		e, there := set.Entry(x.Entry.ID)
		return !there || e.Path != x.Entry.Path || !time.Now().Before(x.Chain[0].NotAfter)
	})
	now.kept = now.svids
	if has.bundles != nil {
		if b, stale := s.Authority.Bundles(); b != nil && b.Own != nil {
			now.bundles, now.stale = b.Restrict(slices.Collect(maps.Keys(has.bundles.Federated))), stale
		}
	}
	return now, nil
}

func federatedWith(svids []svid.X509) (tds []spiffeid.TrustDomain) {
	for _, x := range svids {
		tds = append(tds, x.Entry.FederatesWith...)
	}
	return tds
}

// secretsOf returns the secrets of a state: made once for a snapshot, whatever
// the number of streams.
func (s *Server) secretsOf(l *link, st *state) *secrets {
	c := l.session
	if st.snapshot == nil {
		return newSecrets(st, s.SecretNames, s.graves)
	}
	if m := c.secrets.Load(); m != nil && m.snapshot == st.snapshot {
		return m
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if m := c.secrets.Load(); m != nil && m.snapshot == st.snapshot {
		return m
	}
	m := newSecrets(st, s.SecretNames, s.graves)
	if !closed(c.proc.Done()) { // else nobody would drop the keys
		c.secrets.Store(m)
	}
	return m
}
