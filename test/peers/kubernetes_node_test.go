package peers

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/exp/proto/spiffe/broker"
	"github.com/spiffe/go-spiffe/v2/spiffegrpc/grpccredentials"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/deputy-id/deputy/test/page"
	"github.com/deputy-id/deputy/test/scratch"
	"github.com/deputy-id/deputy/test/wait"
)

const (
	containerUID = 12345 // whom the pods' programs run as
	ownerUID     = "11111111-2222-4333-8444-555555555555"
)

// podEntries are beside the page's, which is of any pod with an account.
const podEntries = `
entry "/pod/{{k8s.pod-name}}/{{k8s.pod-uid}}" {
  selectors = ["k8s:pod-label:uid:yes"]
}

entry "/exact" {
  selectors = [
    "k8s:ns:default", "k8s:sa:workload", "k8s:node-name:NODE", "k8s:pod-name:exact", "k8s:pod-label:app:exact",
    "k8s:pod-image:IMAGE", "k8s:pod-image:REPOSITORY@DIGEST", "k8s:pod-image-count:1",
    "k8s:pod-owner:ReplicaSet:set", "k8s:pod-owner-uid:ReplicaSet:OWNER",
    "k8s:pod-init-image:IMAGE", "k8s:pod-init-image:REPOSITORY@DIGEST", "k8s:pod-init-image-count:1",
  ]
}

entry "/prod" {
  selectors = ["k8s:pod-label:tier:prod"]
}

entry "/asks" {
  selectors = ["k8s:pod-image:nowhere.example/none:1", "k8s:pod-image-count:1"]
}

entry "/static" {
  selectors = ["k8s:ns:default", "k8s:pod-label:app:static"]
}

entry "/process" {
  selectors = ["unix:uid:12345"]
}
`

// A nodeBroker asks a daemon for the SVIDs of a node's pods.
type nodeBroker struct {
	*kubeNode
	*host
	api   broker.APIClient
	token string // file
}

// startBroker starts a daemon with the page's configuration, and a broker. ca
// is the file by which the kubelet is verified.
func (n *kubeNode) startBroker(t *testing.T, ca string) *nodeBroker {
	t.Helper()
	b := &nodeBroker{kubeNode: n, token: filepath.Join(scratch.Dir(t), "kubelet.token")}
	b.give(t, n.accountToken(t, "deputy", "deputy"))
	config := page.Change(t, meshBlocks(t, "Brokers", "hcl")[1], `["kubernetes"]`, `["pid", "kubernetes"]`,
		"https://node-1:10250", n.kubelet, "/etc/deputy/kubelet.token", b.token, "/var/lib/kubelet/pki/kubelet.crt", ca,
		"unix:uid:990", fmt.Sprint("unix:uid:", os.Getuid()), "k8s:node-name:node-1", "k8s:node-name:"+n.name)
	more := strings.NewReplacer("NODE", n.name, "IMAGE", n.image, "REPOSITORY", strings.TrimSuffix(n.image, ":1"), "DIGEST", n.digest, "OWNER", ownerUID).Replace(podEntries)
	b.host = start(t, "", config+more)

	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	own, err := workloadapi.NewX509Source(ctx, workloadapi.WithClientOptions(workloadapi.WithAddr("unix://"+b.Workload)),
		workloadapi.WithDefaultX509SVIDPicker(func(all []*x509svid.SVID) *x509svid.SVID {
			return all[slices.IndexFunc(all, func(s *x509svid.SVID) bool { return s.ID.Path() == "/runtime" })]
		}))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { own.Close() })
	daemon := spiffeid.RequireFromString("spiffe://example.org/spire/agent/deputy/local")
	conn, err := grpc.NewClient("unix://"+filepath.Join(b.Dir, "broker/broker.sock"),
		grpc.WithTransportCredentials(grpccredentials.MTLSClientCredentials(own, own, tlsconfig.AuthorizeID(daemon))))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	b.api = broker.NewAPIClient(conn)
	return b
}

// give makes this the token by which the kubelet is asked.
func (b *nodeBroker) give(t *testing.T, token string) {
	t.Helper()
	if err := os.WriteFile(b.token+".new", []byte(token), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(b.token+".new", b.token); err != nil {
		t.Fatal(err)
	}
}

func brokerCall(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), 60*time.Second)
	t.Cleanup(cancel)
	return metadata.AppendToOutgoingContext(ctx, "broker.spiffe.io", "true")
}

