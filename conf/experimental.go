package conf

import "github.com/hashicorp/hcl/v2/hclsyntax"

// Experimental is what is off unless it is asked for, since the standard that
// it follows may still change.
type Experimental struct {
	WITSVID Setting[bool] // the WIT-SVID profile of the Workload API
}

func (l *loader) experimental(b *hclsyntax.Block) {
	if !l.once(b) || !l.labels(b) {
		return
	}
	l.body(b.Body, b.Type, keys{
		"wit_svid": func(a *hclsyntax.Attribute) {
			if s, ok := l.flag(a.Expr); ok {
				l.c.Experimental.WITSVID = s
			}
		},
	}, nil)
}
