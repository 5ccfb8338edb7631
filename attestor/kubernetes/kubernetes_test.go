package kubernetes

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/deputy-id/deputy/attestor"
	"github.com/deputy-id/deputy/test/kubelet"
)

const captured = "testdata/kubernetes-1.34-containerd-1.6-pods.json"

func read(t testing.TB) []byte {
	t.Helper()
	b, err := os.ReadFile(captured)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func node(t testing.TB, k *kubelet.Kubelet) *Node {
	t.Helper()
	n, err := New(Options{URL: k.URL, TokenFile: k.TokenFile, CAFile: k.CAFile})
	if err != nil {
		t.Fatal(err)
	}
	return n
}

func texts(selectors []attestor.Selector) (out []string) {
	for _, s := range selectors {
		out = append(out, s.String())
	}
	return out
}

func TestPodHasSPIREsSelectors(t *testing.T) {
	n := node(t, kubelet.Start(t, read(t)))
	p, err := n.Pod(t.Context(), Reference{Namespace: "default", Name: "demo"})
	if err != nil {
		t.Fatal(err)
	}
	const image = "127.0.0.1:15001/demo"
	want := []string{
		"k8s:node-name:node-1", "k8s:ns:default",
		"k8s:pod-image-count:1",
		"k8s:pod-image:" + image + ":v1",
		"k8s:pod-image:" + image + "@sha256:3481097c3331c5ecff3d4a76834b95cc10402ed12187f3b4d2e67f22d4de0434",
		"k8s:pod-init-image-count:1",
		"k8s:pod-init-image:" + image + ":v1",
		"k8s:pod-init-image:" + image + "@sha256:3481097c3331c5ecff3d4a76834b95cc10402ed12187f3b4d2e67f22d4de0434",
		"k8s:pod-label:app:demo", "k8s:pod-label:tier:test", "k8s:pod-name:demo",
		"k8s:pod-uid:c3701101-cc75-46a6-b5ca-641119cf17d9", "k8s:sa:workload",
	}
	slices.Sort(want)
	got := texts(p.Selectors)
	slices.Sort(got)
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	for _, s := range p.Selectors {
		if err := attestor.CheckSelector(s); err != nil {
			t.Errorf("an entry cannot have it: %v", err)
		}
	}
	if !slices.IsSortedFunc(p.Selectors, attestor.Selector.Compare) {
		t.Error("the selectors are not sorted")
	}
}

func TestReferenceIsOfOnePod(t *testing.T) {
	n := node(t, kubelet.Start(t, read(t)))
	const uid = "c3701101-cc75-46a6-b5ca-641119cf17d9"
	for name, c := range map[string]struct {
		Reference
		want string
	}{
		"by name":                     {Reference{Namespace: "default", Name: "demo"}, "demo"},
		"by UID":                      {Reference{UID: uid}, "demo"},
		"by both":                     {Reference{"default", "demo", uid}, "demo"},
		"static pod by its name":      {Reference{Namespace: "default", Name: "static-node-1"}, "static-node-1"},
		"name of another namespace":   {Reference{Namespace: "kube-system", Name: "demo"}, ""},
		"name and another pod's UID":  {Reference{"default", "local", uid}, ""},
		"no such name":                {Reference{Namespace: "default", Name: "dem"}, ""},
		"no such UID":                 {Reference{UID: uid[:35]}, ""},
		"nothing":                     {Reference{}, ""},
		"a namespace names no pod":    {Reference{Namespace: "default"}, ""},
		"a name alone is in no place": {Reference{Name: "demo"}, ""},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			p, err := n.Pod(t.Context(), c.Reference)
			switch {
			case c.want == "" && !errors.Is(err, ErrNotFound):
				t.Errorf("got %v, %v, want none", p, err)
			case c.want != "" && (err != nil || p.Name != c.want):
				t.Errorf("got %v, %v, want %s", p, err, c.want)
			}
		})
	}
}

