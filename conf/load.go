package conf

import (
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/hcl/v2"
	"github.com/hashicorp/hcl/v2/hclsyntax"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

const (
	// MinTTL is the shortest life of an SVID.
	MinTTL = 5 * time.Second
	// minCATTL lets the shortest SVID end before its CA: see maxTTL.
	minCATTL     = 6 * MinTTL
	maxCATTL     = 20 * 365 * 24 * time.Hour
	maxSocket    = 107  // bytes of a path in a sockaddr_un, without its final zero
	maxID        = 2048 // bytes of a SPIFFE ID
	dockerSocket = "/run/docker.sock"
)

// Load reads the configuration file at path; what it does not set stays as it
// is in base. Warnings are problems that do not keep the configuration from
// use.
//
// The error is a Problems if it is the content that is wrong. Then the Config,
// if there is one, lacks the values that are wrong, and serves only to look for
// more.
func Load(path string, base *Config) (c *Config, warnings Problems, err error) {
	src, err := read(path)
	if err != nil {
		return nil, nil, err
	}
	c, warnings, found := decode(src, path, base)
	if info, err := os.Stat(path); err == nil && info.Mode().Perm()&0o022 != 0 {
		start := hcl.Range{Filename: path, Start: hcl.InitialPos, End: hcl.InitialPos}
		warnings.Add(start, "the file may be written by others than its owner (mode %04o), who could give themselves any identity", info.Mode().Perm())
		warnings.Sort()
	}
	if len(found) > 0 {
		return c, warnings, found
	}
	return c, warnings, nil
}

// decode is Load without the file system.
func decode(src []byte, file string, base *Config) (*Config, Problems, Problems) {
	body, found := parse(src, file)
	if len(found) > 0 {
		found.Sort()
		return nil, nil, found
	}
	c := *base
	c.File, c.Docker, c.Systemd, c.Entries = file, nil, nil, nil
	l := &loader{c: &c, first: make(map[string]hcl.Range)}
	l.file(body)
	l.problems.Sort()
	l.warnings.Sort()
	return &c, l.warnings, l.problems
}

// A loader reads the file into c.
type loader struct {
	reader
	c        *Config
	first    map[string]hcl.Range // the header of each block that may be there once
	warnings Problems
}

func (l *loader) file(body *hclsyntax.Body) {
	c := l.c
	var entries []*hclsyntax.Block
	l.body(body, "the file", keys{
		"trust_domain": func(a *hclsyntax.Attribute) {
			if s, ok := l.text(a.Expr); ok {
				if td, ok := l.trustDomain(s); ok {
					c.TrustDomain = td
				}
			}
		},
		"data_dir": func(a *hclsyntax.Attribute) { l.path(a, &c.DataDir) },
		"log_level": func(a *hclsyntax.Attribute) {
			if s, ok := choice(&l.reader, a, "trace", "debug", "info", "warn", "error"); ok {
				c.LogLevel = Setting[hclog.Level]{hclog.LevelFromString(s.Value), s.Range}
			}
		},
		"log_format": func(a *hclsyntax.Attribute) {
			if s, ok := choice(&l.reader, a, Text, JSON); ok {
				c.LogFormat = s
			}
		},
	}, blocks{
		"workload_socket": func(b *hclsyntax.Block) {
			if l.once(b) && l.labels(b) {
				l.body(b.Body, b.Type, keys{
					"path": func(a *hclsyntax.Attribute) { l.socket(a, &c.WorkloadSocket.Path) },
				}, nil)
			}
		},
		"admin_socket": func(b *hclsyntax.Block) {
			if l.once(b) && l.labels(b) {
				l.body(b.Body, b.Type, keys{
					"path":  func(a *hclsyntax.Attribute) { l.socket(a, &c.AdminSocket.Path) },
					"group": func(a *hclsyntax.Attribute) { l.set(a, &c.AdminSocket.Group) },
				}, nil)
			}
		},
		"authority": l.authority,
		"attestor":  l.attestor,
		"entry":     func(b *hclsyntax.Block) { entries = append(entries, b) },
	})

	l.places()
	if g := c.AdminSocket.Group; g.Given() {
		l.warnings.Add(g.Range, "every member of the group %q may become any identity", g.Value)
	}
	if c.Authority.Keys.Given() && c.Authority.Keys.Value == Memory {
		l.warnings.Add(c.Authority.Keys.Range, "keys in memory end with the daemon: each start makes a new trust bundle")
	}
	// Entries last: their TTLs and full IDs are held against the rest.
	similar := make(map[string]hcl.Range)
	for _, b := range entries {
		l.entry(b, similar)
	}
}

// once refuses the second block of a kind (and name).
func (l *loader) once(b *hclsyntax.Block) bool {
	key := strings.Join(append([]string{b.Type}, b.Labels...), " ")
	if first, ok := l.first[key]; ok {
		l.problems.Add(b.TypeRange, "%s is there already, at line %d", key, first.Start.Line)
		return false
	}
	l.first[key] = b.TypeRange
	return true
}

func (l *loader) authority(b *hclsyntax.Block) {
	if !l.labels(b, "local") {
		return
	}
	if b.Labels[0] != "local" {
		l.problems.Add(b.LabelRanges[0], "unknown authority %q; there is only local", b.Labels[0])
		return
	}
	if !l.once(b) {
		return
	}
	a := &l.c.Authority
	a.Range = b.DefRange()
	keyType := func(to *Setting[string]) func(*hclsyntax.Attribute) {
		return func(attr *hclsyntax.Attribute) {
			if s, ok := choice(&l.reader, attr, "ec-p256", "ec-p384", "rsa-2048"); ok {
				*to = s
			}
		}
	}
	file := func(to *Setting[string]) func(*hclsyntax.Attribute) {
		return func(attr *hclsyntax.Attribute) { l.path(attr, to) }
	}
	l.body(b.Body, `authority "local"`, keys{
		"ca_ttl": func(attr *hclsyntax.Attribute) {
			d, ok := l.duration(attr)
			switch {
			case !ok:
			case d.Value < minCATTL:
				l.problems.Add(d.Range, "ca_ttl of %s is shorter than %s, six times the shortest SVID", d.Value, minCATTL)
			case d.Value > maxCATTL:
				l.problems.Add(d.Range, "ca_ttl of %s is longer than twenty years", d.Value)
			default:
				a.CATTL = d
			}
		},
		"key_type":          keyType(&a.KeyType),
		"workload_key_type": keyType(&a.WorkloadKeyType),
		"keys": func(attr *hclsyntax.Attribute) {
			if s, ok := choice(&l.reader, attr, Disk, Memory); ok {
				a.Keys = s
			}
		},
		"upstream_cert":   file(&a.UpstreamCert),
		"upstream_key":    file(&a.UpstreamKey),
		"upstream_bundle": file(&a.UpstreamBundle),
		"jwt_issuer":      func(attr *hclsyntax.Attribute) { l.issuer(attr, &a.JWTIssuer) },
	}, nil)

	// Presence counts here, not whether the value was good.
	has := func(name string) bool { return b.Body.Attributes[name] != nil }
	switch cert, key := has("upstream_cert"), has("upstream_key"); {
	case cert && !key:
		l.problems.Add(b.Body.Attributes["upstream_cert"].NameRange, "upstream_cert needs upstream_key beside it")
	case key && !cert:
		l.problems.Add(b.Body.Attributes["upstream_key"].NameRange, "upstream_key needs upstream_cert beside it")
	case has("upstream_bundle") && !cert:
		l.problems.Add(b.Body.Attributes["upstream_bundle"].NameRange, "upstream_bundle needs upstream_cert and upstream_key beside it")
	}
}

func (l *loader) attestor(b *hclsyntax.Block) {
	if !l.labels(b, "NAME") {
		return
	}
	switch name := b.Labels[0]; name {
	case "docker":
		if !l.once(b) {
			return
		}
		d := &Docker{Range: b.DefRange(), Socket: setting(dockerSocket)}
		l.c.Docker = d
		l.body(b.Body, `attestor "docker"`, keys{
			"socket": func(a *hclsyntax.Attribute) { l.socket(a, &d.Socket) },
			"env": func(a *hclsyntax.Attribute) {
				for _, s := range l.texts(a.Expr) {
					if strings.ContainsAny(s.Value, "=\x00") {
						l.problems.Add(s.Range, "%q is not the name of an environment variable", s.Value)
						continue
					}
					d.Env = append(d.Env, s)
				}
			},
		}, nil)
	case "systemd":
		if !l.once(b) {
			return
		}
		l.c.Systemd = &Systemd{Range: b.DefRange()}
		l.body(b.Body, `attestor "systemd"`, nil, nil)
	case "unix", "process", "cgroup":
		l.problems.Add(b.LabelRanges[0], "the attestor %s is always on and has no settings", name)
	default:
		l.problems.Add(b.LabelRanges[0], "unknown attestor %q; there are docker and systemd, and unix, process and cgroup are always on", name)
	}
}

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
	if err != nil || u.Scheme != "https" && u.Scheme != "http" || u.Host == "" || u.User != nil || strings.ContainsAny(s.Value, "?#") {
		l.problems.Add(s.Range, "jwt_issuer %q is not a URL such as \"https://issuer.example.org\"", s.Value)
		return
	}
	*to = s
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

// places keeps what is private out of the directory that containers mount, in
// which their root may do as it likes. It compares the paths as they are
// written; a link between them is for the one who writes them to see.
func (l *loader) places() {
	c := l.c
	public := filepath.Dir(c.WorkloadSocket.Path.Value)
	for _, private := range []struct {
		what string
		at   Setting[string]
	}{
		{"the admin socket", c.AdminSocket.Path},
		{"data_dir", c.DataDir},
		{"upstream_key", c.Authority.UpstreamKey},
	} {
		if private.at.Value == "" || !within(private.at.Value, public) {
			continue
		}
		at := private.at.Range
		if !private.at.Given() {
			at = c.WorkloadSocket.Path.Range
		}
		l.problems.Add(at, "%s (%s) may not be in or below the workload socket's directory %s, which containers mount", private.what, private.at.Value, public)
	}
	if private := filepath.Dir(c.AdminSocket.Path.Value); public != private && within(public, private) {
		at := c.WorkloadSocket.Path.Range
		if !c.WorkloadSocket.Path.Given() {
			at = c.AdminSocket.Path.Range
		}
		l.problems.Add(at, "the workload socket's directory %s is below the admin socket's %s, which only its owner may enter", public, private)
	}
}

// within reports whether a clean path is dir or below it.
func within(path, dir string) bool {
	return path == dir || strings.HasPrefix(path, strings.TrimSuffix(dir, "/")+"/")
}
