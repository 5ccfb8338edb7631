package peers

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/deputy-id/deputy/test/binary"
)

// BenchmarkMint compares three stock servers: without a plugin, with
// deputy-claims, and with one that does nothing. They are asked in turn, call by
// call, so that whatever else the machine does falls on all of them. It reports
// medians, in microseconds, and ratios: of what a workload waits for, a token
// from the agent for an audience that is new to it, and of the server's own part
// in that.
func BenchmarkMint(b *testing.B) {
	composer := `CredentialComposer "deputy"`
	servers := []*spire{
		newSPIRE(b, changes{agent: withoutAttest, server: without(composer)}),
		newSPIRE(b, changes{agent: withoutAttest}),
		newSPIRE(b, changes{agent: withoutAttest, server: func(text string) string {
			block := fmt.Sprintf("plugins {\n  %s {\n    plugin_cmd = %q\n  }\n", composer, binary.Program(b, "test/composer"))
			return strings.Replace(without(composer)(text), "plugins {\n", block, 1)
		}}),
	}
	var fetch, mint [3]func(string) error
	for i, s := range servers {
		s.startServer(b)
		s.researchers(b)
		s.startAgent(b)
		claim := s.mustJWT(b, researcher, "before").Claims["delegation"]
		if (claim != nil) != (i == 1) {
			b.Fatalf("got the claim %v, want one with deputy-claims alone", claim)
		}
		fetch[i], mint[i] = s.fetcher(b), s.minter(b)
	}
	b.Run("workload", func(b *testing.B) { compare(b, fetch) })
	b.Run("server", func(b *testing.B) { compare(b, mint) })
}

// compare measures the three in turn, each of them first every third time.
func compare(b *testing.B, calls [3]func(audience string) error) {
	var took [3][]time.Duration
	for n := 0; b.Loop(); n++ {
		for i := range calls {
			which := (i + n) % len(calls)
			begin := time.Now()
			if err := calls[which](fmt.Sprintf("%d-%d", begin.UnixNano(), n)); err != nil {
				b.Fatal(err)
			}
			took[which] = append(took[which], time.Since(begin))
		}
	}
	var median [3]float64
	for i, d := range took {
		slices.Sort(d)
		median[i] = float64(d[len(d)/2].Nanoseconds()) / 1e3
	}
	b.ReportMetric(median[0], "µs-without")
	b.ReportMetric(median[1], "µs-with")
	b.ReportMetric(median[2], "µs-empty-plugin")
	b.ReportMetric(median[1]/median[0], "with/without")
	b.ReportMetric(median[1]/median[2], "with/empty-plugin")
	b.ReportMetric(0, "ns/op") // of all three together: it says nothing
}

// fetcher gets tokens from the agent, over one connection.
func (s *spire) fetcher(b *testing.B) func(string) error {
	c, err := workloadapi.New(b.Context(), workloadapi.WithAddr("unix://"+s.workload))
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { c.Close() })
	subject := spiffeid.RequireFromString("spiffe://example.org" + researcher)
	return func(audience string) error {
		_, err := c.FetchJWTSVID(b.Context(), jwtsvid.Params{Audience: audience, Subject: subject})
		return err
	}
}

// minter gets tokens from the server, over one connection to its own socket.
func (s *spire) minter(b *testing.B) func(string) error {
	conn, err := grpc.NewClient("unix://"+s.serverSock, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { conn.Close() })
	c := svidv1.NewSVIDClient(conn)
	return func(audience string) error {
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		_, err := c.MintJWTSVID(ctx, &svidv1.MintJWTSVIDRequest{
			Id:       &types.SPIFFEID{TrustDomain: "example.org", Path: researcher},
			Audience: []string{audience},
		})
		return err
	}
}