// later makes the node ask again, as after a second.
func (n *Node) later() {
	n.mu.Lock()
	defer n.mu.Unlock()
	old := *n.list
	old.asked = old.asked.Add(-fresh)
	n.list = &old
}

func TestPodIsTheSameUntilSomethingChanges(t *testing.T) {
	k := kubelet.Start(t, read(t))
	n := node(t, k)
	demo := Reference{Namespace: "default", Name: "demo"}
	first, err := n.Pod(t.Context(), demo)
	if err != nil {
		t.Fatal(err)
	}
	n.Pod(t.Context(), demo)
	if k.Asked() != 1 {
		t.Errorf("the kubelet was asked %d times within a second", k.Asked())
	}
	n.later()
	k.Pods(bytes.ReplaceAll(read(t), []byte(`"resourceVersion"`), []byte(`"x"`)))
	if again, err := n.Pod(t.Context(), demo); err != nil || again != first {
		t.Errorf("got %v, %v, want the same pod", again, err)
	}
	if k.Asked() != 2 {
		t.Error("the kubelet was not asked again")
	}
	n.later()
	k.Pods(bytes.Replace(read(t), []byte(`"tier": "test"`), []byte(`"tier": "prod"`), -1))
	now, err := n.Pod(t.Context(), demo)
	if err != nil || now == first || !slices.Contains(texts(now.Selectors), "k8s:pod-label:tier:prod") {
		t.Errorf("got %v, %v, want the new label", now, err)
	}
}

// A pod that has ended is none whose identity anybody may have.
func TestPodsThatEndedAreNotThere(t *testing.T) {
	for _, phase := range []string{"Succeeded", "Failed"} {
		var list map[string]any
		if err := json.Unmarshal(read(t), &list); err != nil {
			t.Fatal(err)
		}
		for _, p := range list["items"].([]any) {
			p.(map[string]any)["status"].(map[string]any)["phase"] = phase
		}
		b, _ := json.Marshal(list)
		if p, err := node(t, kubelet.Start(t, b)).Pod(t.Context(), Reference{Namespace: "default", Name: "demo"}); !errors.Is(err, ErrNotFound) {
			t.Errorf("%s: got %v, %v, want none", phase, p, err)
		}
	}
}

func TestPodIsNotMissedByAListFromBeforeIt(t *testing.T) {
	k := kubelet.Start(t, kubelet.Without(t, read(t), "demo"))
	n := node(t, k)
	if _, err := n.Pod(t.Context(), Reference{Namespace: "default", Name: "local"}); err != nil {
		t.Fatal(err)
	}
	k.Pods(read(t))
	if p, err := n.Pod(t.Context(), Reference{Namespace: "default", Name: "demo"}); err != nil || p.Name != "demo" {
		t.Errorf("got %v, %v, want the pod that came since", p, err)
	}
}

// This is what a kubelet 1.34 was seen to answer after its start: nothing for a
// second, then some of the pods, then all.
func TestKubeletThatWasStartedAgainDeniesNobody(t *testing.T) {
	k := kubelet.Start(t, read(t))
	n := node(t, k)
	demo := Reference{Namespace: "default", Name: "demo"}
	before, err := n.Pod(t.Context(), demo)
	if err != nil {
		t.Fatal(err)
	}
	unknown := func(what string, r Reference) {
		t.Helper()
		if p, err := n.Pod(t.Context(), r); err == nil || errors.Is(err, ErrNotFound) {
			t.Errorf("%s: got %v, %v, want an error that says nothing of the pod", what, p, err)
		}
	}
	empty := []byte(`{"kind":"PodList","apiVersion":"v1","metadata":{},"items":null}` + "\n")
	static := read(t)
	for _, name := range []string{"demo", "local", "guaranteed", "nonet"} {
		static = kubelet.Without(t, static, name)
	}
	for _, pods := range [][]byte{empty, empty, static, static} {
		k.Pods(pods)
		n.later()
		unknown("no pod of the API server", demo)
		unknown("no pod of the API server", Reference{Namespace: "default", Name: "other"})
	}
	if _, err := n.Pod(t.Context(), Reference{Namespace: "default", Name: "static-node-1"}); err != nil {
		t.Errorf("got %v, want the static pod", err)
	}
	k.Pods(kubelet.Without(t, read(t), "demo"))
	n.later()
	unknown("some pods", demo)
	k.Pods(read(t))
	n.later()
	if p, err := n.Pod(t.Context(), demo); err != nil || p.UID != before.UID {
		t.Errorf("got %v, %v, want the pod", p, err)
	}
	k.Pods(kubelet.Without(t, read(t), "demo"))
	n.later()
	unknown("a pod that is gone, at first", demo)
	n.later()
	if p, err := n.Pod(t.Context(), demo); !errors.Is(err, ErrNotFound) {
		t.Errorf("got %v, %v, want none", p, err)
	}
}

