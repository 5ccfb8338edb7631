package claims

import (
	"fmt"
	"maps"
	"net/url"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/deputy-id/deputy/delegation"
)

const (
	defaultName = "delegation"
	maxList     = 64 // values of a list
)

// registered are the names that have a meaning of their own in a token
// (RFC 7519 §4.1, JWT-SVID §3, RFC 8693 §4 and the registry of JWT claims).
var registered = map[string]bool{
	"iss": true, "sub": true, "aud": true, "exp": true, "nbf": true, "iat": true, "jti": true,
	"act": true, "may_act": true, "scope": true, "client_id": true, "cnf": true, "azp": true, "nonce": true,
	"auth_time": true, "acr": true, "amr": true, "sid": true, "txn": true, "toe": true, "events": true, "status": true,
	"sub_id": true, "sub_profile": true, "sub_jwk": true, "authorization_details": true, "roles": true, "groups": true,
	"entitlements": true, "vc": true, "vp": true, "name": true, "email": true, "email_verified": true,
}

// claimName is one that needs no escape in a JSON Pointer.
var claimName = regexp.MustCompile(`^[A-Za-z][A-Za-z0-9._-]{0,127}$`)

// settings are what a text says, unjoined: a rules file adds to them.
type settings struct {
	claimName, unmapped, onError, rulesFile setting
	rules                                   []rule
}

// A setting is a key of the top level; text is nil where it is not there.
type setting struct {
	value string
	text  *text
	at    pos
}

// A decoder turns what was parsed into rules, and collects what is wrong.
type decoder struct {
	findings
	trustDomain spiffeid.TrustDomain
	known       bool // the trust domain is given; else the first full ID gives it
	*text

	current             *rule // what the readers read into
	chainAt, maxDepthAt pos   // of the current rule
	ruleKeys, rateKeys  keys
	ruleBlocks          blocks
}

type (
	keys   map[string]func(value)
	blocks map[string]func(*block)
)

func (d *decoder) problem(at pos, format string, args ...any) { d.add(d.text, at, format, args...) }

// decode reads a text. Its grammar is that of plugin_data; a rules file has no
// rules_file.
func (d *decoder) decode(t *text, isFile bool) (s settings) {
	d.text = t
	parsed, err := parse(t)
	if err != nil {
		d.problems = append(d.problems, err.(Problems)...)
		return s
	}
	top := func(to *setting, check func(string) error) func(value) {
		return func(v value) {
			if text, ok := d.string(v); ok {
				if err := check(text); err != nil {
					d.problem(v.at, "%s", err)
					return
				}
				*to = setting{text, t, v.at}
			}
		}
	}
	s.rules = make([]rule, 0, len(parsed.blocks))
	k := keys{
		"claim_name": top(&s.claimName, checkClaimName),
		"unmapped":   top(&s.unmapped, oneOf("omit", "deny")),
		"on_error":   top(&s.onError, oneOf("deny", "omit")),
	}
	if !isFile {
		k["rules_file"] = top(&s.rulesFile, func(path string) error {
			if !filepath.IsAbs(path) {
				return fmt.Errorf("rules_file %q is not an absolute path", path)
			}
			return nil
		})
	}
	d.body(&parsed, "the rules", k, blocks{"rule": func(b *block) {
		before := len(d.problems) + d.more
		r := d.rule(b)
		if before == len(d.problems)+d.more {
			s.rules = append(s.rules, r)
		}
	}})
	return s
}

func checkClaimName(s string) error {
	switch {
	case registered[strings.ToLower(s)]: // to decoders that ignore case, as Go's does, it is the same
		return fmt.Errorf("claim_name %q has a meaning of its own in a token; choose another", s)
	case !claimName.MatchString(s):
		return fmt.Errorf("claim_name %q is not a name of letters, digits, dots, hyphens and underscores", s)
	}
	return nil
}

func oneOf(names ...string) func(string) error {
	return func(s string) error {
		if !slices.Contains(names, s) {
			return fmt.Errorf("%q is neither %s", s, strings.Join(names, " nor "))
		}
		return nil
	}
}

// body hands keys and blocks to their readers; each key may be there once, and
// whatever has no reader is a problem.
func (d *decoder) body(b *body, in string, k keys, bl blocks) {
	repeated := repeats(b.attributes)
	for i := range b.attributes {
		a := &b.attributes[i]
		first, again := repeated[i]
		switch {
		case again:
			line, _ := d.place(b.attributes[first].at)
			d.problem(a.at, "%s is there already, at line %d", a.name, line)
		case k[a.name] != nil:
			k[a.name](a.value)
		case bl[a.name] != nil:
			d.problem(a.at, "%s is a block: %[1]s { … }, without =", a.name)
		default:
			d.problem(a.at, "unknown key %q in %s; there %s", a.name, in, all(k, bl))
		}
	}
	for i := range b.blocks {
		one := &b.blocks[i]
		switch {
		case bl[one.name] != nil:
			bl[one.name](one)
		case k[one.name] != nil:
			d.problem(one.at, "%s is a key: %[1]s = …", one.name)
		case one.name == "plugin_data":
			d.problem(one.at, "plugin_data is a block of SPIRE's own configuration; here stands what is in it")
		default:
			d.problem(one.at, "unknown block %q in %s; there %s", one.name, in, list(bl))
		}
	}
}

