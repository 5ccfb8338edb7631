package conf

import (
	"strings"

	"github.com/hashicorp/hcl/v2/hclsyntax"
)

// SDS is what Envoys meet on the workload socket. Its names are three
// different ones, and none is a SPIFFE ID.
type SDS struct {
	DefaultSVIDName             Setting[string]
	DefaultBundleName           Setting[string]
	DefaultAllBundlesName       Setting[string]
	DisableSPIFFECertValidation Setting[bool]
}

func defaultSDS() SDS {
	return SDS{
		DefaultSVIDName:       setting("default"),
		DefaultBundleName:     setting("ROOTCA"),
		DefaultAllBundlesName: setting("ALL"),
	}
}

// maxSecretName is the length of a secret's name, in bytes.
const maxSecretName = 255

func (l *loader) sds(b *hclsyntax.Block) {
	if !l.once(b) || !l.labels(b) {
		return
	}
	s := &l.c.SDS
	name := func(to *Setting[string]) func(*hclsyntax.Attribute) {
		return func(a *hclsyntax.Attribute) { l.secretName(a, to) }
	}
	l.body(b.Body, b.Type, keys{
		"default_svid_name":        name(&s.DefaultSVIDName),
		"default_bundle_name":      name(&s.DefaultBundleName),
		"default_all_bundles_name": name(&s.DefaultAllBundlesName),
		"disable_spiffe_cert_validation": func(a *hclsyntax.Attribute) {
			if f, ok := l.flag(a.Expr); ok {
				s.DisableSPIFFECertValidation = f
			}
		},
	}, nil)

	names := []struct {
		key string
		of  Setting[string]
	}{
		{"default_svid_name", s.DefaultSVIDName},
		{"default_bundle_name", s.DefaultBundleName},
		{"default_all_bundles_name", s.DefaultAllBundlesName},
	}
	for i, one := range names {
		for _, other := range names[:i] {
			if one.of.Value != other.of.Value {
				continue
			}
			at := one.of.Range
			if !one.of.Given() {
				at = other.of.Range
			}
			l.problems.Add(at, "%s and %s are both %q; a name stands for one secret", other.key, one.key, one.of.Value)
		}
	}
}

// secretName reads a name that no secret has by itself.
func (l *loader) secretName(a *hclsyntax.Attribute, to *Setting[string]) {
	s, ok := l.text(a.Expr)
	switch {
	case !ok:
	case strings.HasPrefix(strings.ToLower(s.Value), "spiffe:"):
		l.problems.Add(s.Range, "%s %.100q is a SPIFFE ID, which names a secret already", a.Name, s.Value)
	case s.Value == "*":
		l.problems.Add(s.Range, "%s \"*\" is Envoy's word for all secrets", a.Name)
	case len(s.Value) > maxSecretName:
		l.problems.Add(s.Range, "%s is longer than %d bytes", a.Name, maxSecretName)
	case strings.ContainsFunc(s.Value, func(r rune) bool { return r <= ' ' || r > '~' }):
		l.problems.Add(s.Range, "%s %.100q has other characters than printable ASCII without spaces", a.Name, s.Value)
	default:
		*to = s
	}
}
