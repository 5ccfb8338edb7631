package conf

import (
	"github.com/hashicorp/hcl/v2"
	"github.com/hashicorp/hcl/v2/hclsyntax"
)

// Attest is the configuration of deputy-attest, the plugin of SPIRE's agent:
// the daemon's attestor blocks, and how their selectors are handed over.
type Attest struct {
	Type        Setting[string] // of the selectors to give, unprefixed; empty: all, prefixed
	Digests     Setting[bool]   // unix:sha256 and process:parent_sha256 are wanted
	AllowTraced Setting[bool]
	OnUnknown   Setting[OnUnknown]
	Docker      *Docker  // nil: not listed
	Systemd     *Systemd // likewise
}

// OnUnknown is what becomes of an attestation in which something is unknown.
type OnUnknown string

// What becomes of it.
const (
	Omit OnUnknown = "omit" // the selectors that are certain are given
	Deny OnUnknown = "deny" // there are none: the attestation fails
)

// ParseAttest reads the text that SPIRE hands to deputy-attest as its
// plugin_data, which is the name that stands before the places of what is wrong
// with it. SPIRE prints the block anew, so lines count from its first one.
//
// The error is a Problems.
func ParseAttest(text string) (*Attest, error) {
	const name = "plugin_data"
	if len(text) > maxFile {
		return nil, Problems{{hcl.Range{Filename: name, Start: hcl.InitialPos}, "plugin_data is larger than a mebibyte"}}
	}
	body, found := parse([]byte(text), name)
	if len(found) > 0 {
		found.Sort()
		return nil, found
	}
	var c Config
	l := &loader{c: &c, first: make(map[string]hcl.Range)}
	a := &Attest{Digests: setting(true), OnUnknown: setting(Omit)}
	flag := func(to *Setting[bool]) func(*hclsyntax.Attribute) {
		return func(attr *hclsyntax.Attribute) {
			if s, ok := l.flag(attr.Expr); ok {
				*to = s
			}
		}
	}
	l.body(body, name, keys{
		"type":         func(attr *hclsyntax.Attribute) { l.set(attr, &a.Type) },
		"digests":      flag(&a.Digests),
		"allow_traced": flag(&a.AllowTraced),
		"on_unknown": func(attr *hclsyntax.Attribute) {
			if s, ok := choice(&l.reader, attr, Omit, Deny); ok {
				a.OnUnknown = s
			}
		},
	}, blocks{"attestor": l.attestor})
	if len(l.problems) > 0 {
		l.problems.Sort()
		return nil, l.problems
	}
	a.Docker, a.Systemd = c.Docker, c.Systemd
	return a, nil
}
