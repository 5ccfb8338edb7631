// Package kubernetes says what a pod of this node is. It asks the node's
// kubelet, over HTTPS with a token, for the pods that run here and returns what
// the kubelet says of one as selectors, in SPIRE's spelling.
//
// The kubelet is believed, like a container runtime; who listens in its place is
// not, so its certificate is verified, nothing is followed elsewhere, and an
// answer is bounded in size and time. What could not be found out is an error
// and never "there is no such pod". Nor is that said because of a list from
// before the question, or one that leaves out what the last had: for a second
// after its start a kubelet answers that there are no pods at all, and then
// learns of them one by one.
//
// A caller owes it to ask again every few seconds for as long as it acts for a
// pod: labels change, and a pod of the same name may be another one.
package kubernetes

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/singleflight"

	"github.com/deputy-id/deputy/attestor"
	"github.com/deputy-id/deputy/internal/bounded"
)

// ErrNotFound says that no such pod runs on this node.
var ErrNotFound = errors.New("pod is not on this node")

const (
	// fresh is how old a list may be: callers that ask at once cost one request.
	fresh = time.Second
	// askTime bounds a request.
	askTime = 5 * time.Second
	// maxList bounds its answer in bytes. A pod takes some ten thousand of them.
	maxList = 64 << 20
	// maxToken bounds the token's file in bytes.
	maxToken = 64 << 10
)

// Options of a Node.
type Options struct {
	URL       string // https://HOST:PORT of the kubelet, as its certificate has it
	TokenFile string // read at each request: tokens of service accounts rotate
	CAFile    string // PEM, read once
}

// A Node knows the pods of this node. It is safe for concurrent use, and asks
// the kubelet once a second at most.
type Node struct {
	url, token string
	client     *http.Client
	flights    singleflight.Group

	mu   sync.Mutex // guards what follows
	list *list
}

// A list is what the kubelet said. It is immutable.
type list struct {
	asked time.Time
	pods  []*Pod
	heard bool   // it has pods that the API server told the kubelet of
	lost  []*Pod // the last list had them, and this one nothing in their place
}

// A Pod is immutable; the same pointer comes back while nothing of it that
// matters here has changed.
type Pod struct {
	Namespace, Name, UID string
	Selectors            []attestor.Selector // sorted, each once

	over     bool // all of its containers have ended for good
	fromHost bool // it is static: not from the API server
}

// A Reference names a pod by namespace and name, by UID, or by all three, which
// must agree then.
type Reference struct{ Namespace, Name, UID string }