// repeats maps the places of keys that are there already to their first ones.
// It is nil for nearly every body.
func repeats(attributes []attribute) (repeated map[int]int) {
	found := func(first, again int) {
		if repeated == nil {
			repeated = make(map[int]int)
		}
		repeated[again] = first
	}
	if len(attributes) > 16 { // more than any block has: a file may be nothing else
		seen := make(map[string]int)
		for i, a := range attributes {
			if first, ok := seen[a.name]; ok {
				found(first, i)
			} else {
				seen[a.name] = i
			}
		}
		return repeated
	}
	for i, a := range attributes {
		if first := slices.IndexFunc(attributes[:i], func(o attribute) bool { return o.name == a.name }); first >= 0 {
			found(first, i)
		}
	}
	return repeated
}

// all lists keys, and blocks if there are any: who took the one for the other
// finds it.
func all(k keys, bl blocks) string {
	switch len(bl) {
	case 0:
		return list(k)
	case 1:
		return list(k) + ", and the block " + strings.TrimPrefix(list(bl), "is only ")
	}
	return list(k) + ", and the blocks " + strings.TrimPrefix(list(bl), "are ")
}

func list[V any](m map[string]V) string {
	names := slices.Sorted(maps.Keys(m))
	switch len(names) {
	case 0:
		return "are none"
	case 1:
		return "is only " + names[0]
	}
	return "are " + strings.Join(names[:len(names)-1], ", ") + " and " + names[len(names)-1]
}

func (d *decoder) string(v value) (string, bool) {
	if v.kind != aString {
		d.problem(v.at, "this is %s; a string in double quotes belongs here", v.kind)
		return "", false
	}
	if err := checkText(v.text); err != nil {
		d.problem(v.at, "%s", err)
		return "", false
	}
	return v.text, true
}

func (d *decoder) rule(b *block) (r rule) {
	r.text, r.at = d.text, b.at
	if len(b.labels) != 1 {
		d.problem(b.at, `a rule has one pattern: rule "/agent/{team}/*" { … }`)
		return r
	}
	pattern, td, err := parsePattern(b.labels[0].text)
	if err != nil {
		d.problem(b.labels[0].at, "pattern %.300q: %s", b.labels[0].text, err)
		return r // its values cannot be held against it
	}
	r.pattern = pattern
	d.ours(b.labels[0].at, td)
	if d.ruleKeys == nil {
		d.readers()
	}
	d.current, d.chainAt, d.maxDepthAt = &r, pos{}, pos{}
	d.body(&b.body, "a rule", d.ruleKeys, d.ruleBlocks)
	if !r.issuer.empty() && r.subject.empty() {
		d.problem(b.at, "the rule has an issuer, but no subject that it vouches for")
	}
	switch depth := 1 + len(r.chain); {
	case depth > delegation.MaxDepth:
		d.problem(d.chainAt, "the chain has %d agents with this one, more than %d", depth, delegation.MaxDepth)
	case r.maxDepth > 0 && depth > r.maxDepth:
		d.problem(d.maxDepthAt, "max_depth is %d, but the chain has %d agents with this one", r.maxDepth, depth)
	}
	for _, actor := range r.chain {
		if path := strings.TrimPrefix(actor.text, "spiffe://"+td); path == b.labels[0].text || path == strings.TrimPrefix(b.labels[0].text, "spiffe://"+td) {
			d.problem(d.chainAt, "the chain names the agent itself")
		}
	}
	return r
}

// readers makes the readers of a rule, which are the same for every rule.
func (d *decoder) readers() {
	r := func() *rule { return d.current }
	d.ruleKeys = keys{
		"subject":    func(v value) { r().subject = d.template(v, r(), nil) },
		"issuer":     func(v value) { r().issuer = d.template(v, r(), checkIssuer) },
		"owner":      func(v value) { r().owner = d.template(v, r(), nil) },
		"agent_type": func(v value) { r().agentType = d.template(v, r(), nil) },
		"purpose":    func(v value) { r().purpose = d.template(v, r(), nil) },
		"scopes":     func(v value) { r().scopes = d.templates(v, r(), checkScope) },
		"chain":      func(v value) { d.chainAt, r().chain = v.at, d.templates(v, r(), checkActor) },
		"may_act":    func(v value) { r().mayAct = d.templates(v, r(), checkActor) },
		"max_depth":  func(v value) { d.maxDepthAt, r().maxDepth = v.at, d.number(v, "max_depth", delegation.MaxDepth) },
		"expires":    func(v value) { r().expires = d.time(v) },
	}
	d.ruleBlocks = blocks{
		"constraints": func(b *block) { d.constraints(b, r()) },
		"x509":        func(b *block) { d.x509(b, r()) },
	}
	d.rateKeys = keys{"rate": func(v value) { d.rate(v, r()) }}
}

