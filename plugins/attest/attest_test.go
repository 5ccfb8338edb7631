package attest

import (
	"context"
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/hashicorp/go-hclog"
	"github.com/spiffe/go-spiffe/v2/exp/proto/spiffe/broker"
	"github.com/spiffe/spire-plugin-sdk/pluginsdk"
	"github.com/spiffe/spire-plugin-sdk/plugintest"
	workloadattestorv1 "github.com/spiffe/spire-plugin-sdk/proto/spire/plugin/agent/workloadattestor/v1"
	configv1 "github.com/spiffe/spire-plugin-sdk/proto/spire/service/common/config/v1"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/deputy-id/deputy/attestor"
	"github.com/deputy-id/deputy/attestor/peer"
	"github.com/deputy-id/deputy/test/engine"
)

// decodeJSON stands in for the configuration's own language.
func decodeJSON(text string) (s Settings, err error) {
	if text == "" {
		return s, nil
	}
	d := json.NewDecoder(strings.NewReader(text))
	d.DisallowUnknownFields()
	return s, d.Decode(&s)
}

// A client speaks to a plugin as SPIRE's agent does.
type client struct {
	workloadattestorv1.WorkloadAttestorPluginClient
	configv1.ConfigServiceClient
}

func serve(t *testing.T, p *Plugin) *client {
	t.Helper()
	c := new(client)
	plugintest.ServeInBackground(t, plugintest.Config{
		PluginServer:   workloadattestorv1.WorkloadAttestorPluginServer(p),
		PluginClient:   &c.WorkloadAttestorPluginClient,
		ServiceServers: []pluginsdk.ServiceServer{configv1.ConfigServiceServer(p)},
		ServiceClients: []pluginsdk.ServiceClient{&c.ConfigServiceClient},
	})
	return c
}

func TestMain(m *testing.M) {
	// A grandchild that waits, for tests that need another process.
	if len(os.Args) > 1 && os.Args[1] == "wait" {
		os.Stdin.Read(make([]byte, 1))
		return
	}
	os.Exit(engine.Main(m))
}

func (c *client) configure(t *testing.T, text string) {
	t.Helper()
	if _, err := c.Configure(t.Context(), &configv1.ConfigureRequest{HclConfiguration: text}); err != nil {
		t.Fatal(err)
	}
}

func (c *client) values(t *testing.T, pid int) []string {
	t.Helper()
	resp, err := c.Attest(t.Context(), &workloadattestorv1.AttestRequest{Pid: int32(pid)})
	if err != nil {
		t.Fatal(err)
	}
	return resp.SelectorValues
}

func reference(t *testing.T, m proto.Message) *anypb.Any {
	t.Helper()
	a, err := anypb.New(m)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

// waiting is a process of this program's that waits for the end of the test.
func waiting(t *testing.T) int {
	t.Helper()
	cmd := exec.Command(os.Args[0], "wait")
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		in.Close()
		cmd.Wait()
	})
	return cmd.Process.Pid
}

func TestAttestGivesPrefixedSelectors(t *testing.T) {
	c := serve(t, New(decodeJSON))
	c.configure(t, "")
	pid := waiting(t)
	got := c.values(t, pid)
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{
		"unix:uid:" + strconv.Itoa(os.Getuid()),
		"unix:path:" + exe,
		"process:parent_path:" + exe,
	} {
		if !slices.Contains(got, want) {
			t.Errorf("got %q, want %s among it", got, want)
		}
	}
	if !slices.ContainsFunc(got, func(s string) bool { return strings.HasPrefix(s, "unix:sha256:") }) {
		t.Errorf("got %q, want a digest of the executable among it", got)
	}

	resp, err := c.AttestReference(t.Context(), &workloadattestorv1.AttestReferenceRequest{
		Reference: reference(t, &broker.WorkloadPIDReference{Pid: int32(pid)}),
	})
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(got, resp.SelectorValues); diff != "" {
		t.Errorf("by reference (-by PID +by reference):\n%s", diff)
	}
}