// New returns the node of this kubelet, which it does not ask yet.
func New(o Options) (*Node, error) {
	u, err := url.Parse(o.URL)
	if err != nil || u.Scheme != "https" || u.Host == "" {
		return nil, fmt.Errorf("kubelet %q: not an https URL", o.URL)
	}
	pem, err := os.ReadFile(o.CAFile)
	if err != nil {
		return nil, fmt.Errorf("CA of the kubelet: %w", err)
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(pem) {
		return nil, fmt.Errorf("CA of the kubelet: no certificate in %s", o.CAFile)
	}
	return &Node{
		url:   strings.TrimSuffix(o.URL, "/") + "/pods",
		token: o.TokenFile,
		client: &http.Client{
			Timeout: askTime,
			Transport: &http.Transport{ // no proxy: the token is for the kubelet alone
				TLSClientConfig:        &tls.Config{RootCAs: roots, MinVersion: tls.VersionTLS12},
				MaxResponseHeaderBytes: 64 << 10,
				MaxIdleConns:           1,
				IdleConnTimeout:        time.Minute,
			},
			CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		},
	}, nil
}

// Pod returns the pod that the reference names, or ErrNotFound. A pod all of
// whose containers have ended for good is not there any more. That there is none
// is known after a second at most.
func (n *Node) Pod(ctx context.Context, r Reference) (*Pod, error) {
	for start := time.Now(); ; {
		l, err := n.pods(ctx)
		if err != nil {
			return nil, err
		}
		if p, err := l.find(r); !errors.Is(err, ErrNotFound) || !l.asked.Before(start) {
			return p, err
		}
		select { // the pod may be newer than the list
		case <-time.After(time.Until(l.asked.Add(fresh))):
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
}

func (l *list) find(r Reference) (*Pod, error) {
	var found *Pod
	for _, p := range l.pods {
		if !r.names(p) || p.over {
			continue
		}
		if found != nil {
			return nil, fmt.Errorf("two pods are %s/%s", r.Namespace, r.Name)
		}
		found = p
	}
	switch {
	case found != nil:
		return found, nil
	case slices.ContainsFunc(l.lost, r.names):
		return nil, errors.New("the kubelet does not list the pod any more: it may have been started again")
	case !l.heard && !slices.ContainsFunc(l.pods, r.names):
		return nil, errors.New("the kubelet lists no pod of the API server: it may not have heard from it yet")
	}
	return nil, ErrNotFound
}

func (r Reference) names(p *Pod) bool {
	switch {
	case r.UID == "" && r.Name == "", r.UID != "" && p.UID != r.UID:
		return false
	case r.Namespace != "" || r.Name != "":
		return p.Namespace == r.Namespace && p.Name == r.Name
	}
	return true
}

// pods returns a fresh list.
func (n *Node) pods(ctx context.Context) (*list, error) {
	if l := n.kept(); l != nil {
		return l, nil
	}
	flight := n.flights.DoChan("", func() (any, error) {
		if l := n.kept(); l != nil {
			return l, nil
		}
		// Others wait for the answer too: it does not end with this call.
		return n.ask(context.WithoutCancel(ctx))
	})
	select {
	case r := <-flight:
		if r.Err != nil {
			return nil, fmt.Errorf("pods of the kubelet: %w", r.Err)
		}
		return r.Val.(*list), nil
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}

func (n *Node) kept() *list {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.list == nil || time.Since(n.list.asked) >= fresh {
		return nil
	}
	return n.list
}

// ask asks the kubelet. What it says is as old as the question.
func (n *Node) ask(ctx context.Context) (*list, error) {
	l := &list{asked: time.Now()}
	token, err := n.readToken()
	if err != nil {
		return nil, err
	}
	q, err := http.NewRequestWithContext(ctx, http.MethodGet, n.url, nil)
	if err != nil {
		return nil, err
	}
	q.Header.Set("Authorization", "Bearer "+token)
	a, err := n.client.Do(q)
	if err != nil {
		return nil, err
	}
	defer a.Body.Close()
	if a.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("it answers %s", a.Status) // its text may name what the token is
	}
	body, err := bounded.Read(a.Body, maxList)
	if err != nil {
		return nil, fmt.Errorf("its answer: %w", err)
	}
	if l.pods, err = parse(body); err != nil {
		return nil, err
	}
	l.heard = slices.ContainsFunc(l.pods, func(p *Pod) bool { return !p.fromHost })
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.list != nil {
		l.follow(n.list)
	}
	n.list = l
	return l, nil
}

// follow keeps of the last list what is the same, and what is lost. The second
// list without it settles that, of those since the kubelet has heard from the
// API server.
func (l *list) follow(last *list) {
	all := slices.Concat(last.pods, last.lost)
	for i, p := range l.pods {
		if j := slices.IndexFunc(all, p.same); j >= 0 {
			l.pods[i] = all[j]
		}
	}
	had := last.pods
	if !l.heard || !last.heard {
		had = all
	}
	for _, p := range had {
		replaced := func(o *Pod) bool { return o.UID == p.UID || o.Namespace == p.Namespace && o.Name == p.Name }
		if !p.over && !slices.ContainsFunc(l.pods, replaced) {
			l.lost = append(l.lost, p)
		}
	}
}

func (n *Node) readToken() (string, error) {
	b, err := bounded.File(n.token, maxToken)
	if err != nil {
		return "", err
	}
	token := strings.TrimSpace(string(b))
	if token == "" {
		return "", fmt.Errorf("%s is empty", n.token)
	}
	return token, nil
}

func (p *Pod) same(o *Pod) bool {
	return p.UID == o.UID && p.Name == o.Name && p.Namespace == o.Namespace && p.over == o.over && p.fromHost == o.fromHost &&
		slices.Equal(p.Selectors, o.Selectors)
}
