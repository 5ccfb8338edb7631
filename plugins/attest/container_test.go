package attest

import (
	"encoding/json"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	workloadattestorv1 "github.com/spiffe/spire-plugin-sdk/proto/spire/plugin/agent/workloadattestor/v1"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/deputy-id/deputy/test/engine"
)

func TestAttestOfARealContainer(t *testing.T) {
	e := engine.Start(t)
	image := e.Image(t, engine.Image{Content: t.Name()})
	c := e.Run(t, image, "sleep")
	text := func(s Settings) string {
		s.Docker = &Docker{Socket: e.Socket()}
		b, err := json.Marshal(s)
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
	all, one := serve(t, New(decodeJSON)), serve(t, New(decodeJSON))
	all.configure(t, text(Settings{}))
	one.configure(t, text(Settings{Type: "image"}))

	got := all.values(t, c.PID)
	for _, want := range []string{"image:config_digest:" + image, "container:id:" + c.ID, "process:leader:true", "cgroup:path:/docker/" + c.ID} {
		if !slices.Contains(got, want) {
			t.Errorf("got %q, want %s among it", got, want)
		}
	}
	if slices.Contains(got, "process:host:true") {
		t.Error("a container passes for the host")
	}
	if got, want := one.values(t, c.PID), "config_digest:"+image; !slices.Contains(got, want) {
		t.Errorf("got %q, want %s among it", got, want)
	}

	// The engine stops answering, and what was kept is dropped.
	resume := e.Freeze(t)
	defer resume()
	all.configure(t, text(Settings{}))
	one.configure(t, text(Settings{Type: "image"}))
	var calls sync.WaitGroup
	calls.Go(func() {
		resp, err := all.Attest(t.Context(), &workloadattestorv1.AttestRequest{Pid: int32(c.PID)})
		got := resp.GetSelectorValues()
		if err != nil || !slices.Contains(got, "cgroup:path:/docker/"+c.ID) || slices.ContainsFunc(got, func(s string) bool { return strings.HasPrefix(s, "image:") }) {
			t.Errorf("all types without the engine: got %q, %v; want what is certain", got, err)
		}
	})
	calls.Go(func() {
		_, err := one.Attest(t.Context(), &workloadattestorv1.AttestRequest{Pid: int32(c.PID)})
		if status.Code(err) != codes.Unavailable {
			t.Errorf("one type without the engine: got %v, want Unavailable", err)
		}
	})
	calls.Wait()

	resume()
	for end := time.Now().Add(20 * time.Second); ; time.Sleep(50 * time.Millisecond) {
		resp, err := one.Attest(t.Context(), &workloadattestorv1.AttestRequest{Pid: int32(c.PID)})
		if err == nil && slices.Contains(resp.SelectorValues, "config_digest:"+image) {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("with the engine again: got %v, %v", resp, err)
		}
	}
}