func TestAttestOfOneTypeIsUnprefixed(t *testing.T) {
	c := serve(t, New(decodeJSON))
	c.configure(t, `{"Type": "unix", "NoDigests": true}`)
	got := c.values(t, os.Getpid())
	if want := "uid:" + strconv.Itoa(os.Getuid()); !slices.Contains(got, want) {
		t.Errorf("got %q, want %s among it", got, want)
	}
	for _, v := range got {
		if kind, _, _ := strings.Cut(v, ":"); !slices.Contains([]string{
			"uid", "gid", "user", "group", "supplementary_gid", "supplementary_group", "path",
		}, kind) {
			t.Errorf("got %q, want the kinds of type unix without digests", v)
		}
	}
}

func TestAttestRefuses(t *testing.T) {
	c := serve(t, New(decodeJSON))
	gone := exec.Command(os.Args[0], "wait") // without standard input it ends at once
	if err := gone.Run(); err != nil {
		t.Fatal(err)
	}
	attest := func(pid int) func() error {
		return func() error {
			_, err := c.Attest(t.Context(), &workloadattestorv1.AttestRequest{Pid: int32(pid)})
			return err
		}
	}
	byReference := func(a *anypb.Any) func() error {
		return func() error {
			_, err := c.AttestReference(t.Context(), &workloadattestorv1.AttestReferenceRequest{Reference: a})
			return err
		}
	}
	if got := status.Code(attest(os.Getpid())()); got != codes.FailedPrecondition {
		t.Errorf("before it is configured: got %v, want %v", got, codes.FailedPrecondition)
	}
	c.configure(t, "")
	malformed := reference(t, &broker.WorkloadPIDReference{Pid: 1})
	malformed.Value = []byte{0xff}
	for _, one := range []struct {
		name string
		do   func() error
		want codes.Code
	}{
		{"no PID", attest(0), codes.InvalidArgument},
		{"a negative PID", attest(-1), codes.InvalidArgument},
		{"a process that ended", attest(gone.Process.Pid), codes.NotFound},
		{"a PID that no process can have", attest(1<<31 - 1), codes.NotFound},
		{"no reference", byReference(nil), codes.InvalidArgument},
		{"a reference of another type", byReference(reference(t, durationpb.New(time.Duration(os.Getpid())*time.Second))), codes.InvalidArgument},
		{"a malformed reference", byReference(malformed), codes.InvalidArgument},
		{"a reference to no process", byReference(reference(t, &broker.WorkloadPIDReference{})), codes.InvalidArgument},
	} {
		if got := status.Code(one.do()); got != one.want {
			t.Errorf("%s: got %v, want %v", one.name, got, one.want)
		}
	}
}

// A fixed attestor says the same of each process.
type fixed struct {
	selectors []attestor.Selector
	err       error
	crash     bool
}

func (f fixed) Attest(context.Context, *peer.Process) ([]attestor.Selector, error) {
	if f.crash {
		panic("crash")
	}
	return f.selectors, f.err
}

// with is a plugin whose attestors are these.
func with(t *testing.T, s Settings, list ...attestor.Source) *client {
	t.Helper()
	p := New(decodeJSON)
	if err := p.open(); err != nil {
		t.Fatal(err)
	}
	p.current = &sources{settings: s, table: p.table, set: attestor.NewSet(hclog.NewNullLogger(), nil, list...)}
	return serve(t, p)
}

