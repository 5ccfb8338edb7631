package endpoint

import (
	"context"
	"net"
	"path/filepath"
	"runtime"
	"testing"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	secretv3 "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"

	"github.com/deputy-id/deputy/svid/registry"
)

// bare sends the same bytes as a Server would, to anybody.
type bare struct {
	workload.UnimplementedSpiffeWorkloadAPIServer
	response *workload.X509SVIDResponse
}

func (b *bare) FetchX509SVID(_ *workload.X509SVIDRequest, st workload.SpiffeWorkloadAPI_FetchX509SVIDServer) error {
	if err := st.Send(b.response); err != nil {
		return err
	}
	<-st.Context().Done()
	return nil
}

func startBare(b *testing.B, r *workload.X509SVIDResponse) string {
	b.Helper()
	return listenBare(b, func(s *grpc.Server) { workload.RegisterSpiffeWorkloadAPIServer(s, &bare{response: r}) })
}

func listenBare(b *testing.B, register func(*grpc.Server)) string {
	b.Helper()
	path := filepath.Join(b.TempDir(), "bare.sock")
	l, err := net.Listen("unix", path)
	if err != nil {
		b.Fatal(err)
	}
	s := grpc.NewServer()
	register(s)
	go s.Serve(l)
	b.Cleanup(s.Stop)
	return path
}

func fetch(ctx context.Context, api workload.SpiffeWorkloadAPIClient) (*workload.X509SVIDResponse, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	st, err := api.FetchX509SVID(ctx, &workload.X509SVIDRequest{})
	if err != nil {
		return nil, err
	}
	return st.Recv()
}

func benchmarkCalls(b *testing.B, w *world, path string, call func(context.Context, *grpc.ClientConn) error) {
	conn := w.dial(path)
	ctx := metadata.AppendToOutgoingContext(context.Background(), "workload.spiffe.io", "true")
	if err := call(ctx, conn); err != nil {
		b.Fatal(err)
	}
	b.ReportAllocs()
	b.SetParallelism(4)
	b.ResetTimer()
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			if err := call(ctx, conn); err != nil {
				b.Error(err)
				return
			}
		}
	})
}

// The attestors of this package's tests cost nothing: what is measured is all
// that stands between them and the client.
func BenchmarkFetchX509SVIDStreamPerCall(b *testing.B) {
	w := start(b)
	w.entry("/a", nil, mine)
	once := func(ctx context.Context, conn *grpc.ClientConn) error {
		_, err := fetch(ctx, workload.NewSpiffeWorkloadAPIClient(conn))
		return err
	}
	r, err := fetch(call(b), w.workloadAPI())
	if err != nil {
		b.Fatal(err)
	}
	b.Run("deputy", func(b *testing.B) { benchmarkCalls(b, w, w.socket, once) })
	bare := startBare(b, r)
	b.Run("bare", func(b *testing.B) { benchmarkCalls(b, w, bare, once) })
}

// bareSecrets sends the same bytes as a Server would, to anybody.
type bareSecrets struct {
	secretv3.UnimplementedSecretDiscoveryServiceServer
	response *discoveryv3.DiscoveryResponse
}

func (b *bareSecrets) FetchSecrets(context.Context, *discoveryv3.DiscoveryRequest) (*discoveryv3.DiscoveryResponse, error) {
	return b.response, nil
}

func (b *bareSecrets) StreamSecrets(st secretv3.SecretDiscoveryService_StreamSecretsServer) error {
	if _, err := st.Recv(); err != nil {
		return err
	}
	if err := st.Send(b.response); err != nil {
		return err
	}
	<-st.Context().Done()
	return nil
}

func fetchSecretsOn(ctx context.Context, conn *grpc.ClientConn, in *discoveryv3.DiscoveryRequest) (*discoveryv3.DiscoveryResponse, error) {
	return secretv3.NewSecretDiscoveryServiceClient(conn).FetchSecrets(ctx, in)
}

