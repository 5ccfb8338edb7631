package conf

import (
	"fmt"
	"net/url"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/hashicorp/hcl/v2/hclsyntax"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

func (l *loader) trustDomain(s Setting[string]) (Setting[spiffeid.TrustDomain], bool) {
	td, err := spiffeid.TrustDomainFromString(s.Value)
	if err == nil && td.Name() != s.Value {
		err = fmt.Errorf("write the name alone: %q", td.Name())
	}
	if err == nil && len(s.Value) > 255 {
		err = fmt.Errorf("longer than 255 bytes")
	}
	if err != nil {
		l.problems.Add(s.Range, "trust domain %.300q: %s", s.Value, err)
		return Setting[spiffeid.TrustDomain]{}, false
	}
	return Setting[spiffeid.TrustDomain]{td, s.Range}, true
}

// set reads a string into to.
func (l *loader) set(a *hclsyntax.Attribute, to *Setting[string]) {
	if s, ok := l.text(a.Expr); ok {
		*to = s
	}
}

// path reads an absolute path into to.
func (l *loader) path(a *hclsyntax.Attribute, to *Setting[string]) bool {
	s, ok := l.text(a.Expr)
	switch {
	case !ok:
		return false
	case !filepath.IsAbs(s.Value):
		l.problems.Add(s.Range, "%s %q is not an absolute path", a.Name, s.Value)
		return false
	case strings.ContainsRune(s.Value, 0):
		l.problems.Add(s.Range, "%s has a zero byte in it", a.Name)
		return false
	}
	s.Value = filepath.Clean(s.Value)
	*to = s
	return true
}

// socket reads the path of a Unix socket into to.
func (l *loader) socket(a *hclsyntax.Attribute, to *Setting[string]) {
	var s Setting[string]
	if !l.path(a, &s) {
		return
	}
	if len(s.Value) > maxSocket {
		l.problems.Add(s.Range, "the path of a socket is at most %d bytes long, this one %d", maxSocket, len(s.Value))
		return
	}
	*to = s
}

// duration reads a duration as Go writes it, in whole seconds.
func (l *loader) duration(a *hclsyntax.Attribute) (d Setting[time.Duration], ok bool) {
	s, ok := l.text(a.Expr)
	if !ok {
		return d, false
	}
	v, err := time.ParseDuration(s.Value)
	switch {
	case err != nil:
		l.problems.Add(s.Range, "%s %q is not a duration such as \"5m\" or \"1h30m\"", a.Name, s.Value)
		return d, false
	case v%time.Second != 0:
		l.problems.Add(s.Range, "%s of %s is not a whole number of seconds", a.Name, v)
		return d, false
	}
	return Setting[time.Duration]{v, s.Range}, true
}

// ttl reads the life of an SVID, which must fit that of the CA.
func (l *loader) ttl(a *hclsyntax.Attribute, to *Setting[time.Duration]) {
	d, ok := l.duration(a)
	authority := l.c.Authority
	switch {
	case !ok:
	case d.Value < MinTTL:
		l.problems.Add(d.Range, "%s of %s is shorter than %s", a.Name, d.Value, MinTTL)
	case d.Value > authority.maxTTL():
		l.problems.Add(d.Range, "%s of %s is longer than %s, a sixth of ca_ttl (%s)", a.Name, d.Value, authority.maxTTL(), authority.CATTL.Value)
	default:
		*to = d
	}
}

// issuer reads the URL that tokens name as their issuer.
func (l *loader) issuer(a *hclsyntax.Attribute, to *Setting[string]) {
	s, ok := l.text(a.Expr)
	if !ok {
		return
	}
	// OpenID Connect Discovery 1.0 §3: no query and no fragment.
	u, err := url.Parse(s.Value)
	if err != nil || u.Scheme != "https" && u.Scheme != "http" || u.Host == "" || !portExists(u) || u.User != nil || strings.ContainsAny(s.Value, "?#") {
		l.problems.Add(s.Range, "jwt_issuer %q is not a URL such as \"https://issuer.example.org\"", s.Value)
		return
	}
	*to = s
}

// portExists reports whether there is such a port, or none is named.
func portExists(u *url.URL) bool {
	if u.Port() == "" {
		return true
	}
	n, err := strconv.ParseUint(u.Port(), 10, 16)
	return err == nil && n != 0
}

// choice reads one of a few strings.
func choice[T ~string](r *reader, a *hclsyntax.Attribute, of ...T) (c Setting[T], ok bool) {
	s, ok := r.text(a.Expr)
	if !ok {
		return c, false
	}
	if !slices.Contains(of, T(s.Value)) {
		names := make(map[string]bool)
		for _, o := range of {
			names[string(o)] = true
		}
		r.problems.Add(s.Range, "unknown %s %q; there %s", a.Name, s.Value, list(names))
		return c, false
	}
	return Setting[T]{T(s.Value), s.Range}, true
}