func TestAttestWithSomethingUnknown(t *testing.T) {
	fine := attestor.Source{Name: "fine", Prefixes: []string{"unix:"}, Attestor: fixed{selectors: []attestor.Selector{{Type: "unix", Value: "uid:7"}}}}
	down := attestor.Source{Name: "down", Prefixes: []string{"image:", "process:leader:"}, Attestor: fixed{err: errors.New("engine is down")}}
	crash := attestor.Source{Name: "crash", Prefixes: []string{"image:"}, Attestor: fixed{crash: true}}
	for _, c := range []struct {
		name     string
		settings Settings
		sources  []attestor.Source
		values   []string
		code     codes.Code
	}{
		{"gives what is certain", Settings{}, []attestor.Source{fine, down}, []string{"unix:uid:7"}, codes.OK},
		{"fails where that is asked for", Settings{DenyUnknown: true}, []attestor.Source{fine, down}, nil, codes.Unavailable},
		{"fails where nothing is certain", Settings{Type: "image"}, []attestor.Source{fine, down}, nil, codes.Unavailable},
		{"does not mind what is not asked for", Settings{Type: "unix", DenyUnknown: true}, []attestor.Source{fine, down}, []string{"uid:7"}, codes.OK},
		{"knows that part of a type is unknown", Settings{Type: "process"}, []attestor.Source{fine, down}, nil, codes.Unavailable},
		{"survives an attestor that panics", Settings{}, []attestor.Source{fine, crash}, []string{"unix:uid:7"}, codes.OK},
	} {
		t.Run(c.name, func(t *testing.T) {
			resp, err := with(t, c.settings, c.sources...).Attest(t.Context(), &workloadattestorv1.AttestRequest{Pid: int32(os.Getpid())})
			if got := status.Code(err); got != c.code {
				t.Fatalf("got %v, want %v", err, c.code)
			}
			if diff := cmp.Diff(c.values, resp.GetSelectorValues()); diff != "" {
				t.Errorf("selectors (-want +got):\n%s", diff)
			}
			if err != nil && !strings.Contains(err.Error(), "unknown: ") {
				t.Errorf("got %v, want what is unknown in it", err)
			}
		})
	}
}

func TestAttestOfATracedProcess(t *testing.T) {
	runtime.LockOSThread() // the tracer is a thread
	defer runtime.UnlockOSThread()
	cmd := exec.Command(os.Args[0], "wait")
	cmd.SysProcAttr = &syscall.SysProcAttr{Ptrace: true}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		cmd.Process.Kill()
		cmd.Wait()
	}()
	c := serve(t, New(decodeJSON))
	c.configure(t, "")
	_, err := c.Attest(t.Context(), &workloadattestorv1.AttestRequest{Pid: int32(cmd.Process.Pid)})
	if status.Code(err) != codes.Unavailable || !strings.Contains(err.Error(), "traced") {
		t.Errorf("got %v, want Unavailable for a traced process", err)
	}
	c.configure(t, `{"AllowTraced": true}`)
	if got := c.values(t, cmd.Process.Pid); len(got) == 0 {
		t.Error("got no selectors where tracing is allowed")
	}
}

func TestConfigureAgain(t *testing.T) {
	c := serve(t, New(decodeJSON))
	c.configure(t, `{"Type": "unix"}`)
	uid := "uid:" + strconv.Itoa(os.Getuid())
	if got := c.values(t, os.Getpid()); !slices.Contains(got, uid) {
		t.Fatalf("got %q, want %s among it", got, uid)
	}
	for _, broken := range []string{`{"Typ": "unix"}`, `{"Type": "nothing"}`, `{"Type": "image", "Systemd": true}`, `{`} {
		_, err := c.Configure(t.Context(), &configv1.ConfigureRequest{HclConfiguration: broken})
		if status.Code(err) != codes.InvalidArgument {
			t.Errorf("configure %s: got %v, want InvalidArgument", broken, err)
		}
		resp, err := c.Validate(t.Context(), &configv1.ValidateRequest{HclConfiguration: broken})
		if err != nil || resp.Valid || len(resp.Notes) == 0 {
			t.Errorf("validate %s: got %v, %v, want notes", broken, resp, err)
		}
		if got := c.values(t, os.Getpid()); !slices.Contains(got, uid) {
			t.Errorf("after %s: got %q, want what held before", broken, got)
		}
	}
	if resp, err := c.Validate(t.Context(), &configv1.ValidateRequest{HclConfiguration: `{"Type": "cgroup"}`}); err != nil || !resp.Valid {
		t.Errorf("got %v, %v, want valid", resp, err)
	}
	if got := c.values(t, os.Getpid()); !slices.Contains(got, uid) {
		t.Errorf("after validating: got %q, want what held before", got)
	}
	c.configure(t, "")
	if got := c.values(t, os.Getpid()); !slices.Contains(got, "unix:"+uid) {
		t.Errorf("got %q, want unix:%s among it", got, uid)
	}
}

