package conf

import (
	"net"
	"net/netip"
	"net/url"
	"path"
	"strconv"
	"strings"

	"github.com/hashicorp/hcl/v2"
	"github.com/hashicorp/hcl/v2/hclsyntax"
)

// Discovery is OpenID Connect discovery over HTTPS, for relying parties that
// take JWT-SVIDs as ID tokens. Their issuer is the authority's jwt_issuer.
type Discovery struct {
	Range    hcl.Range
	Address  Setting[string] // host:port
	CertFile Setting[string] // absolute path of a PEM file
	KeyFile  Setting[string]
}

func (l *loader) discovery(b *hclsyntax.Block) {
	if !l.once(b) || !l.labels(b) {
		return
	}
	d := &Discovery{Range: b.DefRange()}
	l.c.OIDCDiscovery = d
	l.body(b.Body, b.Type, keys{
		"address":   func(a *hclsyntax.Attribute) { l.address(a, &d.Address) },
		"cert_file": func(a *hclsyntax.Attribute) { l.path(a, &d.CertFile) },
		"key_file":  func(a *hclsyntax.Attribute) { l.path(a, &d.KeyFile) },
	}, nil)
	for _, key := range []string{"address", "cert_file", "key_file"} {
		if b.Body.Attributes[key] == nil {
			l.problems.Add(b.DefRange(), "oidc_discovery has no %s", key)
		}
	}
}

// issuerServed holds the issuer, which another block may set after this one,
// against what is served under it.
func (l *loader) issuerServed() {
	d, issuer := l.c.OIDCDiscovery, l.c.Authority.JWTIssuer
	if d == nil {
		return
	}
	if issuer.Value == "" {
		if !l.hasIssuer { // a wrong one has its complaint
			l.problems.Add(d.Range, "oidc_discovery needs jwt_issuer in the authority block: the URL that tokens name and relying parties look at")
		}
		return
	}
	u, err := url.Parse(issuer.Value)
	if err != nil {
		return // it was read before
	}
	if u.Scheme != "https" {
		l.problems.Add(issuer.Range, "jwt_issuer %q does not begin with https://, which relying parties want", issuer.Value)
	}
	// A client puts such a path right before it asks, and so for another one.
	if p := strings.TrimSuffix(u.Path, "/"); p != "" && path.Clean(p) != p || u.RawPath != "" {
		l.problems.Add(issuer.Range, "the path of jwt_issuer %q has empty, dot or escaped segments", issuer.Value)
	}
}

// hostExists reports whether there could be such a host: none, which is all
// addresses of our own, an address, or a name. What ends in a number is an
// address or nothing (RFC 1123 §2.1).
func hostExists(host string) bool {
	if _, err := netip.ParseAddr(host); err == nil || host == "" {
		return true
	}
	host = strings.TrimSuffix(host, ".")
	last := host[strings.LastIndexByte(host, '.')+1:]
	if _, err := strconv.ParseUint(last, 10, 64); err == nil || len(host) > 253 {
		return false
	}
	for label := range strings.SplitSeq(host, ".") {
		if label == "" || len(label) > 63 || strings.ContainsFunc(label, func(r rune) bool {
			return !(r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || r == '-' || r == '_')
		}) {
			return false
		}
	}
	return true
}

// address reads a TCP address to listen on.
func (l *loader) address(a *hclsyntax.Attribute, to *Setting[string]) {
	s, ok := l.text(a.Expr)
	if !ok {
		return
	}
	host, port, err := net.SplitHostPort(s.Value)
	n, bad := strconv.ParseUint(port, 10, 16)
	if err != nil || bad != nil || n == 0 || !hostExists(host) {
		l.problems.Add(s.Range, "%s %q is not a host and a port such as \"0.0.0.0:8444\"", a.Name, s.Value)
		return
	}
	*to = s
}
