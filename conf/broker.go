package conf

import (
	"net/netip"
	"net/url"
	"slices"

	"github.com/hashicorp/hcl/v2"
	"github.com/hashicorp/hcl/v2/hclsyntax"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Broker is the SPIFFE Broker API.
type Broker struct {
	Range   hcl.Range
	Socket  Setting[string] // empty: none
	Address Setting[string] // HOST:PORT; empty: none
	Clients []BrokerClient
	Kubelet *Kubelet // nil: no references to Kubernetes objects
}

// A BrokerClient may get the SVIDs of others.
type BrokerClient struct {
	Range      hcl.Range
	ID         Setting[spiffeid.ID]
	References []Setting[Reference]
	OverTCP    []Setting[Reference] // of them
}

// Reference is a way to name a workload.
type Reference string

// The ways that there are.
const (
	ReferencePID        Reference = "pid"
	ReferenceKubernetes Reference = "kubernetes"
)

// Kubelet is where this node's pods are asked for.
type Kubelet struct {
	Range     hcl.Range
	URL       Setting[string] // https
	TokenFile Setting[string] // absolute
	CAFile    Setting[string] // absolute
}

func (l *loader) broker(b *hclsyntax.Block) {
	if !l.once(b) || !l.labels(b) {
		return
	}
	k := &Broker{Range: b.DefRange()}
	l.c.Broker = k
	var clients []*hclsyntax.Block
	l.body(b.Body, b.Type, keys{
		"socket":  func(a *hclsyntax.Attribute) { l.socket(a, &k.Socket) },
		"address": func(a *hclsyntax.Attribute) { l.address(a, &k.Address) },
	}, blocks{
		"client":  func(c *hclsyntax.Block) { clients = append(clients, c) },
		"kubelet": func(c *hclsyntax.Block) { l.kubelet(c, k) },
	})
	has := func(name string) bool { return b.Body.Attributes[name] != nil }
	if !has("socket") && !has("address") {
		l.problems.Add(b.DefRange(), "broker needs socket or address, or both")
	}
	if len(clients) == 0 {
		l.problems.Add(b.DefRange(), `broker needs a client: client "spiffe://…" { references = ["pid"] }`)
	}
	for _, c := range clients {
		l.brokerClient(c, k, has)
	}
}

func (l *loader) brokerClient(b *hclsyntax.Block, k *Broker, has func(string) bool) {
	if !l.labels(b, "SPIFFE ID") || !l.once(b) {
		return
	}
	c := BrokerClient{Range: b.DefRange()}
	var ok bool
	if c.ID, ok = l.workloadID(Setting[string]{b.Labels[0], b.LabelRanges[0]}); !ok {
		return
	}
	l.body(b.Body, "client", keys{
		"references": func(a *hclsyntax.Attribute) { c.References = l.references(a) },
		"over_tcp":   func(a *hclsyntax.Attribute) { c.OverTCP = l.references(a) },
	}, nil)
	if a := b.Body.Attributes["references"]; a == nil {
		l.problems.Add(b.DefRange(), "the client has no references, which say how it may name workloads")
	} else if t, ok := a.Expr.(*hclsyntax.TupleConsExpr); ok && len(t.Exprs) == 0 {
		l.problems.Add(a.Expr.Range(), "the list is empty: the client could name no workload")
	}
	for _, r := range c.References {
		if r.Value == ReferenceKubernetes && k.Kubelet == nil {
			l.problems.Add(r.Range, "references to Kubernetes objects need a kubelet block in broker")
		}
	}
	at, err := netip.ParseAddrPort(k.Address.Value)
	for _, r := range c.OverTCP {
		switch {
		case !slices.ContainsFunc(c.References, func(o Setting[Reference]) bool { return o.Value == r.Value }):
			l.problems.Add(r.Range, "%q is not among the client's references", r.Value)
		case !has("address"):
			l.problems.Add(r.Range, "broker has no address, so that nothing comes over TCP")
		case r.Value == ReferencePID && k.Address.Given() && (err != nil || !at.Addr().IsLoopback()):
			// Broker API §3.1.2: a PID means something on this node alone.
			l.problems.Add(r.Range, "PIDs over TCP need a loopback address: from another host they would name other processes")
		}
	}
	if has("address") && !has("socket") && b.Body.Attributes["over_tcp"] == nil {
		l.problems.Add(b.DefRange(), "broker has no socket, and the client no over_tcp: it could name no workload")
	}
	k.Clients = append(k.Clients, c)
}

// references reads a list of ways to name a workload.
func (l *loader) references(a *hclsyntax.Attribute) (all []Setting[Reference]) {
	for _, s := range l.texts(a.Expr) {
		switch r := Reference(s.Value); r {
		case ReferencePID, ReferenceKubernetes:
			all = append(all, Setting[Reference]{r, s.Range})
		default:
			l.problems.Add(s.Range, "unknown reference %q; there are %s and %s", s.Value, ReferenceKubernetes, ReferencePID)
		}
	}
	return all
}

func (l *loader) kubelet(b *hclsyntax.Block, k *Broker) {
	if !l.once(b) || !l.labels(b) {
		return
	}
	n := &Kubelet{Range: b.DefRange()}
	k.Kubelet = n
	l.body(b.Body, b.Type, keys{
		"url": func(a *hclsyntax.Attribute) {
			s, ok := l.text(a.Expr)
			if !ok {
				return
			}
			u, err := url.Parse(s.Value)
			// The token would go over http in the clear, to whoever listens.
			if err != nil || u.Scheme != "https" || u.Host == "" || u.User != nil || u.Path != "" && u.Path != "/" || u.RawQuery != "" || u.Fragment != "" {
				l.problems.Add(s.Range, "url %q is not that of a kubelet, such as \"https://127.0.0.1:10250\"", s.Value)
				return
			}
			n.URL = s
		},
		"token_file": func(a *hclsyntax.Attribute) { l.path(a, &n.TokenFile) },
		"ca_file":    func(a *hclsyntax.Attribute) { l.path(a, &n.CAFile) },
	}, nil)
	for _, name := range []string{"url", "token_file", "ca_file"} {
		if b.Body.Attributes[name] == nil {
			l.problems.Add(b.DefRange(), "kubelet needs %s", name)
		}
	}
}
