package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	secretv3 "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
)

// A sample is what one client measured.
type sample struct {
	Ops     int           `json:"ops"`
	Elapsed time.Duration `json:"elapsed_ns"`
	P50     time.Duration `json:"p50_ns"`
	P99     time.Duration `json:"p99_ns"`

	cpu time.Duration // of the server meanwhile
}

func (s sample) perSecond() float64 { return float64(s.Ops) / s.Elapsed.Seconds() }

func (s sample) cpuEach() time.Duration { return s.cpu / time.Duration(max(s.Ops, 1)) }

func dial(socket string) (*grpc.ClientConn, error) {
	return grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
}

func withHeader(ctx context.Context) context.Context {
	return metadata.AppendToOutgoingContext(ctx, "workload.spiffe.io", "true")
}

// An operation is one call of the kind that is measured; i is never the same twice.
type operation func(ctx context.Context, i int) error

// fetchX509 opens a stream, takes the first message and ends it.
func fetchX509(ctx context.Context, c workload.SpiffeWorkloadAPIClient) (*workload.X509SVIDResponse, error) {
	ctx, cancel := context.WithCancel(withHeader(ctx))
	defer cancel()
	stream, err := c.FetchX509SVID(ctx, &workload.X509SVIDRequest{})
	if err != nil {
		return nil, err
	}
	return stream.Recv()
}

// operations of a measurement, one for each worker: workers share connections in pairs.
func operations(op, socket string, workers int) ([]operation, func(), error) {
	var conns []*grpc.ClientConn
	done := func() {
		for _, c := range conns {
			c.Close()
		}
	}
	ops := make([]operation, workers)
	var api workload.SpiffeWorkloadAPIClient
	var envoy secretv3.SecretDiscoveryServiceClient
	nonce := strconv.FormatInt(time.Now().UnixNano(), 36)
	for w := range ops {
		if op != "connect" && w%2 == 0 {
			conn, err := dial(socket)
			if err != nil {
				done()
				return nil, nil, err
			}
			conns = append(conns, conn)
			api, envoy = workload.NewSpiffeWorkloadAPIClient(conn), secretv3.NewSecretDiscoveryServiceClient(conn)
		}
		c, sds := api, envoy
		switch op {
		case "x509":
			ops[w] = func(ctx context.Context, _ int) error {
				_, err := fetchX509(ctx, c)
				return err
			}
		case "sds":
			ops[w] = func(ctx context.Context, _ int) error { return streamSecrets(ctx, sds) }
		case "secrets":
			ops[w] = func(ctx context.Context, _ int) error {
				_, err := sds.FetchSecrets(ctx, twoSecrets())
				return err
			}
		case "connect":
			ops[w] = func(ctx context.Context, _ int) error {
				conn, err := dial(socket)
				if err != nil {
					return err
				}
				defer conn.Close()
				_, err = fetchX509(ctx, workload.NewSpiffeWorkloadAPIClient(conn))
				return err
			}
		case "jwt":
			ops[w] = func(ctx context.Context, i int) error {
				_, err := c.FetchJWTSVID(withHeader(ctx), &workload.JWTSVIDRequest{
					Audience: []string{fmt.Sprintf("https://%s.%d.%d.example/api", nonce, w, i)},
				})
				return err
			}
		case "validate":
			r, err := c.FetchJWTSVID(withHeader(context.Background()), &workload.JWTSVIDRequest{Audience: []string{"https://bench.example"}})
			if err != nil {
				done()
				return nil, nil, err
			}
			token := r.Svids[0].Svid
			ops[w] = func(ctx context.Context, _ int) error {
				_, err := c.ValidateJWTSVID(withHeader(ctx), &workload.ValidateJWTSVIDRequest{Audience: "https://bench.example", Svid: token})
				return err
			}
		default:
			done()
			return nil, nil, fmt.Errorf("no operation %q", op)
		}
	}
	return ops, done, nil
}

// measure runs the operation in a closed loop, with this many workers, for
// about this long, and prints a sample.
func measure(op, socket string, workers int, length time.Duration) error {
	ops, done, err := operations(op, socket, workers)
	if err != nil {
		return err
	}
	defer done()
	ctx := context.Background()
	for _, o := range ops { // warm up: connections, evidence, first SVID
		if err := o(ctx, -1); err != nil {
			return err
		}
	}
	var (
		wg    sync.WaitGroup
		fail  atomic.Value
		times = make([][]time.Duration, workers)
		start = time.Now()
	)
	for w, o := range ops {
		wg.Go(func() {
			for i := 0; time.Since(start) < length; i++ {
				t := time.Now()
				if err := o(ctx, i); err != nil {
					fail.Store(err)
					return
				}
				times[w] = append(times[w], time.Since(t))
			}
		})
	}
	wg.Wait()
	elapsed := time.Since(start)
	if err, ok := fail.Load().(error); ok {
		return err
	}
	all := slices.Concat(times...)
	slices.Sort(all)
	return json.NewEncoder(os.Stdout).Encode(sample{
		Ops: len(all), Elapsed: elapsed, P50: all[len(all)/2], P99: all[len(all)*99/100],
	})
}

// hold starts so many processes that each hold streams, waits until its input
// ends, and ends them. What they print comes out unchanged.
func hold(socket string, processes, streams int, what string) error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	held := make([]*exec.Cmd, processes)
	var inputs []io.Closer
	defer func() {
		for _, in := range inputs {
			in.Close()
		}
		for _, c := range held {
			if c != nil {
				c.Wait()
			}
		}
	}()
	for i := range held {
		c := exec.Command(self, "held", socket, strconv.Itoa(i), strconv.Itoa(streams), what)
		c.Stdout, c.Stderr = os.Stdout, os.Stderr
		in, err := c.StdinPipe()
		if err != nil {
			return err
		}
		inputs = append(inputs, in)
		if err := c.Start(); err != nil {
			return err
		}
		held[i] = c
	}
	_, err = io.Copy(io.Discard, os.Stdin)
	return err
}

// opened are the kinds of streams that are held. Each returns what waits for
// the next message.
var opened = map[string]func(context.Context, *grpc.ClientConn) (func() error, error){
	"x509": func(ctx context.Context, conn *grpc.ClientConn) (func() error, error) {
		stream, err := workload.NewSpiffeWorkloadAPIClient(conn).FetchX509SVID(withHeader(ctx), &workload.X509SVIDRequest{})
		return func() error {
			_, err := stream.Recv()
			return err
		}, err
	},
	"sds": openSecrets,
}

// holdOwn opens streams on one connection and prints "ready" when all have had
// their first message, then a line for each further one: the number of this
// process, that of the stream, and the time. It ends when its input does.
func holdOwn(socket, process string, streams int, what string) error {
	conn, err := dial(socket)
	if err != nil {
		return err
	}
	defer conn.Close()
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	var first sync.WaitGroup
	first.Add(streams)
	for n := range streams {
		next, err := opened[what](ctx, conn)
		if err != nil {
			return err
		}
		go func() {
			if err := next(); err != nil {
				fmt.Fprintln(os.Stderr, "first message:", err)
				os.Exit(1)
			}
			first.Done()
			for {
				if err := next(); err != nil {
					return
				}
				// One write for a line: the other processes have the same output.
				fmt.Println(process, n, time.Now().UnixNano())
			}
		}()
	}
	first.Wait()
	fmt.Println("ready")
	_, err = io.Copy(io.Discard, os.Stdin)
	return err
}
