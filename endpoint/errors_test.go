package endpoint

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"

	"github.com/hashicorp/go-hclog"
	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/deputy-id/deputy/attestor"
	"github.com/deputy-id/deputy/svid/local"
	"github.com/deputy-id/deputy/svid/registry"
)

// TestErrorTable is what clients see, row by row.
func TestErrorTable(t *testing.T) {
	w := start(t, func(c *Config, _ *local.Options) {
		c.Limits = DefaultLimits(20000, 2)
	})
	w.entry("/a", func(e *registry.Entry) { e.Audiences = []string{"db", "web"} }, mine)
	w.entry("/others", nil, other)
	api := w.workloadAPI()
	x509 := func(ctx context.Context) error {
		st, err := api.FetchX509SVID(ctx, &workload.X509SVIDRequest{})
		if err != nil {
			return err
		}
		_, err = st.Recv()
		return err
	}
	x509Bundles := func(ctx context.Context) error {
		st, err := api.FetchX509Bundles(ctx, &workload.X509BundlesRequest{})
		if err != nil {
			return err
		}
		_, err = st.Recv()
		return err
	}
	jwtBundles := func(ctx context.Context) error {
		st, err := api.FetchJWTBundles(ctx, &workload.JWTBundlesRequest{})
		if err != nil {
			return err
		}
		_, err = st.Recv()
		return err
	}
	jwt := func(id string, audience ...string) func(context.Context) error {
		return func(ctx context.Context) error {
			_, err := api.FetchJWTSVID(ctx, &workload.JWTSVIDRequest{Audience: audience, SpiffeId: id})
			return err
		}
	}
	validate := func(audience, token string) func(context.Context) error {
		return func(ctx context.Context) error {
			_, err := api.ValidateJWTSVID(ctx, &workload.ValidateJWTSVIDRequest{Audience: audience, Svid: token})
			return err
		}
	}
	witSVID := func(ctx context.Context) error {
		st, err := api.FetchWITSVID(ctx, &workload.WITSVIDRequest{})
		if err != nil {
			return err
		}
		_, err = st.Recv()
		return err
	}
	witBundles := func(ctx context.Context) error {
		st, err := api.FetchWITBundles(ctx, &workload.WITBundlesRequest{})
		if err != nil {
			return err
		}
		_, err = st.Recv()
		return err
	}
	r, err := api.FetchJWTSVID(call(t), &workload.JWTSVIDRequest{Audience: []string{"db"}})
	if err != nil {
		t.Fatal(err)
	}
	token := r.Svids[0].Svid
	tampered := token[:len(token)-4] + "AAAA"

	has := func(ev *attestor.Evidence) {
		ev.Selectors, ev.Unknown, ev.Traced = []attestor.Selector{mine}, nil, false
	}
	nobody := func(ev *attestor.Evidence) { has(ev); ev.Selectors = nil }
	unknown := func(ev *attestor.Evidence) {
		nobody(ev)
		ev.Unknown = []attestor.Unknown{{Prefixes: []string{"unix:"}, Err: errors.New("timeout")}}
	}
	irrelevant := func(ev *attestor.Evidence) {
		nobody(ev)
		ev.Unknown = []attestor.Unknown{{Prefixes: []string{"docker:"}, Err: errors.New("timeout")}}
	}
	traced := func(ev *attestor.Evidence) { has(ev); ev.Traced = true }

	long := strings.Repeat("a", 2049)
	for _, c := range []struct {
		name     string
		evidence func(*attestor.Evidence)
		call     func(context.Context) error
		want     codes.Code
	}{
		{"no SPIFFE ID named", has, jwt("", "db"), codes.OK},
		{"several audiences", has, jwt("", "db", "web"), codes.OK},
		{"no audience", has, jwt(""), codes.InvalidArgument},
		{"empty audience", has, jwt("", "db", ""), codes.InvalidArgument},
		{"32 audiences", has, jwt("", strings.Split(strings.Repeat("db ", 31)+"web", " ")...), codes.OK},
		{"33 audiences", has, jwt("", strings.Split(strings.Repeat("db ", 32)+"web", " ")...), codes.InvalidArgument},
		{"audience of 2049 bytes", has, jwt("", long), codes.InvalidArgument},
		{"audience of a MiB", has, jwt("", strings.Repeat("a", 1<<20)), codes.InvalidArgument},
		{"audience of two MiB", has, jwt("", strings.Repeat("a", 2<<20)), codes.ResourceExhausted},
		{"audience not allowed", has, jwt("", "mail"), codes.PermissionDenied},
		{"one audience of two not allowed", has, jwt("", "db", "mail"), codes.PermissionDenied},
		{"SPIFFE ID malformed", has, jwt("a", "db"), codes.InvalidArgument},
		{"SPIFFE ID of another", has, jwt("spiffe://test.example/others", "db"), codes.PermissionDenied},
		{"SPIFFE ID of nobody", has, jwt("spiffe://test.example/nobody", "db"), codes.PermissionDenied},
		{"SPIFFE ID held", has, jwt("spiffe://test.example/a", "db"), codes.OK},
		{"X.509", has, x509, codes.OK},
		{"X.509 bundles", has, x509Bundles, codes.OK},
		{"JWT bundles", has, jwtBundles, codes.OK},
		{"no identity, X.509", nobody, x509, codes.PermissionDenied},
		{"no identity, JWT", nobody, jwt("", "db"), codes.PermissionDenied},
		{"no identity, X.509 bundles", nobody, x509Bundles, codes.PermissionDenied},
		{"no identity, JWT bundles", nobody, jwtBundles, codes.PermissionDenied},
		{"no identity, validate", nobody, validate("db", token), codes.OK},
		{"unknown, X.509", unknown, x509, codes.Unavailable},
		{"unknown, JWT", unknown, jwt("", "db"), codes.Unavailable},
		{"unknown, X.509 bundles", unknown, x509Bundles, codes.Unavailable},
		{"unknown, JWT bundles", unknown, jwtBundles, codes.Unavailable},
		{"unknown, validate", unknown, validate("db", token), codes.OK},
		{"unknown that no entry uses", irrelevant, x509, codes.PermissionDenied},
		{"traced, X.509", traced, x509, codes.PermissionDenied},
		{"traced, JWT", traced, jwt("", "db"), codes.PermissionDenied},
		{"validate without audience", has, validate("", token), codes.InvalidArgument},
		{"validate without token", has, validate("db", ""), codes.InvalidArgument},
		{"validate malformed", has, validate("db", "a.b.c"), codes.InvalidArgument},
		{"validate no token at all", has, validate("db", "\x00"), codes.InvalidArgument},
		{"validate tampered", has, validate("db", tampered), codes.InvalidArgument},
		{"validate for another audience", has, validate("web", token), codes.InvalidArgument},
		{"WIT-SVID", has, witSVID, codes.Unimplemented},
		{"WIT bundles", has, witBundles, codes.Unimplemented},
	} {
		t.Run(c.name, func(t *testing.T) {
			w.evidence.set(c.evidence)
			ctx, cancel := context.WithCancel(call(t))
			defer cancel()
			wantCode(t, c.call(ctx), c.want)
		})
	}
	w.evidence.set(has)
	for name, f := range map[string]func(context.Context) error{
		"FetchX509SVID": x509, "FetchX509Bundles": x509Bundles, "FetchJWTBundles": jwtBundles, "FetchJWTSVID": jwt("", "db"),
		"ValidateJWTSVID": validate("db", token), "FetchWITSVID": witSVID, "FetchWITBundles": witBundles,
	} {
		for header, values := range map[string][]string{
			"without header": nil, "header false": {"false"}, "header twice": {"true", "true"}, "header True": {"True"},
		} {
			t.Run(name+" "+header, func(t *testing.T) {
				md := metadata.MD{}
				md.Append("workload.spiffe.io", values...)
				ctx, cancel := context.WithCancel(metadata.NewOutgoingContext(context.Background(), md))
				defer cancel()
				wantCode(t, f(ctx), codes.InvalidArgument)
			})
		}
	}
}