func streamSecretsOn(ctx context.Context, conn *grpc.ClientConn, in *discoveryv3.DiscoveryRequest) (*discoveryv3.DiscoveryResponse, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	st, err := secretv3.NewSecretDiscoveryServiceClient(conn).StreamSecrets(ctx)
	if err != nil {
		return nil, err
	}
	if err := st.Send(in); err != nil {
		return nil, err
	}
	return st.Recv()
}

func BenchmarkSecrets(b *testing.B) {
	w := start(b)
	w.entry("/a", nil, mine)
	in := &discoveryv3.DiscoveryRequest{Node: nodeOf(40, nil), TypeUrl: secretType, ResourceNames: []string{"default", "ROOTCA"}}
	r, err := fetchSecretsOn(call(b), w.dial(w.socket), in)
	if err != nil {
		b.Fatal(err)
	}
	bare := listenBare(b, func(s *grpc.Server) {
		secretv3.RegisterSecretDiscoveryServiceServer(s, &bareSecrets{response: r})
	})
	for _, c := range []struct {
		name string
		call func(context.Context, *grpc.ClientConn, *discoveryv3.DiscoveryRequest) (*discoveryv3.DiscoveryResponse, error)
	}{{"fetch", fetchSecretsOn}, {"stream per call", streamSecretsOn}} {
		for _, server := range []struct{ name, path string }{{"deputy", w.socket}, {"bare", bare}} {
			b.Run(c.name+"/"+server.name, func(b *testing.B) {
				benchmarkCalls(b, w, server.path, func(ctx context.Context, conn *grpc.ClientConn) error {
					_, err := c.call(ctx, conn, in)
					return err
				})
			})
		}
	}
}

func BenchmarkFetchJWTSVID(b *testing.B) {
	for name, fresh := range map[string]bool{"cached": false, "minted": true} {
		b.Run(name, func(b *testing.B) {
			w := start(b)
			w.entry("/a", func(e *registry.Entry) { e.JWTFresh = fresh }, mine)
			benchmarkCalls(b, w, w.socket, func(ctx context.Context, conn *grpc.ClientConn) error {
				_, err := workload.NewSpiffeWorkloadAPIClient(conn).FetchJWTSVID(ctx, &workload.JWTSVIDRequest{Audience: []string{"db"}})
				return err
			})
		})
	}
}

// BenchmarkOpenStreams opens streams and reports what each keeps in memory,
// client and server together.
func BenchmarkOpenStreams(b *testing.B) {
	const streams = 400
	for _, perConn := range []int{1, 100} {
		b.Run(map[int]string{1: "alone on a connection", 100: "100 on a connection"}[perConn], func(b *testing.B) {
			w := start(b)
			w.entry("/a", nil, mine)
			r, err := fetch(call(b), w.workloadAPI())
			if err != nil {
				b.Fatal(err)
			}
			for name, path := range map[string]string{"deputy": w.socket, "bare": startBare(b, r)} {
				b.Run(name, func(b *testing.B) {
					var kept uint64
					n := 0
					for b.Loop() {
						ctx, cancel := context.WithCancel(metadata.AppendToOutgoingContext(b.Context(), "workload.spiffe.io", "true"))
						before := memory()
						conns := openStreams(ctx, b, path, streams/perConn, perConn)
						kept += max(memory(), before) - before
						n += streams
						cancel()
						for _, c := range conns {
							c.Close()
						}
					}
					b.ReportMetric(float64(kept)/1024/float64(n), "KiB/stream")
				})
			}
		})
	}
}

func openStreams(ctx context.Context, b *testing.B, path string, conns, each int) []*grpc.ClientConn {
	var all []*grpc.ClientConn
	for range conns {
		conn, err := grpc.NewClient("unix://"+path, grpc.WithTransportCredentials(insecure.NewCredentials()))
		if err != nil {
			b.Fatal(err)
		}
		all = append(all, conn)
		for range each {
			st, err := workload.NewSpiffeWorkloadAPIClient(conn).FetchX509SVID(ctx, &workload.X509SVIDRequest{})
			if err != nil {
				b.Fatal(err)
			}
			if _, err := st.Recv(); err != nil {
				b.Fatal(err)
			}
		}
	}
	return all
}

func memory() uint64 {
	var m runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&m)
	return m.HeapInuse + m.StackInuse
}