// ours refuses a pattern of another trust domain; td is empty for a path.
func (d *decoder) ours(at pos, name string) {
	switch {
	case name == "" || name == d.trustDomain.Name():
	case d.trustDomain.IsZero():
		d.trustDomain = spiffeid.RequireTrustDomainFromString(name) // parsePattern checked it
	case d.known:
		d.problem(at, "the pattern is of the trust domain %s, and this is %s", name, d.trustDomain)
	default:
		d.problem(at, "the pattern is of the trust domain %s, another one of %s", name, d.trustDomain)
	}
}

func (d *decoder) template(v value, r *rule, check func(*template) error) (t template) {
	s, ok := d.string(v)
	if !ok {
		return t
	}
	t, err := parseTemplate(s, &r.pattern)
	if err == nil && check != nil {
		err = check(&t)
	}
	if err != nil {
		d.problem(v.at, "%.300q: %s", s, err)
	}
	return t
}

func (d *decoder) templates(v value, r *rule, check func(*template) error) (all []template) {
	switch {
	case v.kind != aList:
		d.problem(v.at, `this is %s; a list of strings belongs here: ["…"]`, v.kind)
		return nil
	case len(v.list) > maxList:
		d.problem(v.at, "the list has %d values, more than %d", len(v.list), maxList)
		return nil
	}
	if len(v.list) > 0 {
		all = make([]template, 0, len(v.list))
	}
	for i, one := range v.list {
		t := d.template(one, r, check)
		if slices.ContainsFunc(all, func(o template) bool { return o.text == t.text && t.text != "" }) {
			d.problem(v.list[i].at, "%q is in the list already", t.text)
		}
		all = append(all, t)
	}
	return all
}

// checkIssuer wants a URI where there is a colon (RFC 7519 §2, StringOrURI).
func checkIssuer(t *template) error {
	s := t.example()
	if u, err := url.Parse(s); strings.Contains(s, ":") && (err != nil || u.Scheme == "") {
		return fmt.Errorf("an issuer with a colon in it is a URI")
	}
	return nil
}

// checkScope wants a scope-token (RFC 6749 §3.3).
func checkScope(t *template) error {
	for _, c := range []byte(t.example()) {
		if c <= ' ' || c > '~' || c == '"' || c == '\\' {
			return fmt.Errorf("a scope is one word of visible ASCII characters, without quotes and backslashes")
		}
	}
	return nil
}

// checkActor wants a path or a SPIFFE ID, whatever the segments are.
func checkActor(t *template) error {
	if s := t.text; s[0] != '/' && !strings.HasPrefix(s, "spiffe://") {
		return fmt.Errorf("an agent is a path or a SPIFFE ID")
	}
	if _, rest, full := strings.Cut(t.text, "spiffe://"); full {
		if td, _, _ := strings.Cut(rest, "/"); strings.ContainsAny(td, "{}") {
			return fmt.Errorf("a trust domain is not a segment's to choose")
		}
	}
	_, err := expandID(&template{text: t.example()}, spiffeid.RequireTrustDomainFromString("x"), nil)
	return err
}

func (d *decoder) number(v value, name string, most int) int {
	n, err := strconv.Atoi(v.text)
	switch {
	case v.kind != aNumber:
		d.problem(v.at, "this is %s; a whole number belongs here", v.kind)
	case err != nil || n < 1 || n > most:
		d.problem(v.at, "%s is a number from 1 to %d", name, most)
	default:
		return n
	}
	return 0
}

func (d *decoder) time(v value) time.Time {
	s, ok := d.string(v)
	if !ok {
		return time.Time{}
	}
	at, err := time.Parse(time.RFC3339, s)
	at = at.UTC()
	if err != nil || at.Nanosecond() != 0 || at.Year() < 1970 || at.Year() > 9999 {
		d.problem(v.at, `%.100q is not a time such as "2027-01-31T00:00:00Z"`, s)
		return time.Time{}
	}
	return at
}

func (d *decoder) constraints(b *block, r *rule) {
	if len(b.labels) > 0 {
		d.problem(b.labels[0].at, "constraints takes no name")
	}
	if r.rate != nil {
		d.problem(b.at, "constraints is there already")
	}
	d.body(&b.body, "constraints", d.rateKeys, nil)
}

func (d *decoder) rate(v value, r *rule) {
	s, ok := d.string(v)
	if !ok {
		return
	}
	rate, err := parseRate(s)
	if err != nil {
		d.problem(v.at, "rate %.100q %s", s, err)
		return
	}
	r.rate = &rate
}

var errRate = fmt.Errorf(`is not uses in a time, such as "120/60s", of at most %d whole seconds and as many uses`, delegation.MaxNumber)

// parseRate reads "120/60s".
func parseRate(s string) (rate delegation.Rate, err error) {
	limit, window, ok := strings.Cut(s, "/")
	n, err := strconv.ParseUint(limit, 10, 32)
	if !ok || err != nil || n < 1 || n > delegation.MaxNumber {
		return rate, errRate
	}
	length, err := time.ParseDuration(window)
	if err != nil || length < time.Second || length%time.Second != 0 || length > delegation.MaxNumber*time.Second {
		return rate, errRate
	}
	return delegation.Rate{Limit: int(n), Window: int(length / time.Second)}, nil
}
