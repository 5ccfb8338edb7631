package conf

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/hashicorp/hcl/v2"
	"github.com/hashicorp/hcl/v2/hclsyntax"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

func (l *loader) entry(b *hclsyntax.Block, similar map[string]hcl.Range) {
	before := len(l.problems)
	if !l.labels(b, "/PATH") {
		return
	}
	e := Entry{Range: b.DefRange(), keys: map[string]hcl.Range{"path": b.LabelRanges[0]}}
	for name, a := range b.Body.Attributes {
		e.keys[name] = a.Expr.Range()
	}
	e.Path = l.entryPath(b)
	ttl := func(to *Setting[time.Duration]) func(*hclsyntax.Attribute) {
		return func(a *hclsyntax.Attribute) { l.ttl(a, to) }
	}
	texts := func(to *[]Setting[string]) func(*hclsyntax.Attribute) {
		return func(a *hclsyntax.Attribute) { *to = l.texts(a.Expr) }
	}
	flag := func(to *Setting[bool]) func(*hclsyntax.Attribute) {
		return func(a *hclsyntax.Attribute) {
			if s, ok := l.flag(a.Expr); ok {
				*to = s
			}
		}
	}
	l.body(b.Body, "entry", keys{
		"selectors": texts(&e.Selectors),
		"x509_ttl":  ttl(&e.X509TTL),
		"jwt_ttl":   ttl(&e.JWTTTL),
		"dns_names": texts(&e.DNSNames),
		"hint":      func(a *hclsyntax.Attribute) { l.set(a, &e.Hint) },
		"federates_with": func(a *hclsyntax.Attribute) {
			for _, s := range l.texts(a.Expr) {
				if td, ok := l.trustDomain(s); ok {
					e.FederatesWith = append(e.FederatesWith, td)
				}
			}
		},
		"audiences":    texts(&e.Audiences),
		"instance":     flag(&e.Instance),
		"allow_traced": flag(&e.AllowTraced),
		"jwt_fresh":    flag(&e.JWTFresh),
	}, nil)

	if a := b.Body.Attributes["selectors"]; a == nil {
		l.problems.Add(b.DefRange(), "the entry has no selectors, which say whom it is for")
	} else if t, ok := a.Expr.(*hclsyntax.TupleConsExpr); ok && len(t.Exprs) == 0 {
		l.problems.Add(a.Expr.Range(), "the list is empty: the entry would be everybody's")
	}
	if len(l.problems) == before {
		key := e.similarity()
		if first, ok := similar[key]; ok {
			l.problems.Add(e.Range, "the entry at line %d has the same path and selectors", first.Start.Line)
		} else {
			similar[key] = e.Range
		}
	}
	l.c.Entries = append(l.c.Entries, e)
}

// similarity is equal for entries that give the same ID to the same processes.
func (e *Entry) similarity() string {
	var s []string
	for _, sel := range e.Selectors {
		s = append(s, sel.Value)
	}
	slices.Sort(s)
	return fmt.Sprintf("%q %t %q", e.Path.Value, e.Instance.Value, slices.Compact(s))
}

// entryPath reads an entry's name: a path, or a full SPIFFE ID of this trust
// domain. Templates in it are the registry's to read.
func (l *loader) entryPath(b *hclsyntax.Block) Setting[string] {
	path, at := b.Labels[0], b.LabelRanges[0]
	if rest, full := strings.CutPrefix(path, "spiffe://"); full {
		td, _, _ := strings.Cut(rest, "/")
		if td != l.c.TrustDomain.Value.Name() {
			l.problems.Add(at, "%s is not of the trust domain %s", path, l.c.TrustDomain.Value)
			return Setting[string]{}
		}
		path = strings.TrimPrefix(rest, td)
	}
	switch {
	case path == "":
		l.problems.Add(at, "an entry's name is the path of its SPIFFE ID, such as \"/agent/x\"")
	case path[0] != '/':
		l.problems.Add(at, "path %q does not begin with a slash", path)
	case len(l.c.TrustDomain.Value.IDString())+len(path) > maxID && !strings.Contains(path, "{{"):
		l.problems.Add(at, "the SPIFFE ID is longer than %d bytes", maxID)
	case !strings.Contains(path, "{{"):
		if err := spiffeid.ValidatePath(path); err != nil {
			l.problems.Add(at, "path %q: %s", path, err)
		}
	}
	return Setting[string]{path, at}
}