func TestDenialsSayNothingAboutOthersEntries(t *testing.T) {
	w := start(t)
	w.entry("/a", nil, mine)
	w.entry("/others", nil, other)
	api := w.workloadAPI()
	ask := func(id string) string {
		_, err := api.FetchJWTSVID(call(t), &workload.JWTSVIDRequest{Audience: []string{"db"}, SpiffeId: domain.IDString() + id})
		return status.Convert(err).Message()
	}
	if theirs, nobodys := ask("/others"), ask("/nobody"); theirs != nobodys {
		t.Errorf("got %q for an ID of another and %q for one of nobody, want the same", theirs, nobodys)
	}
}

func TestDenialIsOneLineAndNotEachTime(t *testing.T) {
	w := start(t)
	api := w.workloadAPI()
	for range 50 {
		_, err := x509Stream(t, api).Recv()
		wantCode(t, err, codes.PermissionDenied)
	}
	log := w.log.String()
	n := strings.Count(log, "workload denied")
	if n < 1 || n > 8 {
		t.Errorf("got %d lines for 50 denials, want a few", n)
	}
	for _, want := range []string{"pid=", "uid=", `reason="no identity issued"`} {
		if !strings.Contains(log, want) {
			t.Errorf("got log %q, want %s in it", log, want)
		}
	}
}

func TestEachCallIsALineAtDebugAlone(t *testing.T) {
	w := start(t)
	w.entry("/a", nil, mine)
	api := w.workloadAPI()
	ask := func() {
		recv(t, x509Stream(t, api), "/a")
		if _, err := api.FetchJWTSVID(call(t), &workload.JWTSVIDRequest{Audience: []string{"db"}}); err != nil {
			t.Fatal(err)
		}
	}
	ask()
	if log := w.log.String(); strings.Contains(log, "calls") {
		t.Errorf("got log %q at info, want no line of a call", log)
	}
	w.Log.SetLevel(hclog.Debug)
	ask()
	for _, method := range []string{"FetchX509SVID", "FetchJWTSVID"} {
		line := fmt.Sprintf("workload calls: method=%s pid=%d", method, os.Getpid())
		if log := w.log.String(); strings.Count(log, line) != 1 {
			t.Errorf("got log %q, want one line %q", log, line)
		}
	}
}

func TestCodeOfWrappedErrors(t *testing.T) {
	for _, c := range codeOf {
		if got := code(fmt.Errorf("do a thing: %w", c.err)); got != c.code {
			t.Errorf("got %v for %q, want %v", got, c.err, c.code)
		}
	}
	if got := code(errors.New("disk is on fire")); got != codes.Internal {
		t.Errorf("got %v for an error nobody knows, want Internal", got)
	}
	if got := status.Convert(workloadStatus(errors.New("disk is on fire"))).Message(); strings.Contains(got, "disk") {
		t.Errorf("a workload was told %q", got)
	}
}
