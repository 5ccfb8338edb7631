package registry

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/deputy-id/deputy/attestor"
)

// Bounds of an entry. A TTL of zero is the authority's default, which has
// limits of its own.
const (
	MinTTL      = 5 * time.Second
	MaxTTL      = 365 * 24 * time.Hour
	maxHint     = 1024 // bytes (SPIFFE Workload API §5.2.1)
	maxAudience = 2048 // bytes
	maxEntryID  = 255  // bytes, as in SPIRE
)

// A Fault is one thing that is wrong with an entry. It wraps ErrInvalid.
type Fault struct {
	Field  string // the configuration's key for the field: "selectors"; "path" and "id" are those of the block itself
	Reason string
}

func (f *Fault) Error() string { return f.Reason }
func (f *Fault) Unwrap() error { return ErrInvalid }

// Faults is all that is wrong with an entry, never empty where it is an error.
type Faults []*Fault

func (f Faults) Error() string {
	reasons := make([]string, len(f))
	for i, one := range f {
		reasons[i] = one.Reason
	}
	return ErrInvalid.Error() + ": " + strings.Join(reasons, "; ")
}

func (f Faults) Unwrap() []error {
	errs := make([]error, len(f))
	for i, one := range f {
		errs[i] = one
	}
	return errs
}

func (f *Faults) add(field, format string, args ...any) {
	*f = append(*f, &Fault{Field: field, Reason: fmt.Sprintf(format, args...)})
}

// NodeID is the parent of this node's entries.
func NodeID(td spiffeid.TrustDomain) spiffeid.ID {
	return spiffeid.RequireFromPath(td, "/spire/agent/deputy/local")
}

// Check returns the entry as it is to be kept in a trust domain: selectors and
// federated trust domains sorted, SPIFFEID set where it is the same for every
// process, the parent filled in. Path counts; SPIFFEID is read only where Path
// is empty. The error is a Faults and lists everything that is wrong.
func (e Entry) Check(td spiffeid.TrustDomain) (Entry, error) {
	var f Faults
	e = e.clone()

	if e.ID != "" {
		if bad := strings.IndexFunc(e.ID, func(r rune) bool { return notWord(r) && r != '.' }); bad >= 0 || len(e.ID) > maxEntryID {
			f.add("id", "entry ID %.300q is not 1 to %d of the characters A-Z a-z 0-9 . _ -", e.ID, maxEntryID)
		}
	}
	e.checkPath(td, &f)
	e.checkParent(td, &f)
	e.checkSelectors(&f)
	checkTTL("x509_ttl", e.X509TTL, &f)
	checkTTL("jwt_ttl", e.JWTTTL, &f)
	e.checkDNSNames(&f)
	e.checkFederation(td, &f)

	if len(e.Hint) > maxHint {
		f.add("hint", "hint is %d bytes long, longer than %d", len(e.Hint), maxHint)
	} else if !printable(e.Hint) {
		f.add("hint", "hint %q has bytes that are not printable text", e.Hint)
	}
	for i, a := range e.Audiences {
		switch {
		case a == "":
			f.add("audiences", "an audience is empty")
		case len(a) > maxAudience:
			f.add("audiences", "an audience is %d bytes long, longer than %d", len(a), maxAudience)
		case !printable(a):
			f.add("audiences", "audience %q has bytes that are not printable text", a)
		case slices.Contains(e.Audiences[:i], a):
			f.add("audiences", "audience %q is there twice", a)
		}
	}
	if len(f) > 0 {
		return Entry{}, f
	}
	return e, nil
}

func (e *Entry) checkPath(td spiffeid.TrustDomain, f *Faults) {
	if !e.SPIFFEID.IsZero() && !e.SPIFFEID.MemberOf(td) {
		f.add("path", "%s is not of the trust domain %s", e.SPIFFEID, td)
		return
	}
	if e.Path == "" {
		e.Path = e.SPIFFEID.Path()
	}
	e.SPIFFEID = spiffeid.ID{}
	t, err := parsePath(e.Path)
	if err != nil {
		f.add("path", "%s", err)
		return
	}
	length := len(td.IDString()) + len(e.Path)
	if e.Instance {
		length += 1 + instanceLength
	}
	if length > maxID {
		f.add("path", "the SPIFFE ID is longer than %d bytes", maxID)
		return
	}
	if t.fixed() && !e.Instance {
		if e.SPIFFEID, err = spiffeid.FromPath(td, e.Path); err != nil {
			f.add("path", "%s", err)
		}
	}
}

