package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"errors"
	"math/big"
	"net"
	"os"
	"os/signal"
	"runtime/debug"
	"strings"
	"syscall"
	"time"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	secretv3 "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/structpb"
)

// bare is what Deputy is measured beside: a gRPC server that knows nobody. It
// sends the bytes that Deputy sent, signs ES256 and verifies ES256, and does
// no more for it than the wire asks for.
type bare struct {
	workload.UnimplementedSpiffeWorkloadAPIServer
	x509 *workload.X509SVIDResponse
	bareSecrets
	key *ecdsa.PrivateKey
	id  string
}

// serveBare runs the bare server on a socket until it is interrupted. The
// file holds the X509SVIDResponse to send, as Deputy sent it, and the one with
// .sds behind its name the DiscoveryResponse.
func serveBare(socket, response string) error {
	raw, err := os.ReadFile(response)
	if err != nil {
		return err
	}
	b := &bare{x509: new(workload.X509SVIDResponse)}
	if err := proto.Unmarshal(raw, b.x509); err != nil {
		return err
	}
	if raw, err = os.ReadFile(response + ".sds"); err != nil {
		return err
	}
	b.secrets = new(discoveryv3.DiscoveryResponse)
	if err := proto.Unmarshal(raw, b.secrets); err != nil {
		return err
	}
	if len(b.x509.Svids) == 0 {
		return errors.New("the response to repeat has no SVID")
	}
	b.id = b.x509.Svids[0].SpiffeId
	if b.key, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader); err != nil {
		return err
	}
	os.Remove(socket)
	l, err := net.Listen("unix", socket)
	if err != nil {
		return err
	}
	if err := os.Chmod(socket, 0o666); err != nil {
		return err
	}
	s := grpc.NewServer()
	workload.RegisterSpiffeWorkloadAPIServer(s, b)
	secretv3.RegisterSecretDiscoveryServiceServer(s, &b.bareSecrets)
	collect := make(chan os.Signal, 1)
	signal.Notify(collect, syscall.SIGUSR1)
	go func() {
		for range collect {
			debug.FreeOSMemory()
		}
	}()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	go func() {
		<-ctx.Done()
		s.Stop()
	}()
	return s.Serve(l)
}

func (b *bare) FetchX509SVID(_ *workload.X509SVIDRequest, stream workload.SpiffeWorkloadAPI_FetchX509SVIDServer) error {
	if err := stream.Send(b.x509); err != nil {
		return err
	}
	<-stream.Context().Done()
	return nil
}

type claims struct {
	Sub string   `json:"sub"`
	Aud []string `json:"aud"`
	Exp int64    `json:"exp"`
	Iat int64    `json:"iat"`
	Jti string   `json:"jti"`
}

const header = `{"alg":"ES256","kid":"bare","typ":"JWT"}`

func (b *bare) FetchJWTSVID(_ context.Context, r *workload.JWTSVIDRequest) (*workload.JWTSVIDResponse, error) {
	now := time.Now()
	payload, err := json.Marshal(claims{b.id, r.Audience, now.Add(5 * time.Minute).Unix(), now.Unix(), rand.Text()})
	if err != nil {
		return nil, err
	}
	enc := base64.RawURLEncoding
	signed := enc.EncodeToString([]byte(header)) + "." + enc.EncodeToString(payload)
	digest := sha256.Sum256([]byte(signed))
	x, y, err := ecdsa.Sign(rand.Reader, b.key, digest[:])
	if err != nil {
		return nil, err
	}
	var sig [64]byte
	x.FillBytes(sig[:32])
	y.FillBytes(sig[32:])
	return &workload.JWTSVIDResponse{Svids: []*workload.JWTSVID{{
		SpiffeId: b.id, Svid: signed + "." + enc.EncodeToString(sig[:]),
	}}}, nil
}

func (b *bare) ValidateJWTSVID(_ context.Context, r *workload.ValidateJWTSVIDRequest) (*workload.ValidateJWTSVIDResponse, error) {
	parts := strings.Split(r.Svid, ".")
	if len(parts) != 3 {
		return nil, errors.New("not a token")
	}
	enc := base64.RawURLEncoding
	sig, err := enc.DecodeString(parts[2])
	if err != nil || len(sig) != 64 {
		return nil, errors.New("not a signature")
	}
	digest := sha256.Sum256([]byte(parts[0] + "." + parts[1]))
	if !ecdsa.Verify(&b.key.PublicKey, digest[:], new(big.Int).SetBytes(sig[:32]), new(big.Int).SetBytes(sig[32:])) {
		return nil, errors.New("bad signature")
	}
	payload, err := enc.DecodeString(parts[1])
	if err != nil {
		return nil, err
	}
	var all map[string]any
	if err := json.Unmarshal(payload, &all); err != nil {
		return nil, err
	}
	s, err := structpb.NewStruct(all)
	if err != nil {
		return nil, err
	}
	return &workload.ValidateJWTSVIDResponse{SpiffeId: b.id, Claims: s}, nil
}
