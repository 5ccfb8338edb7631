// Package endpoint is the gRPC services on the sockets: the SPIFFE Workload
// API and Envoy's secret discovery for every process of the host; for its
// administrators SPIRE's entry, bundle, SVID and logger APIs beside our own; and
// for those who act for others SPIRE's Delegated Identity API and the SPIFFE
// Broker API.
//
// It asks the stages before it, for each message that has a key in it: is the
// process behind this connection still the one that opened it, what is known
// of it, which entries does that match, what are their SVIDs. It defends
// against a client that uses what an earlier program of its process asked for,
// one that wants to learn about entries of others, one that takes the machine
// for itself, and an administrator's command that comes out of a container.
// Errors become gRPC codes in errors.go and nowhere else.
//
// A caller owes it listeners of package peer, with Admit in their options save
// for the administrators' (brokers may also come over TCP), and a Run for as
// long as it serves.
package endpoint

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/health"
	healthv1 "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/reflection"

	"github.com/deputy-id/deputy/attestor"
	"github.com/deputy-id/deputy/attestor/peer"
	"github.com/deputy-id/deputy/internal/watch"
	"github.com/deputy-id/deputy/svid"
	"github.com/deputy-id/deputy/svid/registry"
)

// attestors say what is known of a process; attestor.Set is what does.
type attestors interface {
	Kept(*peer.Conn) *attestor.Evidence
	Attest(context.Context, *peer.Process) (*attestor.Evidence, error)
	Refresh(context.Context, *peer.Process) (*attestor.Evidence, error)
}

// Config is what a Server works with.
type Config struct {
	TrustDomain spiffeid.TrustDomain
	Attestors   attestors
	Registry    *registry.Store
	Keeper      *svid.Keeper
	Authority   svid.Authority
	Log         hclog.Logger

	// For the admin socket.
	Processes  *peer.Table // to attest by PID
	Minter     minter      // nil where the authority does not sign for bare keys
	Federation bundleStore // nil where the authority brings its own bundles
	Follower   follower    // nil where nobody's bundle is followed
	Names      names       // nil: no process can be registered under a name
	AdminGroup int         // GID whose members may administer beside root and the daemon's own user; -1: none

	// For those who get the SVIDs of others: who they are, and keys that nobody
	// else has.
	Borrowers Borrowers
	Brokering *Brokering // nil: no Broker API
	Lent      *svid.Keeper

	SecretNames     SecretNames // zero: DefaultSecretNames
	PlainValidation bool        // validation contexts without the SPIFFE validator, unless a node says otherwise

	WIT bool // offer WIT-SVIDs, which the authority must sign

	Limits Limits // zero: by DefaultLimits
}

// Server serves the sockets.
type Server struct {
	Config
	budget    *budget
	workload  *grpc.Server
	admin     *grpc.Server
	delegated *grpc.Server
	broker    *grpc.Server
	health    *health.Server
	stopping  chan struct{} // closed when open streams are to end
	stop      func()        // closes it
	loans     atomic.Uint64 // IDs of their holders
	pins      atomic.Int64  // processes that are held for others
	graves    *graves
	borrowers *watch.Value[Borrowers]

	mu       sync.Mutex // guards sessions
	sessions map[uint64]*session
}

// New returns a server that serves nothing yet.
func New(c Config) *Server {
	if c.Limits == (Limits{}) {
		c.Limits = DefaultLimits(descriptors(), runtime.GOMAXPROCS(0))
	}
	if c.SecretNames == (SecretNames{}) {
		c.SecretNames = DefaultSecretNames
	}
	s := &Server{
		Config:   c,
		budget:   newBudget(c.Limits),
		health:   health.NewServer(),
		stopping: make(chan struct{}),
		graves:   newGraves(),
		sessions: make(map[uint64]*session),

		borrowers: watch.New(c.Borrowers),
	}
	s.stop = sync.OnceFunc(func() { close(s.stopping) })

	s.workload, s.admin, s.delegated, s.broker = s.newWorkload(), s.newAdmin(), s.newDelegated(), s.newBroker()
	return s
}

// Bounds of what a client may send.
const (
	maxMessage = 1<<20 + 4<<10 // so that what is wrong with a field of a MiB can be said; see Limits for all of them
	maxBatch   = 16 << 20      // of an administrator, who may bring thousands of entries or a large bundle
	maxHeaders = 16 << 10
)

