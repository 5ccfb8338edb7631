package conf

import (
	"fmt"
	"path/filepath"
	"strings"

	"github.com/hashicorp/hcl/v2"
	"github.com/hashicorp/hcl/v2/hclsyntax"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// DelegatedIdentity is the socket on which some workloads get the SVIDs of
// others.
type DelegatedIdentity struct {
	Range     hcl.Range
	Socket    Setting[string]
	Delegates []Setting[spiffeid.ID] // of our trust domain
}

func (l *loader) delegatedIdentity(b *hclsyntax.Block) {
	if !l.once(b) || !l.labels(b) {
		return
	}
	d := &DelegatedIdentity{Range: b.DefRange(), Socket: setting(filepath.Join(l.c.run, "delegated", "delegated.sock"))}
	l.c.DelegatedIdentity = d
	l.body(b.Body, b.Type, keys{
		"socket": func(a *hclsyntax.Attribute) { l.socket(a, &d.Socket) },
		"authorized_delegates": func(a *hclsyntax.Attribute) {
			all := l.texts(a.Expr)
			for _, s := range all {
				id, ok := l.workloadID(s)
				if ok && id.Value.TrustDomain() != l.c.TrustDomain.Value {
					l.problems.Add(s.Range, "%s is not of the trust domain %s, whose processes alone are attested here", s.Value, l.c.TrustDomain.Value)
					ok = false
				}
				if ok {
					d.Delegates = append(d.Delegates, id)
				}
			}
			if t, ok := a.Expr.(*hclsyntax.TupleConsExpr); ok && len(t.Exprs) == 0 {
				l.problems.Add(a.Expr.Range(), "the list is empty: nobody could use the socket")
			}
		},
	}, nil)
	if b.Body.Attributes["authorized_delegates"] == nil {
		l.problems.Add(b.DefRange(), "delegated_identity needs authorized_delegates, the SPIFFE IDs of those who may use it")
	}
}

// workloadID reads a full SPIFFE ID that a workload can have.
func (l *loader) workloadID(s Setting[string]) (Setting[spiffeid.ID], bool) {
	id, err := spiffeid.FromString(s.Value)
	switch {
	case err != nil:
	case len(s.Value) > maxID:
		err = fmt.Errorf("longer than %d bytes", maxID)
	case id.Path() == "":
		err = fmt.Errorf("a trust domain is no workload; a path is missing")
	case id.Path() == "/spire" || strings.HasPrefix(id.Path(), "/spire/"):
		err = fmt.Errorf("IDs under /spire belong to SPIRE itself")
	}
	if err != nil {
		l.problems.Add(s.Range, "SPIFFE ID %.300q: %s", s.Value, err)
		return Setting[spiffeid.ID]{}, false
	}
	return Setting[spiffeid.ID]{id, s.Range}, true
}
