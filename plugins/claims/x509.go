package claims

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// A certificate is what a rule adds to an X.509-SVID: its x509 block.
type certificate struct {
	at                               pos
	dnsNames                         []template
	organization, organizationalUnit []template
	commonName                       template
}

// Certificate is what the X.509-SVID of an ID carries beside what is in it by
// default. What is empty stays as it is.
type Certificate struct {
	DNSNames           []string `json:"dns_names,omitempty"`
	Organization       []string `json:"organization,omitempty"`
	OrganizationalUnit []string `json:"organizational_unit,omitempty"`
	CommonName         string   `json:"common_name,omitempty"`
}

// maxCommonName is ub-common-name of RFC 5280; the other attributes have 64 as
// well (ub-organization-name, ub-organizational-unit-name).
const maxCommonName = 64

// Certificate returns what the X.509-SVID of an ID carries, or nil for nothing.
func (r *Rules) Certificate(id spiffeid.ID, now time.Time) (*Certificate, error) {
	rule, segments, err := r.match(id)
	if err != nil || rule == nil || rule.x509 == nil || rule.expired(now) {
		return nil, err
	}
	c := &Certificate{CommonName: rule.x509.commonName.expand(segments)}
	all := func(ts []template) (out []string) {
		for i := range ts {
			out = append(out, ts[i].expand(segments))
		}
		return out
	}
	c.DNSNames = all(rule.x509.dnsNames)
	for i, name := range c.DNSNames {
		// Segments may hold capitals, underscores and dots, and a label does not:
		// x.y would be a host below another agent's, and turning them into
		// something else could give two agents one name.
		if checkDNSName(name) != nil || rule.x509.dnsNames[i].dotted(segments) {
			return nil, fmt.Errorf("certificate of %s by the rule at %s: DNS name %q is not one", id, rule.where(), name)
		}
	}
	c.Organization = all(rule.x509.organization)
	c.OrganizationalUnit = all(rule.x509.organizationalUnit)
	for _, s := range slices.Concat(c.Organization, c.OrganizationalUnit, []string{c.CommonName}) {
		if len(s) > maxCommonName {
			return nil, fmt.Errorf("certificate of %s by the rule at %s: %q is longer than %d bytes", id, rule.where(), s, maxCommonName)
		}
	}
	return c, nil
}

// X509Blocks lists the x509 blocks, for who does not make certificates by them:
// a warning for each.
func (r *Rules) X509Blocks() Problems {
	var f findings
	for i := range r.rules {
		if one := &r.rules[i]; one.x509 != nil {
			f.add(one.text, one.x509.at, "x509 has no effect in the daemon, whose certificates have the dns_names of their entry; it is for SPIRE's server")
		}
	}
	f.err() // sorts, and counts those that are too many
	return f.problems
}

func (d *decoder) x509(b *block, r *rule) {
	if len(b.labels) > 0 {
		d.problem(b.labels[0].at, "x509 takes no name")
	}
	if r.x509 != nil {
		d.problem(b.at, "x509 is there already")
	}
	c := &certificate{at: b.at}
	r.x509 = c
	attribute := func(t *template) error {
		if len(t.example()) > maxCommonName {
			return fmt.Errorf("longer than %d bytes", maxCommonName)
		}
		return nil
	}
	d.body(&b.body, "x509", keys{
		"dns_names": func(v value) {
			c.dnsNames = d.templates(v, r, func(t *template) error { return checkDNSName(t.example()) })
		},
		"organization":        func(v value) { c.organization = d.templates(v, r, attribute) },
		"organizational_unit": func(v value) { c.organizationalUnit = d.templates(v, r, attribute) },
		"common_name":         func(v value) { c.commonName = d.template(v, r, attribute) },
	}, nil)
}

// checkDNSName wants a host name in lower case, without wildcards: what a rule
// makes of a segment must not become one.
func checkDNSName(s string) error {
	bad := fmt.Errorf("not a DNS name in lower case")
	if len(s) > 253 {
		return bad
	}
	for label := range strings.SplitSeq(s, ".") {
		if label == "" || len(label) > 63 || label[0] == '-' || label[len(label)-1] == '-' {
			return bad
		}
		for i := range len(label) {
			if c := label[i]; (c < 'a' || c > 'z') && !isDigit(c) && c != '-' {
				return bad
			}
		}
	}
	return nil
}