func TestConfigureWhileAttesting(t *testing.T) {
	c := serve(t, New(decodeJSON))
	c.configure(t, "")
	pid := int32(os.Getpid())
	var calls sync.WaitGroup
	for range 4 {
		calls.Go(func() {
			for range 50 {
				resp, err := c.Attest(t.Context(), &workloadattestorv1.AttestRequest{Pid: pid})
				if err != nil || len(resp.SelectorValues) == 0 {
					t.Errorf("got %v, %v, want selectors", resp, err)
					return
				}
			}
		})
	}
	for i := range 20 {
		c.configure(t, []string{"", `{"Type": "unix"}`}[i%2])
	}
	calls.Wait()
}

// A slow attestor answers when it is told to.
type slow struct{ asked, answer chan struct{} }

func (s slow) Attest(context.Context, *peer.Process) ([]attestor.Selector, error) {
	close(s.asked)
	<-s.answer
	return []attestor.Selector{{Type: "unix", Value: "uid:7"}}, nil
}

func TestAttestationFinishesUnderWhatItBeganWith(t *testing.T) {
	p := New(decodeJSON)
	if err := p.open(); err != nil {
		t.Fatal(err)
	}
	one := slow{make(chan struct{}), make(chan struct{})}
	closed := make(chan struct{})
	p.current = &sources{
		table:  p.table,
		set:    attestor.NewSet(hclog.NewNullLogger(), nil, attestor.Source{Name: "slow", Prefixes: []string{"unix:"}, Attestor: one}),
		closes: []func() error{func() error { close(closed); return nil }},
	}
	c := serve(t, p)
	var call sync.WaitGroup
	call.Go(func() {
		if got := c.values(t, os.Getpid()); !slices.Equal(got, []string{"unix:uid:7"}) {
			t.Errorf("got %q, want what the attestor of the time said", got)
		}
	})
	<-one.asked
	c.configure(t, "")
	for range 20 { // time enough for what must not happen
		c.values(t, os.Getpid())
		select {
		case <-closed:
			t.Fatal("the attestor is closed while it is asked")
		default:
		}
	}
	close(one.answer)
	call.Wait()
	<-closed
}

func TestSettingsCheck(t *testing.T) {
	docker := &Docker{}
	for _, c := range []struct {
		settings Settings
		good     bool
	}{
		{Settings{}, true},
		{Settings{Type: "unix"}, true},
		{Settings{Type: "image"}, true},
		{Settings{Type: "image", Docker: docker}, true},
		{Settings{Type: "image", Systemd: true}, false},
		{Settings{Type: "systemd", Docker: docker}, false},
		{Settings{Type: "process", Docker: docker}, true},
		{Settings{Type: "images"}, false},
		{Settings{Type: "unix:"}, false},
	} {
		if err := c.settings.Check(); (err == nil) != c.good {
			t.Errorf("%+v: got %v, want an error: %t", c.settings, err, !c.good)
		}
	}
}

// Each type that one attestor alone gives is among those that are known.
func TestGivenTypesAreKnown(t *testing.T) {
	for name := range given {
		if !slices.Contains(attestor.KnownTypes(), name) {
			t.Errorf("%s is no type of selectors", name)
		}
	}
}

// A panic is one call's error: a plugin that ended would take every selector
// from every workload.
func TestAPanicIsAnError(t *testing.T) {
	c := serve(t, New(func(text string) (Settings, error) { panic(text) }))
	calls := map[string]func() error{
		"Configure": func() error {
			_, err := c.Configure(t.Context(), &configv1.ConfigureRequest{HclConfiguration: "x"})
			return err
		},
		"Validate": func() error {
			_, err := c.Validate(t.Context(), &configv1.ValidateRequest{HclConfiguration: "x"})
			return err
		},
	}
	for name, call := range calls {
		if got := status.Code(call()); got != codes.Internal {
			t.Errorf("%s: got %s, want %s", name, got, codes.Internal)
		}
	}
}