func refer(t *testing.T, m proto.Message) *broker.WorkloadReference {
	t.Helper()
	one, err := anypb.New(m)
	if err != nil {
		t.Fatal(err)
	}
	return &broker.WorkloadReference{Reference: one}
}

// toPod refers to a pod of the namespace default; name or uid may be empty.
func toPod[UID ~string](t *testing.T, name string, uid UID) *broker.WorkloadReference {
	m := &broker.KubernetesObjectReference{Type: &broker.KubernetesObjectType{Plural: "pods", Group: "core"}, Uid: string(uid)}
	if name != "" {
		m.Key = &broker.KubernetesObjectKey{Namespace: "default", Name: name}
	}
	return refer(t, m)
}

type brokerStream = grpc.ServerStreamingClient[broker.SubscribeToX509SVIDResponse]

func (b *nodeBroker) subscribe(t *testing.T, ref *broker.WorkloadReference) brokerStream {
	t.Helper()
	st, err := b.api.SubscribeToX509SVID(brokerCall(t), &broker.SubscribeToX509SVIDRequest{Reference: ref})
	if err != nil {
		t.Fatal(err)
	}
	return st
}

// until reads messages until one has the SVIDs of these paths and no other.
func until(t *testing.T, st brokerStream, want ...string) {
	t.Helper()
	var last []string
	for {
		r, err := st.Recv()
		if err != nil {
			t.Fatalf("got %q and then %v, want %q", last, err, want)
		}
		last = nil
		for _, s := range r.Svids {
			one, err := x509svid.ParseRaw(s.X509Svid, s.X509SvidKey)
			if err != nil || one.ID.String() != s.SpiffeId {
				t.Fatalf("got %v, %v, want an SVID of %s", one, err, s.SpiffeId)
			}
			last = append(last, one.ID.Path())
		}
		slices.Sort(last)
		if slices.Equal(last, slices.Sorted(slices.Values(want))) {
			return
		}
	}
}

// ends reads messages until the stream ends, and wants this code and reason.
func ends(t *testing.T, st brokerStream, code codes.Code, reason string) {
	t.Helper()
	for {
		if _, err := st.Recv(); err != nil {
			wantStatus(t, err, code, reason)
			return
		}
	}
}

func reasonOf(err error) (reason string) {
	for _, d := range status.Convert(err).Details() {
		if info, ok := d.(*errdetails.ErrorInfo); ok && info.Domain == "spiffe.io" {
			reason = info.Reason
		}
	}
	return reason
}

func wantStatus(t *testing.T, err error, code codes.Code, reason string) {
	t.Helper()
	if status.Code(err) != code || reasonOf(err) != reason {
		t.Fatalf("got %v with %q, want %v with %q", err, reasonOf(err), code, reason)
	}
}

// fetch is one call: a JWT-SVID for the workload.
func (b *nodeBroker) fetch(t *testing.T, ref *broker.WorkloadReference) ([]*broker.JWTSVID, error) {
	t.Helper()
	r, err := b.api.FetchJWTSVID(brokerCall(t), &broker.FetchJWTSVIDRequest{Reference: ref, Audience: []string{"api"}})
	return r.GetSvids(), err
}

// becomesUnavailable asks until the answer is Unavailable: what the kubelet said
// last holds for a second. In between there is no other answer than the first.
func (b *nodeBroker) becomesUnavailable(t *testing.T, ref *broker.WorkloadReference) {
	t.Helper()
	wait.Until(t, "Unavailable", func() bool {
		_, err := b.fetch(t, ref)
		if err == nil {
			return false
		}
		wantStatus(t, err, codes.Unavailable, "")
		return true
	})
}

func (b *nodeBroker) becomesAvailable(t *testing.T, ref *broker.WorkloadReference) {
	t.Helper()
	wait.Until(t, "an answer", func() bool {
		_, err := b.fetch(t, ref)
		if err != nil {
			wantStatus(t, err, codes.Unavailable, "")
		}
		return err == nil
	})
}

const workloadID = "/ns/default/sa/workload"