// What took a pod's place settles at once that it is gone; so does its end.
func TestPodThatIsReplacedIsGoneAtOnce(t *testing.T) {
	const uid = "c3701101-cc75-46a6-b5ca-641119cf17d9"
	for name, pods := range map[string][]byte{
		"replaced": bytes.ReplaceAll(read(t), []byte(uid), []byte(uid[:35]+"8")),
		"ended":    bytes.ReplaceAll(read(t), []byte(`"phase": "Running"`), []byte(`"phase": "Succeeded"`)),
	} {
		k := kubelet.Start(t, read(t))
		n := node(t, k)
		if _, err := n.Pod(t.Context(), Reference{UID: uid}); err != nil {
			t.Fatal(err)
		}
		k.Pods(pods)
		n.later()
		if p, err := n.Pod(t.Context(), Reference{UID: uid}); !errors.Is(err, ErrNotFound) {
			t.Errorf("%s: got %v, %v, want none", name, p, err)
		}
	}
}

// What the kubelet could not say is unknown, never "there is no such pod".
func TestKubeletThatDoesNotAnswerIsUnknown(t *testing.T) {
	demo := Reference{Namespace: "default", Name: "demo"}
	k := kubelet.Start(t, read(t))
	elsewhere := kubelet.Start(t, read(t))
	for name, f := range map[string]http.HandlerFunc{
		"forbidden": func(w http.ResponseWriter, _ *http.Request) {
			http.Error(w, "Forbidden (user=system:serviceaccount:default:workload)", http.StatusForbidden)
		},
		"error":   func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusInternalServerError) },
		"empty":   func(http.ResponseWriter, *http.Request) {},
		"garbage": func(w http.ResponseWriter, _ *http.Request) { w.Write([]byte("<html>")) },
		"half":    func(w http.ResponseWriter, _ *http.Request) { w.Write(read(t)[:1000]) },
		"no list": func(w http.ResponseWriter, _ *http.Request) { w.Write([]byte(`{"kind":"Status"}`)) },
		"no UID":  func(w http.ResponseWriter, _ *http.Request) { w.Write([]byte(`{"kind":"PodList","items":[{}]}`)) },
		"redirect": func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, elsewhere.URL+"/pods", http.StatusFound)
		},
		"endless": func(w http.ResponseWriter, _ *http.Request) {
			for b := bytes.Repeat([]byte(" "), 1<<20); ; {
				if _, err := w.Write(b); err != nil {
					return
				}
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			k.Answer(f)
			p, err := node(t, k).Pod(t.Context(), demo)
			if err == nil || errors.Is(err, ErrNotFound) {
				t.Errorf("got %v, %v, want an error that says nothing of the pod", p, err)
			}
			if err != nil && strings.Contains(err.Error(), kubelet.Token) {
				t.Errorf("the token is in %q", err)
			}
		})
	}
	if elsewhere.Asked() != 0 {
		t.Error("the token went where the redirect led")
	}
	t.Run("the context ends", func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		stop := make(chan struct{})
		defer close(stop)
		k.Answer(func(http.ResponseWriter, *http.Request) { cancel(); <-stop })
		if _, err := node(t, k).Pod(ctx, demo); !errors.Is(err, context.Canceled) {
			t.Errorf("got %v, want that the context ended", err)
		}
	})
}

