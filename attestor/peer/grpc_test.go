package peer

import (
	"context"
	"errors"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health/grpc_health_v1"
	grpcpeer "google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
)

// health answers Check after block was closed, and then only if the
// connection still belongs to who opened it.
type health struct {
	grpc_health_v1.UnimplementedHealthServer
	entered chan *Conn
	block   chan struct{}
}

func (h *health) Check(ctx context.Context, _ *grpc_health_v1.HealthCheckRequest) (*grpc_health_v1.HealthCheckResponse, error) {
	p, _ := grpcpeer.FromContext(ctx)
	conn := p.AuthInfo.(authInfo).conn
	if h.entered != nil {
		h.entered <- conn
		<-h.block
	}
	if err := conn.Check(); err != nil {
		return nil, status.Error(codes.Unavailable, err.Error())
	}
	return &grpc_health_v1.HealthCheckResponse{Status: grpc_health_v1.HealthCheckResponse_SERVING}, nil
}

func serve(t testing.TB, l *Listener, h *health) {
	t.Helper()
	s := grpc.NewServer(grpc.Creds(transport{TransportCredentials: insecure.NewCredentials()}))
	grpc_health_v1.RegisterHealthServer(s, h)
	done := make(chan struct{})
	go func() { defer close(done); s.Serve(l) }()
	t.Cleanup(func() { s.Stop(); <-done })
}

func healthClient(t testing.TB, path string) grpc_health_v1.HealthClient {
	t.Helper()
	cc, err := grpc.NewClient("unix://"+path, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cc.Close() })
	return grpc_health_v1.NewHealthClient(cc)
}

func call(ctx context.Context, c grpc_health_v1.HealthClient) error {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	_, err := c.Check(ctx, &grpc_health_v1.HealthCheckRequest{})
	return err
}

func TestGRPCClientPassesTheChallenge(t *testing.T) {
	kernels(t, func(t *testing.T, kernel features) {
		l := listen(t, openTable(t, kernel), Options{})
		serve(t, l, &health{})
		c := healthClient(t, l.Addr().String())
		for range 3 {
			if err := call(t.Context(), c); err != nil {
				t.Fatal(err)
			}
		}
	})
}

func TestGoAwayIsRetryable(t *testing.T) {
	l := listen(t, openTable(t, features{}), Options{})
	h := &health{entered: make(chan *Conn), block: make(chan struct{})}
	serve(t, l, h)
	c := healthClient(t, l.Addr().String())
	failed := make(chan error, 1)
	go func() { failed <- call(t.Context(), c) }()
	conn := <-h.entered
	conn.GoAway("come again")
	err := <-failed
	if status.Code(err) != codes.Unavailable || !strings.Contains(err.Error(), "come again") {
		t.Errorf("call in flight: got %v, want Unavailable with the reason", err)
	}
	close(h.block)
	go func() { failed <- call(t.Context(), c) }()
	if again := <-h.entered; again == conn {
		t.Error("the next call came over the same connection")
	}
	if err := <-failed; err != nil {
		t.Errorf("next call: got %v, want an answer", err)
	}
}

var errFull = errors.New("too many connections")

func TestRefusedClientHearsTheReason(t *testing.T) {
	l := listen(t, openTable(t, features{}), Options{Mode: 0o666, Group: -1, Admit: func(uint32) (func(), error) {
		return nil, errFull
	}})
	serve(t, l, &health{})
	c := healthClient(t, l.Addr().String())
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	// Which of its errors the client shows depends on when it sees the end.
	for {
		err := call(ctx, c)
		if status.Code(err) != codes.Unavailable {
			t.Fatalf("got %v, want Unavailable", err)
		}
		if strings.Contains(err.Error(), errFull.Error()) {
			return
		}
	}
}

func benchmarkConnect(b *testing.B, challenge bool) {
	kernel, _, err := probe()
	if err != nil {
		b.Fatal(err)
	}
	l := listen(b, openTable(b, kernel), Options{})
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			if challenge {
				if err := c.(*Conn).Challenge(context.Background()); err != nil {
					b.Error(err)
				}
			}
			c.Close()
		}
	}()
	b.ReportAllocs()
	for b.Loop() {
		c := dial(b, l)
		if challenge {
			if err := answer(c); err != nil {
				b.Fatal(err)
			}
		}
		var one [1]byte
		for {
			if _, err := c.Read(one[:]); err != nil {
				break
			}
		}
		c.Close()
	}
}

func BenchmarkAccept(b *testing.B)             { benchmarkConnect(b, false) }
func BenchmarkAcceptAndChallenge(b *testing.B) { benchmarkConnect(b, true) }
