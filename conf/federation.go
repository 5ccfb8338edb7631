package conf

import (
	"net/url"
	"time"

	"github.com/hashicorp/hcl/v2"
	"github.com/hashicorp/hcl/v2/hclsyntax"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Federation is the exchange of bundles with other trust domains.
type Federation struct {
	Range         hcl.Range
	Endpoint      *BundleEndpoint // nil: not served
	FederatesWith []FederatesWith // in the order of the file, each trust domain once
}

// BundleEndpoint is where our own bundle is served.
type BundleEndpoint struct {
	Range       hcl.Range
	Address     Setting[string]        // host:port
	RefreshHint Setting[time.Duration] // 0: what fits the rotation
	Profile     Setting[Profile]
	CertFile    Setting[string] // https_web: absolute path of a PEM file
	KeyFile     Setting[string] // likewise
}

// FederatesWith is where the bundle of another trust domain comes from.
type FederatesWith struct {
	Range           hcl.Range
	TrustDomain     Setting[spiffeid.TrustDomain]
	URL             Setting[string]
	Profile         Setting[Profile]
	EndpointID      Setting[spiffeid.ID] // https_spiffe
	BootstrapBundle Setting[string]      // https_spiffe: absolute path of a SPIFFE bundle; empty: none
	CAFile          Setting[string]      // https_web: absolute path of a PEM file; empty: the system's CAs
}

// Profile is how the server of a bundle endpoint is authenticated.
type Profile string

// The profiles of SPIFFE Federation.
const (
	Web    Profile = "https_web"
	SPIFFE Profile = "https_spiffe"
)

func (l *loader) federation(b *hclsyntax.Block) {
	if !l.once(b) || !l.labels(b) {
		return
	}
	f := &Federation{Range: b.DefRange()}
	l.c.Federation = f
	l.body(b.Body, b.Type, nil, blocks{
		"bundle_endpoint": func(b *hclsyntax.Block) {
			if e := l.bundleEndpoint(b); e != nil {
				f.Endpoint = e
			}
		},
		"federates_with": func(b *hclsyntax.Block) {
			if w, ok := l.federatesWith(b); ok {
				f.FederatesWith = append(f.FederatesWith, w)
			}
		},
	})
}

// bundleEndpoint returns nil for a block that may not be there.
func (l *loader) bundleEndpoint(b *hclsyntax.Block) *BundleEndpoint {
	if !l.once(b) || !l.labels(b) {
		return nil
	}
	e := &BundleEndpoint{Range: b.DefRange()}
	var profiles []*hclsyntax.Block
	l.body(b.Body, b.Type, keys{
		"address": func(a *hclsyntax.Attribute) { l.address(a, &e.Address) },
		"refresh_hint": func(a *hclsyntax.Attribute) {
			if d, ok := l.duration(a); ok {
				e.RefreshHint = d
			}
		},
	}, blocks{"profile": func(b *hclsyntax.Block) { profiles = append(profiles, b) }})
	l.want(b, "address")
	p, profile := l.profile(b, profiles)
	if p == nil {
		return e
	}
	e.Profile = profile
	if profile.Value == SPIFFE {
		l.body(p.Body, `profile "https_spiffe" of bundle_endpoint`, nil, nil)
		return e
	}
	l.body(p.Body, `profile "https_web" of bundle_endpoint`, keys{
		"cert_file": func(a *hclsyntax.Attribute) { l.path(a, &e.CertFile) },
		"key_file":  func(a *hclsyntax.Attribute) { l.path(a, &e.KeyFile) },
	}, nil)
	l.want(p, "cert_file", "key_file")
	return e
}

func (l *loader) federatesWith(b *hclsyntax.Block) (w FederatesWith, ok bool) {
	if !l.labels(b, "TRUST-DOMAIN") {
		return w, false
	}
	w.Range = b.DefRange()
	// What is in a block under a bad name is looked at all the same: every mistake is reported.
	w.TrustDomain, ok = l.trustDomain(Setting[string]{b.Labels[0], b.LabelRanges[0]})
	if ok && !l.once(b) {
		return w, false
	}
	if ok && w.TrustDomain.Value == l.c.TrustDomain.Value {
		l.problems.Add(b.LabelRanges[0], "%s is our own trust domain", w.TrustDomain.Value.Name())
		ok = false
	}
	var profiles []*hclsyntax.Block
	l.body(b.Body, b.Type, keys{
		"bundle_endpoint_url": func(a *hclsyntax.Attribute) { l.endpointURL(a, &w.URL) },
	}, blocks{"profile": func(b *hclsyntax.Block) { profiles = append(profiles, b) }})
	l.want(b, "bundle_endpoint_url")
	p, profile := l.profile(b, profiles)
	if p == nil {
		return w, false
	}
	w.Profile = profile
	if profile.Value == Web {
		l.body(p.Body, `profile "https_web" of federates_with`, keys{
			"ca_file": func(a *hclsyntax.Attribute) { l.path(a, &w.CAFile) },
		}, nil)
		return w, ok
	}
	l.body(p.Body, `profile "https_spiffe" of federates_with`, keys{
		"endpoint_spiffe_id": func(a *hclsyntax.Attribute) { l.spiffeID(a, &w.EndpointID) },
		"bootstrap_bundle":   func(a *hclsyntax.Attribute) { l.path(a, &w.BootstrapBundle) },
	}, nil)
	l.want(p, "endpoint_spiffe_id")
	id := w.EndpointID
	if at := p.Body.Attributes["bootstrap_bundle"]; at != nil && ok && !id.Value.IsZero() && !id.Value.MemberOf(w.TrustDomain.Value) {
		// SPIFFE Federation §5.2.2.2: that is the business of the other relationship.
		l.problems.Add(at.NameRange, "a bootstrap_bundle of %s cannot verify an endpoint of %s, whose own bundle does", w.TrustDomain.Value.Name(), id.Value.TrustDomain().Name())
	}
	return w, ok
}

// profile returns the one profile that a block has, with its name.
func (l *loader) profile(of *hclsyntax.Block, all []*hclsyntax.Block) (*hclsyntax.Block, Setting[Profile]) {
	var none Setting[Profile]
	if len(all) == 0 {
		l.problems.Add(of.DefRange(), "%s has no profile: profile \"https_spiffe\" { … } or profile \"https_web\" { … }", of.Type)
		return nil, none
	}
	for _, more := range all[1:] {
		l.problems.Add(more.TypeRange, "%s has a profile already, at line %d", of.Type, all[0].TypeRange.Start.Line)
	}
	p := all[0]
	if !l.labels(p, "PROFILE") {
		return nil, none
	}
	switch name := Profile(p.Labels[0]); name {
	case Web, SPIFFE:
		return p, Setting[Profile]{name, p.LabelRanges[0]}
	}
	l.problems.Add(p.LabelRanges[0], "unknown profile %q; there are https_spiffe and https_web", p.Labels[0])
	return nil, none
}

// want reports keys that a block must have.
func (l *loader) want(b *hclsyntax.Block, names ...string) {
	for _, name := range names {
		if b.Body.Attributes[name] == nil {
			l.problems.Add(b.DefRange(), "%s has no %s", b.Type, name)
		}
	}
}

// endpointURL reads the URL of a bundle endpoint (SPIFFE Federation §5.2.1.1).
func (l *loader) endpointURL(a *hclsyntax.Attribute, to *Setting[string]) {
	s, ok := l.text(a.Expr)
	if !ok {
		return
	}
	u, err := url.Parse(s.Value)
	switch {
	case err != nil || u.Hostname() == "" || u.Opaque != "" || !portExists(u):
		l.problems.Add(s.Range, "%s %q is not a URL such as \"https://other.example:8443/\"", a.Name, s.Value)
	case u.Scheme != "https":
		l.problems.Add(s.Range, "%s begins with %s://, not https://", a.Name, u.Scheme)
	case u.User != nil:
		l.problems.Add(s.Range, "%s has a user in it, which the standard forbids", a.Name)
	case u.Fragment != "" || u.RawFragment != "":
		l.problems.Add(s.Range, "%s has a fragment, which is never sent", a.Name)
	default:
		*to = s
	}
}

// spiffeID reads the ID of a server.
func (l *loader) spiffeID(a *hclsyntax.Attribute, to *Setting[spiffeid.ID]) {
	s, ok := l.text(a.Expr)
	if !ok {
		return
	}
	id, err := spiffeid.FromString(s.Value)
	switch {
	case err != nil:
		l.problems.Add(s.Range, "%s %.300q: %s", a.Name, s.Value, err)
	case id.Path() == "":
		l.problems.Add(s.Range, "%s %q has no path: no server has such an ID", a.Name, s.Value)
	default:
		*to = Setting[spiffeid.ID]{id, s.Range}
	}
}

// hint holds the refresh hint against the rotation, which another block may set
// after this one: a new key is to be seen three times before it signs.
func (l *loader) hint() {
	f := l.c.Federation
	if f == nil || f.Endpoint == nil || !f.Endpoint.RefreshHint.Given() {
		return
	}
	h, ttl := f.Endpoint.RefreshHint, l.c.Authority.CATTL.Value
	switch most := (ttl / 9).Truncate(time.Second); {
	case h.Value < time.Second:
		l.problems.Add(h.Range, "refresh_hint of %s is shorter than a second", h.Value)
	case h.Value > most:
		l.problems.Add(h.Range, "refresh_hint of %s is longer than %s, a ninth of ca_ttl (%s): followers would miss a new key", h.Value, most, ttl)
	}
}