// A real node: what the kubelet says of pods, what becomes of a broker's streams
// when they change, and when the kubelet does not say anything.
func TestBrokerNamesPodsOfARealNode(t *testing.T) {
	n := startKubernetes(t)
	n.apply(t, meshBlocks(t, "Brokers", "yaml")[0])
	n.apply(t, "kind: ServiceAccount\napiVersion: v1\nmetadata: {name: workload, namespace: default}")
	// As kubeadm leaves it: a certificate that the kubelet made for its node's name.
	b := n.startBroker(t, filepath.Join(n.dir, "pki/kubelet.crt"))

	t.Run("pod has the selectors of the page", func(t *testing.T) {
		p := n.run(t, "exact", func(p *corev1.Pod) {
			always := corev1.ContainerRestartPolicyAlways
			p.Spec.InitContainers = []corev1.Container{{Name: "side", Image: n.image, RestartPolicy: &always}}
			p.OwnerReferences = []metav1.OwnerReference{{APIVersion: "apps/v1", Kind: "ReplicaSet", Name: "set", UID: ownerUID}}
		})
		for name, ref := range map[string]*broker.WorkloadReference{
			"by name": toPod(t, "exact", ""), "by UID": toPod(t, "", p.UID), "by both": toPod(t, "exact", p.UID),
		} {
			t.Run(name, func(t *testing.T) {
				until(t, b.subscribe(t, ref), workloadID, "/exact")
				tokens, err := b.fetch(t, ref)
				if err != nil {
					t.Fatal(err)
				}
				var got []string
				for _, s := range tokens {
					if sub := claimed(t, s.Svid); sub != s.SpiffeId {
						t.Errorf("got a token of %s, want one of %s", sub, s.SpiffeId)
					}
					got = append(got, s.SpiffeId)
				}
				slices.Sort(got)
				if want := []string{"spiffe://example.org/exact", "spiffe://example.org" + workloadID}; !slices.Equal(got, want) {
					t.Errorf("got tokens of %q, want %q", got, want)
				}
			})
		}
	})

	t.Run("pod is not another one", func(t *testing.T) {
		one, two := n.run(t, "one", nil), n.run(t, "two", nil)
		until(t, b.subscribe(t, toPod(t, "two", two.UID)), workloadID)
		for name, ref := range map[string]*broker.WorkloadReference{
			"no such name":           toPod(t, "three", ""),
			"no such UID":            toPod(t, "", "00000000-0000-4000-8000-000000000000"),
			"the UID of another pod": toPod(t, "two", one.UID),
			"another namespace": refer(t, &broker.KubernetesObjectReference{
				Type: &broker.KubernetesObjectType{Plural: "pods", Group: "core"},
				Key:  &broker.KubernetesObjectKey{Namespace: "kube-system", Name: "one"},
			}),
		} {
			t.Run(name, func(t *testing.T) {
				t.Parallel()
				ends(t, b.subscribe(t, ref), codes.NotFound, "WORKLOAD_NOT_FOUND")
				_, err := b.fetch(t, ref)
				wantStatus(t, err, codes.NotFound, "WORKLOAD_NOT_FOUND")
			})
		}
	})

	t.Run("labels change the identities", func(t *testing.T) {
		n.run(t, "labelled", nil)
		st := b.subscribe(t, toPod(t, "labelled", ""))
		until(t, st, workloadID)
		n.call(t, http.MethodPatch, kubePods+"/labelled", mergePatch(`{"metadata":{"labels":{"tier":"prod"}}}`), nil)
		until(t, st, workloadID, "/prod")
		n.call(t, http.MethodPatch, kubePods+"/labelled", mergePatch(`{"metadata":{"labels":{"tier":null}}}`), nil)
		until(t, st, workloadID)
	})

	t.Run("pod that is replaced is gone", func(t *testing.T) {
		label := func(p *corev1.Pod) { p.Labels["uid"] = "yes" }
		old := n.run(t, "again", label)
		streams := []brokerStream{b.subscribe(t, toPod(t, "again", "")), b.subscribe(t, toPod(t, "", old.UID))}
		for _, st := range streams {
			until(t, st, workloadID, "/pod/again/"+string(old.UID))
		}
		n.delete(t, "again")
		wait.Until(t, "that the pod is gone", func() bool { return n.try(http.MethodGet, kubePods+"/again", nil, nil) == http.StatusNotFound })
		now := n.run(t, "again", label)
		for _, st := range streams {
			ends(t, st, codes.NotFound, "WORKLOAD_NOT_FOUND")
		}
		if now.UID == old.UID {
			t.Fatal("the new pod has the UID of the old one")
		}
		until(t, b.subscribe(t, toPod(t, "again", "")), workloadID, "/pod/again/"+string(now.UID))
		ends(t, b.subscribe(t, toPod(t, "again", old.UID)), codes.NotFound, "WORKLOAD_NOT_FOUND")
	})

	t.Run("pod that has not started is one", func(t *testing.T) {
		n.create(t, "pending", func(p *corev1.Pod) {
			p.Spec.Containers[0].Image, p.Spec.Containers[0].ImagePullPolicy = "nowhere.example/none:1", corev1.PullNever
		})
		wait.Until(t, "that the image is not found", func() bool {
			p := new(corev1.Pod)
			n.try(http.MethodGet, kubePods+"/pending", nil, p)
			return p.Status.Phase == corev1.PodPending && len(p.Status.ContainerStatuses) == 1 &&
				p.Status.ContainerStatuses[0].State.Waiting != nil && p.Status.ContainerStatuses[0].State.Waiting.Reason == "ErrImageNeverPull"
		})
		until(t, b.subscribe(t, toPod(t, "pending", "")), workloadID, "/asks")
	})

	t.Run("pod that shuts down is there until it has ended", func(t *testing.T) {
		grace := int64(60)
		p := n.run(t, "ending", func(p *corev1.Pod) { p.Spec.TerminationGracePeriodSeconds = &grace })
		pid := n.pid(t, p)
		ref := toPod(t, "ending", "")
		st := b.subscribe(t, ref)
		until(t, st, workloadID)
		if err := syscall.Kill(pid, syscall.SIGSTOP); err != nil { // it does not hear SIGTERM
			t.Fatal(err)
		}
		n.delete(t, "ending")
		n.call(t, http.MethodGet, kubePods+"/ending", nil, p)
		if p.DeletionTimestamp == nil {
			t.Fatal("the pod is not being deleted")
		}
		n.call(t, http.MethodPatch, kubePods+"/ending", mergePatch(`{"metadata":{"labels":{"tier":"prod"}}}`), nil)
		until(t, st, workloadID, "/prod") // so the kubelet knows of it
		if _, err := b.fetch(t, ref); err != nil {
			t.Error(err)
		}
		if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
		ends(t, st, codes.NotFound, "WORKLOAD_NOT_FOUND")
	})

	never := func(p *corev1.Pod) { p.Spec.RestartPolicy = corev1.RestartPolicyNever }
	t.Run("pod that has ended is gone", func(t *testing.T) {
		p := n.run(t, "ended", never)
		st := b.subscribe(t, toPod(t, "ended", ""))
		until(t, st, workloadID)
		if err := syscall.Kill(n.pid(t, p), syscall.SIGTERM); err != nil {
			t.Fatal(err)
		}
		n.becomes(t, "ended", corev1.PodSucceeded)
		ends(t, st, codes.NotFound, "WORKLOAD_NOT_FOUND")
	})

	t.Run("pod that has failed is gone", func(t *testing.T) {
		n.create(t, "failed", func(p *corev1.Pod) {
			never(p)
			p.Spec.Containers[0].Args = []string{"nothing"}
		})
		n.becomes(t, "failed", corev1.PodFailed)
		wait.Until(t, "that the kubelet knows", func() bool {
			_, err := b.fetch(t, toPod(t, "failed", ""))
			return status.Code(err) == codes.NotFound && reasonOf(err) == "WORKLOAD_NOT_FOUND"
		})
	})

	t.Run("static pod has the UID of the kubelet", func(t *testing.T) {
		n.write(t, "manifests/static.json", fmt.Appendf(nil,
			`{"apiVersion":"v1","kind":"Pod","metadata":{"name":"static","namespace":"default","labels":{"app":"static"}},`+
				`"spec":{"hostNetwork":true,"terminationGracePeriodSeconds":1,"containers":[{"name":"main","image":%q}]}}`, n.image))
		mirror := n.becomes(t, "static-"+n.name, corev1.PodRunning)
		uid := mirror.Annotations["kubernetes.io/config.mirror"]
		if uid == "" || uid == string(mirror.UID) {
			t.Fatalf("got the UIDs %q and %q, want two", uid, mirror.UID)
		}
		st := b.subscribe(t, toPod(t, mirror.Name, ""))
		until(t, st, "/static")
		until(t, b.subscribe(t, toPod(t, "", uid)), "/static")
		ends(t, b.subscribe(t, toPod(t, mirror.Name, mirror.UID)), codes.NotFound, "WORKLOAD_NOT_FOUND")
		// The mirror is only a picture: who deletes it deletes no pod.
		n.delete(t, mirror.Name)
		wait.Until(t, "another mirror", func() bool {
			now := new(corev1.Pod)
			n.try(http.MethodGet, kubePods+"/"+mirror.Name, nil, now)
			return now.UID != "" && now.UID != mirror.UID
		})
		until(t, b.subscribe(t, toPod(t, "", uid)), "/static")
		if err := os.Remove(filepath.Join(n.dir, "manifests/static.json")); err != nil {
			t.Fatal(err)
		}
		ends(t, st, codes.NotFound, "WORKLOAD_NOT_FOUND")
	})

	t.Run("process of a pod is one like any other", func(t *testing.T) {
		p := n.run(t, "process", nil)
		pid := n.pid(t, p)
		st := b.subscribe(t, refer(t, &broker.WorkloadPIDReference{Pid: int32(pid)}))
		until(t, st, "/process")
		n.delete(t, "process")
		ends(t, st, codes.NotFound, "WORKLOAD_NOT_FOUND")
	})

	t.Run("kubelet is asked with a token that may", func(t *testing.T) {
		n.run(t, "token", nil)
		ref := toPod(t, "token", "")
		st := b.subscribe(t, ref)
		until(t, st, workloadID)
		good, err := os.ReadFile(b.token)
		if err != nil {
			t.Fatal(err)
		}
		for name, token := range map[string]string{
			"of nobody": "nobody", "that is broken": string(good[:len(good)-8]) + "AAAAAAAA", "of an account that may not": n.accountToken(t, "default", "workload"),
		} {
			t.Run(name, func(t *testing.T) {
				b.give(t, token)
				b.becomesUnavailable(t, ref)
				b.give(t, string(good))
				b.becomesAvailable(t, ref)
			})
		}
		// The stream that was open has lived through it.
		n.call(t, http.MethodPatch, kubePods+"/token", mergePatch(`{"metadata":{"labels":{"tier":"prod"}}}`), nil)
		until(t, st, workloadID, "/prod")
	})

	t.Run("kubelet that another CA vouches for is not asked", func(t *testing.T) {
		n.run(t, "ca", nil)
		other := n.startBroker(t, filepath.Join(n.dir, "ca.pem"))
		_, err := other.fetch(t, toPod(t, "ca", ""))
		wantStatus(t, err, codes.Unavailable, "")
	})

	t.Run("kubelet that does not answer takes nothing away", func(t *testing.T) {
		p := n.run(t, "kept", nil)
		ref := toPod(t, "kept", p.UID)
		st := b.subscribe(t, ref)
		until(t, st, workloadID)
		n.signal(t, "kubelet", syscall.SIGSTOP)
		b.becomesUnavailable(t, ref)
		n.signal(t, "kubelet", syscall.SIGCONT)
		b.becomesAvailable(t, ref)
		n.signal(t, "kubelet", syscall.SIGTERM)
		b.becomesUnavailable(t, ref)
		n.startKubelet(t)
		b.becomesAvailable(t, ref)
		n.call(t, http.MethodPatch, kubePods+"/kept", mergePatch(`{"metadata":{"labels":{"tier":"prod"}}}`), nil)
		until(t, st, workloadID, "/prod")
	})
}

// claimed is the subject of a token, which the daemon signed a moment ago.
func claimed(t *testing.T, token string) string {
	t.Helper()
	parts := strings.Split(token, ".")
	if len(parts) != 3 {
		t.Fatalf("got %d parts, want a JWT", len(parts))
	}
	b, err := base64.RawURLEncoding.DecodeString(parts[1])
	if err != nil {
		t.Fatal(err)
	}
	var c struct{ Sub string }
	if err := json.Unmarshal(b, &c); err != nil {
		t.Fatal(err)
	}
	return c.Sub
}