func (e *Entry) checkParent(td spiffeid.TrustDomain, f *Faults) {
	node := NodeID(td)
	switch {
	case e.ParentID.IsZero():
		e.ParentID = node
	case e.ParentID == node:
	case e.ParentID.MemberOf(td) && e.ParentID.Path() == "/spire/server":
	default:
		f.add("parent_id", "parent %s is neither this node (%s) nor its server; an entry for another node would never be served here", e.ParentID, node)
	}
}

func (e *Entry) checkSelectors(f *Faults) {
	if len(e.Selectors) == 0 {
		f.add("selectors", "an entry needs at least one selector; without any it would be everybody's")
		return
	}
	for _, s := range e.Selectors {
		if got, err := attestor.ParseSelector(s.String()); err != nil {
			f.add("selectors", "%s", err)
		} else if got != s {
			f.add("selectors", "selector type %q has a colon in it", s.Type)
		}
	}
	slices.SortFunc(e.Selectors, attestor.Selector.Compare)
	e.Selectors = slices.Compact(e.Selectors)
	if slices.Contains(e.Selectors, leader) && !slices.ContainsFunc(e.Selectors, led) {
		f.add("selectors", "%s needs a selector beside it that names the unit, container, pod or image: anybody can lead something", leader)
	}
}

func checkTTL(field string, ttl time.Duration, f *Faults) {
	switch {
	case ttl == 0:
	case ttl < MinTTL:
		f.add(field, "%s of %s is shorter than %s", field, ttl, MinTTL)
	case ttl > MaxTTL:
		f.add(field, "%s of %s is longer than a year (%s)", field, ttl, MaxTTL)
	case ttl%time.Second != 0:
		f.add(field, "%s of %s is not a whole number of seconds", field, ttl)
	}
}

func (e *Entry) checkFederation(td spiffeid.TrustDomain, f *Faults) {
	for _, other := range e.FederatesWith {
		switch {
		case other.IsZero():
			f.add("federates_with", "a trust domain is empty")
		case other == td:
			f.add("federates_with", "%s is the entry's own trust domain", other)
		}
	}
	slices.SortFunc(e.FederatesWith, spiffeid.TrustDomain.Compare)
	e.FederatesWith = slices.Compact(e.FederatesWith)
}

func (e *Entry) checkDNSNames(f *Faults) {
	for i, name := range e.DNSNames {
		if err := checkDNSName(name); err != nil {
			f.add("dns_names", "DNS name %.300q: %s", name, err)
			continue
		}
		if slices.Contains(e.DNSNames[:i], name) {
			f.add("dns_names", "DNS name %q is there twice", name)
			continue
		}
		if _, parent, ok := strings.Cut(name, "."); ok && name[0] != '*' && slices.Contains(e.DNSNames, "*."+parent) {
			f.add("dns_names", "DNS name %q is covered by %q", name, "*."+parent)
		}
	}
}

// checkDNSName accepts host names (RFC 1123 §2.1), and a wildcard as the whole
// first label.
func checkDNSName(name string) error {
	host := strings.TrimPrefix(name, "*.")
	if len(name) > 253 {
		return errors.New("longer than 253 bytes")
	}
	for label := range strings.SplitSeq(host, ".") {
		switch {
		case label == "":
			return errors.New("it has an empty label")
		case len(label) > 63:
			return errors.New("a label is longer than 63 bytes")
		case label[0] == '-' || label[len(label)-1] == '-':
			return errors.New("a label begins or ends with a hyphen")
		case strings.Contains(label, "*"):
			return errors.New("a wildcard may only be the whole first label")
		case strings.ContainsFunc(label, func(r rune) bool { return notWord(r) || r == '_' }):
			return errors.New("labels have only letters, digits and hyphens")
		}
	}
	return nil
}

func printable(s string) bool {
	return utf8.ValidString(s) && !strings.ContainsFunc(s, func(r rune) bool { return r < ' ' || r == 0x7f })
}

// clone copies what Check sorts and an editor may change.
func (e Entry) clone() Entry {
	e.Selectors = slices.Clone(e.Selectors)
	e.DNSNames = slices.Clone(e.DNSNames)
	e.FederatesWith = slices.Clone(e.FederatesWith)
	e.Audiences = slices.Clone(e.Audiences)
	return e
}

// compare is the order in which SVIDs are served, but for entries of the file:
// they come first, as they stand there.
func (e *Entry) compare(o *Entry) int {
	return cmp.Or(e.CreatedAt.Compare(o.CreatedAt), strings.Compare(e.ID, o.ID))
}