func TestKubeletIsVerified(t *testing.T) {
	k, other := kubelet.Start(t, read(t)), kubelet.Start(t, read(t))
	demo := Reference{Namespace: "default", Name: "demo"}
	dir := t.TempDir()
	ca := filepath.Join(dir, "ca.pem")
	b, err := os.ReadFile(other.CAFile)
	if err != nil {
		t.Fatal(err)
	}
	// httptest's servers share a certificate, so another name stands for another CA.
	if err := os.WriteFile(ca, b, 0o600); err != nil {
		t.Fatal(err)
	}
	n, err := New(Options{URL: strings.Replace(k.URL, "127.0.0.1", "127.0.0.2", 1), TokenFile: k.TokenFile, CAFile: ca})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := n.Pod(t.Context(), demo); err == nil {
		t.Error("a certificate for another name was believed")
	}
	if k.Asked() != 0 {
		t.Error("the token was sent to a kubelet that was not verified")
	}
	for name, o := range map[string]Options{
		"http":         {URL: "http://127.0.0.1:10255", TokenFile: k.TokenFile, CAFile: k.CAFile},
		"no CA":        {URL: k.URL, TokenFile: k.TokenFile, CAFile: filepath.Join(dir, "none")},
		"CA of no PEM": {URL: k.URL, TokenFile: k.TokenFile, CAFile: k.TokenFile},
	} {
		if _, err := New(o); err == nil {
			t.Errorf("%s: got no error", name)
		}
	}
}

func TestTokenIsReadAtEachRequest(t *testing.T) {
	k := kubelet.Start(t, read(t))
	n := node(t, k)
	demo := Reference{Namespace: "default", Name: "demo"}
	for _, content := range []string{"", "another", strings.Repeat("a", maxToken+1), "a\nb"} {
		if err := os.WriteFile(k.TokenFile, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := n.Pod(t.Context(), demo); err == nil || errors.Is(err, ErrNotFound) {
			t.Errorf("token %.10q: got %v, want an error", content, err)
		}
	}
	if err := os.WriteFile(k.TokenFile, []byte(kubelet.Token), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := n.Pod(t.Context(), demo); err != nil {
		t.Error(err)
	}
}

func TestManyWhoAskAtOnceCostOneRequest(t *testing.T) {
	k := kubelet.Start(t, nil)
	k.Answer(func(w http.ResponseWriter, _ *http.Request) {
		time.Sleep(50 * time.Millisecond) // as an answer takes
		w.Write(read(t))
	})
	n := node(t, k)
	var all sync.WaitGroup
	for range 50 {
		all.Go(func() {
			if _, err := n.Pod(t.Context(), Reference{Namespace: "default", Name: "demo"}); err != nil {
				t.Error(err)
			}
		})
	}
	all.Wait()
	if k.Asked() != 1 {
		t.Errorf("the kubelet was asked %d times", k.Asked())
	}
}

func FuzzParse(f *testing.F) {
	b, err := os.ReadFile(captured)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Add([]byte(`{"kind":"PodList","items":[{"metadata":{"namespace":"a","name":"b","uid":"c","labels":{"":"","x":"y\n"},"ownerReferences":[{}]}}]}`))
	f.Add([]byte(`{"kind":"PodList","items":null}`))
	f.Add([]byte(`null`))
	f.Fuzz(func(t *testing.T, b []byte) {
		pods, err := parse(b)
		if err != nil {
			return
		}
		for _, p := range pods {
			if p.UID == "" || p.Name == "" || p.Namespace == "" {
				t.Errorf("a pod without an identity: %+v", p)
			}
			for i, s := range p.Selectors {
				if _, err := attestor.ParseSelector(s.String()); err != nil || s.Type != "k8s" {
					t.Errorf("%v: %v", s, err)
				}
				if i > 0 && p.Selectors[i-1].Compare(s) >= 0 {
					t.Errorf("not sorted: %v", fmt.Sprint(texts(p.Selectors)))
				}
			}
		}
	})
}
