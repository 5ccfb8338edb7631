// Package kubelet is a stand-in for a node's kubelet: HTTPS with a certificate
// that a CA signed, a bearer token, and the one answer that is asked of it.
package kubelet

import (
	"crypto/tls"
	"encoding/json"
	"encoding/pem"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"
)

// Token is what the stand-in accepts.
const Token = "let-me-see-the-pods"

// A Kubelet answers GET /pods.
type Kubelet struct {
	URL, CAFile, TokenFile string

	mu     sync.Mutex // guards what follows
	answer http.HandlerFunc
	asked  int
}

// Start starts a kubelet that has these pods, a PodList as JSON.
func Start(t testing.TB, pods []byte) *Kubelet {
	t.Helper()
	k := &Kubelet{}
	k.Pods(pods)
	s := httptest.NewUnstartedServer(http.HandlerFunc(k.serve))
	s.TLS = &tls.Config{MinVersion: tls.VersionTLS12}
	s.StartTLS()
	t.Cleanup(s.Close)
	dir := t.TempDir()
	k.URL, k.CAFile, k.TokenFile = s.URL, filepath.Join(dir, "ca.pem"), filepath.Join(dir, "token")
	ca := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: s.Certificate().Raw})
	for path, content := range map[string][]byte{k.CAFile: ca, k.TokenFile: []byte(Token + "\n")} {
		if err := os.WriteFile(path, content, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return k
}

// Pods changes what it has.
func (k *Kubelet) Pods(list []byte) {
	k.Answer(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		w.Write(list)
	})
}

// Answer changes how it answers to who has the token.
func (k *Kubelet) Answer(f http.HandlerFunc) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.answer = f
}

// Without returns the list without the pods of this name.
func Without(t testing.TB, list []byte, name string) []byte {
	t.Helper()
	var l map[string]any
	if err := json.Unmarshal(list, &l); err != nil {
		t.Fatal(err)
	}
	items := l["items"].([]any)
	l["items"] = slices.DeleteFunc(slices.Clone(items), func(p any) bool {
		return p.(map[string]any)["metadata"].(map[string]any)["name"] == name
	})
	if len(l["items"].([]any)) == len(items) {
		t.Fatalf("there is no pod %s", name)
	}
	b, err := json.Marshal(l)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// Asked is how often it was asked.
func (k *Kubelet) Asked() int {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.asked
}

func (k *Kubelet) serve(w http.ResponseWriter, r *http.Request) {
	k.mu.Lock()
	k.asked++
	answer := k.answer
	k.mu.Unlock()
	switch {
	case r.Method != http.MethodGet || r.URL.Path != "/pods":
		http.NotFound(w, r)
	case r.Header.Get("Authorization") != "Bearer "+Token:
		http.Error(w, "Unauthorized", http.StatusUnauthorized)
	default:
		answer(w, r)
	}
}