// workers of each server serve one call after another, on a stack that has
// grown: growing it takes a tenth of a short call. Those that meet long streams
// stay with them, and other calls get goroutines of their own.
const workers = 16

// newGate returns a server that serves what all of them do. Buffers are small,
// because there may be a connection for each of ten thousand processes and a
// request has a hundred bytes; gRPC takes write buffers from a pool by itself.
// Windows are static: requests are too small for an estimate of the bandwidth to
// be worth its pings.
func (s *Server) newGate(h credentials.TransportCredentials, admit admission, deny denial, more ...grpc.ServerOption) *gate {
	g := &gate{budget: s.budget, most: maxMessage, admit: admit, deny: deny}
	g.Server = grpc.NewServer(append([]grpc.ServerOption{
		grpc.Creds(h),
		grpc.ForceServerCodecV2(newCodec()),
		grpc.MaxConcurrentStreams(uint32(s.Limits.ConnStreams)),
		grpc.MaxHeaderListSize(maxHeaders),
		grpc.NumStreamWorkers(workers),
		grpc.ReadBufferSize(4 << 10),
		grpc.WriteBufferSize(16 << 10),
		grpc.StaticStreamWindowSize(streamWindow),
		grpc.StaticConnWindowSize(128 << 10),
		grpc.ConnectionTimeout(patience + 2*challengeTime),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: 10 * time.Second, PermitWithoutStream: true}),
	}, more...)...)
	healthv1.RegisterHealthServer(g, s.health)
	reflection.Register(g)
	return g
}

// Admit is for the options of listeners of package peer, save the administrators'.
func (s *Server) Admit(uid uint32) (release func(), err error) { return s.budget.admit(uid) }

// ServeWorkload serves the Workload API on a listener of package peer until
// the server stops.
func (s *Server) ServeWorkload(l net.Listener) error { return serve(s.workload, l) }

// ServeAdmin serves the administrators' APIs on a listener of package peer
// until the server stops.
func (s *Server) ServeAdmin(l net.Listener) error { return serve(s.admin, l) }

// ServeDelegated serves the Delegated Identity API on a listener of package
// peer until the server stops.
func (s *Server) ServeDelegated(l net.Listener) error { return serve(s.delegated, l) }

// ServeBroker serves the Broker API, over mutual TLS, on a listener of package
// peer or on any other until the server stops.
func (s *Server) ServeBroker(l net.Listener) error { return serve(s.broker, l) }

func serve(g *grpc.Server, l net.Listener) error {
	if err := g.Serve(l); err != nil && !errors.Is(err, grpc.ErrServerStopped) {
		return fmt.Errorf("serve %s: %w", l.Addr(), err)
	}
	return nil
}

// grace is how long calls that are on their way may take when the server stops.
const grace = 3 * time.Second

// Run keeps the health state until the context ends, and then stops serving:
// open streams end with Unavailable.
func (s *Server) Run(ctx context.Context) error {
	s.watchHealth(ctx)
	s.health.Shutdown()
	s.stop()
	var done sync.WaitGroup
	for _, g := range []*grpc.Server{s.workload, s.admin, s.delegated, s.broker} {
		done.Go(func() {
			timer := time.AfterFunc(grace, g.Stop)
			defer timer.Stop()
			g.GracefulStop()
		})
	}
	done.Wait()
	return nil
}

// watchHealth says SERVING while the authority has something to sign with.
func (s *Server) watchHealth(ctx context.Context) {
	for {
		b, stale := s.Authority.Bundles()
		state := healthv1.HealthCheckResponse_NOT_SERVING
		if ready(b) {
			state = healthv1.HealthCheckResponse_SERVING
		}
		s.health.SetServingStatus("", state)
		s.health.SetServingStatus(workloadDesc.ServiceName, state)
		s.health.SetServingStatus(secretDesc.ServiceName, state)
		select {
		case <-ctx.Done():
			return
		case <-stale:
		}
	}
}

func ready(b *svid.Bundles) bool {
	return b != nil && b.Own != nil && len(b.Own.X509Authorities) > 0
}

// descriptors is how many files this process may have open.
func descriptors() uint64 {
	var l unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &l); err != nil {
		return uint64(os.Getpagesize()) / 4 // what Linux gives when nobody says otherwise
	}
	return l.Cur
}
