package main

import (
	"context"
	"fmt"
	"slices"
	"time"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	secretv3 "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"
)

const secretType = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret"

// twoSecrets asks for a certificate and the roots, as an Envoy does.
func twoSecrets() *discoveryv3.DiscoveryRequest {
	return &discoveryv3.DiscoveryRequest{TypeUrl: secretType, ResourceNames: []string{"default", "ROOTCA"}}
}

// streamSecrets opens a stream, takes the first response and ends it.
func streamSecrets(ctx context.Context, c secretv3.SecretDiscoveryServiceClient) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := c.StreamSecrets(ctx)
	if err != nil {
		return err
	}
	if err := stream.Send(twoSecrets()); err != nil {
		return err
	}
	_, err = stream.Recv()
	return err
}

type bareSecrets struct {
	secretv3.UnimplementedSecretDiscoveryServiceServer
	secrets *discoveryv3.DiscoveryResponse
}

func (b *bareSecrets) FetchSecrets(context.Context, *discoveryv3.DiscoveryRequest) (*discoveryv3.DiscoveryResponse, error) {
	return b.secrets, nil
}

func (b *bareSecrets) StreamSecrets(stream secretv3.SecretDiscoveryService_StreamSecretsServer) error {
	if _, err := stream.Recv(); err != nil {
		return err
	}
	if err := stream.Send(b.secrets); err != nil {
		return err
	}
	<-stream.Context().Done()
	return nil
}

// pushed is the secret that is followed.
const pushed = "/agent/pushed"

// openSecrets holds a stream of the one secret, and confirms each response, as
// Envoy does.
func openSecrets(ctx context.Context, conn *grpc.ClientConn) (func() error, error) {
	stream, err := secretv3.NewSecretDiscoveryServiceClient(conn).StreamSecrets(ctx)
	if err != nil {
		return nil, err
	}
	in := &discoveryv3.DiscoveryRequest{TypeUrl: secretType, ResourceNames: []string{"spiffe://bench.example" + pushed}}
	if err := stream.Send(in); err != nil {
		return nil, err
	}
	return func() error {
		r, err := stream.Recv()
		if err != nil {
			return err
		}
		if len(r.Resources) != 1 {
			return fmt.Errorf("got %d secrets", len(r.Resources))
		}
		in.VersionInfo, in.ResponseNonce = r.VersionInfo, r.Nonce
		return stream.Send(in)
	}, nil
}

// push has Envoy-like clients hold a thousand streams and changes their entry,
// so that all their certificates are replaced at once: the worst that a
// rotation can be.
func push(o options, p place, s *server) error {
	conn, err := dial(s.admin)
	if err != nil {
		return err
	}
	defer conn.Close()
	entries := entryv1.NewEntryClient(conn)
	id, err := create(entries, pushed, p.spire...)
	if err != nil {
		return err
	}
	fmt.Println()
	for _, shape := range [][2]int{{1, 1000}, {200, 5}} {
		took, err := pushTo(p, s, entries, id, shape[0], shape[1], o.rounds)
		if err != nil {
			return err
		}
		fmt.Printf("%-34s %8.0f ms, at most %.0f ms of %d times, target ≤ 1000 ms\n",
			fmt.Sprintf("SDS push, %d × %d streams", shape[0], shape[1]), middle(took).Seconds()*1000, slices.Max(took).Seconds()*1000, len(took))
	}
	_, err = entries.BatchDeleteEntry(context.Background(), &entryv1.BatchDeleteEntryRequest{Ids: []string{id}})
	return err
}

// pushTo returns how long after each change the last stream had the new
// certificate.
func pushTo(p place, s *server, entries entryv1.EntryClient, id string, processes, streams, rounds int) ([]time.Duration, error) {
	h, err := p.hold(s.socket, processes, streams, "sds")
	if err != nil {
		return nil, err
	}
	defer h.stop()
	var took []time.Duration
	for round := range rounds {
		start := time.Now()
		r, err := entries.BatchUpdateEntry(context.Background(), &entryv1.BatchUpdateEntryRequest{
			Entries:   []*types.Entry{{Id: id, DnsNames: []string{fmt.Sprintf("round-%d.%d.example", round, processes)}}},
			InputMask: &types.EntryMask{DnsNames: true},
		})
		if err != nil {
			return nil, err
		}
		if st := r.Results[0].Status; st.Code != 0 {
			return nil, fmt.Errorf("update entry: %s", st.Message)
		}
		var last time.Time
		for range processes * streams {
			var process, stream int
			var at int64
			select {
			case line, ok := <-h.lines:
				if !ok {
					return nil, fmt.Errorf("a holder of streams ended")
				}
				if _, err := fmt.Sscan(line, &process, &stream, &at); err != nil {
					return nil, err
				}
			case <-time.After(30 * time.Second):
				return nil, fmt.Errorf("some streams did not get the new certificate")
			}
			if t := time.Unix(0, at); t.After(last) {
				last = t
			}
		}
		took = append(took, last.Sub(start))
	}
	return took, nil
}
