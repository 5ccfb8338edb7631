package endpoint

import (
	"slices"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	delegatedv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/agent/delegatedidentity/v1"
	"google.golang.org/grpc/codes"

	"github.com/deputy-id/deputy/attestor"
)

func TestBrokersAreOthersWithoutARestart(t *testing.T) {
	b := startBrokering(t)
	b.entry("/a", nil, mine)
	b.entry("/demo", nil, attestor.Selector{Type: "k8s", Value: "pod-name:demo"})
	_, pid := b.sleeperOf(mine)
	before := b.Config.Borrowers
	byPID, byPod := subscribe(t, b.api, toPID(t, pid)), subscribe(t, b.api, toPod(t, "demo", ""))
	brokered(t, byPID, "/a")
	brokered(t, byPod, "/demo")
	newID := spiffeid.RequireFromPath(domain, "/new")
	stranger := b.connect("unix://"+b.unix, b.svid(newID, time.Hour))
	wantEnd(t, subscribe(t, stranger, toPID(t, pid)), codes.PermissionDenied, "")

	// One of its kinds of reference is taken away, and somebody comes.
	after := Borrowers{Brokers: slices.Clone(before.Brokers)}
	after.Brokers[0].References = References{Kubernetes: true}
	after.Brokers = append(after.Brokers, Broker{ID: newID, References: References{PID: true}})
	b.SetBorrowers(after)
	wantEnd(t, byPID, codes.PermissionDenied, "")
	wantEnd(t, subscribe(t, b.api, toPID(t, pid)), codes.PermissionDenied, "")
	brokered(t, subscribe(t, b.api, toPod(t, "demo", "")), "/demo")
	brokered(t, subscribe(t, stranger, toPID(t, pid)), "/a")

	// It is taken off the list, and put there again.
	b.SetBorrowers(Borrowers{Brokers: after.Brokers[1:]})
	wantEnd(t, byPod, codes.PermissionDenied, "")
	wantEnd(t, subscribe(t, b.api, toPod(t, "demo", "")), codes.PermissionDenied, "")
	b.SetBorrowers(before)
	brokered(t, subscribe(t, b.api, toPID(t, pid)), "/a")
}

func TestDelegatesAreOthersWithoutARestart(t *testing.T) {
	w := startLending(t)
	w.entry("/a", nil, mesh)
	before := w.Config.Borrowers
	st := w.told(mesh)
	w.lent(st, "/a")
	bundles, err := w.api.SubscribeToX509Bundles(call(t), &delegatedv1.SubscribeToX509BundlesRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := bundles.Recv(); err != nil {
		t.Fatal(err)
	}
	w.SetBorrowers(Borrowers{Delegates: []spiffeid.ID{spiffeid.RequireFromPath(domain, "/another")}})
	ended(t, st, codes.PermissionDenied)
	if _, err := bundles.Recv(); err == nil {
		t.Error("the stream of bundles goes on")
	} else {
		wantCode(t, err, codes.PermissionDenied)
	}
	ended(t, w.told(mesh), codes.PermissionDenied)
	w.SetBorrowers(before)
	w.lent(w.told(mesh), "/a")
}
