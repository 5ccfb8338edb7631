package conf

import (
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/hcl/v2"
	"github.com/hashicorp/hcl/v2/hclsyntax"

	"github.com/deputy-id/deputy/internal/bounded"
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
	src, err := bounded.File(path, maxFile)
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
	c.File, c.Docker, c.Systemd, c.Claims, c.Entries = file, nil, nil, nil, nil
	c.OIDCDiscovery, c.Federation = nil, nil
	c.DelegatedIdentity, c.Broker = nil, nil
	l := &loader{c: &c, src: src, first: make(map[string]hcl.Range)}
	l.file(body)
	l.problems.Sort()
	l.warnings.Sort()
	return &c, l.warnings, l.problems
}

// A loader reads the file into c.
type loader struct {
	reader
	c        *Config
	src      []byte
	first    map[string]hcl.Range // the header of each block that may be there once
	warnings Problems

	hasIssuer bool // the file says jwt_issuer, rightly or wrongly
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
		"claims": func(b *hclsyntax.Block) {
			if l.once(b) && l.labels(b) {
				start := b.OpenBraceRange.End
				c.Claims = &Claims{b.DefRange(), string(l.src[start.Byte:b.CloseBraceRange.Start.Byte]), start}
			}
		},
		"sds":                l.sds,
		"oidc_discovery":     l.discovery,
		"federation":         l.federation,
		"experimental":       l.experimental,
		"delegated_identity": l.delegatedIdentity,
		"broker":             l.broker,
		"entry":              func(b *hclsyntax.Block) { entries = append(entries, b) },
	})

	l.places()
	l.issuerServed()
	l.hint()
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
	l.hasIssuer = has("jwt_issuer")
	var there, missing []string
	for _, name := range []string{"upstream_cert", "upstream_key", "upstream_bundle"} {
		if has(name) {
			there = append(there, name)
		} else {
			missing = append(missing, name)
		}
	}
	if len(there) > 0 && len(missing) > 0 {
		l.problems.Add(b.Body.Attributes[there[0]].NameRange, "%s needs %s beside it", there[0], strings.Join(missing, " and "))
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

// A place is a setting that says where something is.
type place struct {
	what string
	at   Setting[string]
}

func (p place) dir() string { return filepath.Dir(p.at.Value) }

// places keeps what is private out of the directories that containers mount, in
// which their root may do as it likes. It compares the paths as they are
// written; a link between them is for the one who writes them to see.
func (l *loader) places() {
	c := l.c
	workload, admin := place{"the workload socket", c.WorkloadSocket.Path}, place{"the admin socket", c.AdminSocket.Path}
	private := []place{admin, {"data_dir", c.DataDir}, {"upstream_key", c.Authority.UpstreamKey}}
	if d := c.OIDCDiscovery; d != nil {
		private = append(private, place{"key_file", d.KeyFile})
	}
	if f := c.Federation; f != nil {
		if f.Endpoint != nil {
			private = append(private, place{"key_file", f.Endpoint.KeyFile})
		}
		for _, w := range f.FederatesWith { // who could change these is that trust domain
			private = append(private, place{"bootstrap_bundle", w.BootstrapBundle}, place{"ca_file", w.CAFile})
		}
	}
	var lent []place // sockets of those who act for others
	if d := c.DelegatedIdentity; d != nil {
		lent = append(lent, place{"the delegated_identity socket", d.Socket})
	}
	if k := c.Broker; k != nil {
		if k.Kubelet != nil {
			private = append(private, place{"token_file", k.Kubelet.TokenFile}, place{"ca_file", k.Kubelet.CAFile})
		}
		if k.Socket.Value != "" {
			lent = append(lent, place{"the broker socket", k.Socket})
		}
	}
	l.apart(append(private, lent...), workload, "containers mount")
	for _, socket := range lent {
		l.apart(private, socket, "containers of those who use it mount")
		l.passable(socket, admin)
	}
	l.passable(workload, admin)
	if len(lent) == 2 && lent[0].at.Value == lent[1].at.Value {
		l.problems.Add(lent[1].at.Range, "%s has the path of %s", lent[1].what, lent[0].what)
	}
}

// apart wants none of the private places in or below a socket's directory.
func (l *loader) apart(private []place, socket place, who string) {
	for _, p := range private {
		if p.at.Value == "" || !within(p.at.Value, socket.dir()) {
			continue
		}
		at := p.at.Range
		if !p.at.Given() {
			at = socket.at.Range
		}
		l.problems.Add(at, "%s (%s) may not be in or below %s's directory %s, which %s", p.what, p.at.Value, socket.what, socket.dir(), who)
	}
}

// passable wants a socket that others use outside of the admin socket's
// directory.
func (l *loader) passable(socket, admin place) {
	dir, private := socket.dir(), admin.dir()
	if dir == private || !within(dir, private) {
		return
	}
	at := socket.at.Range
	if !socket.at.Given() {
		at = admin.at.Range
	}
	l.problems.Add(at, "%s's directory %s is below the admin socket's %s, which only its owner may enter", socket.what, dir, private)
}

// within reports whether a clean path is dir or below it.
func within(path, dir string) bool {
	return path == dir || strings.HasPrefix(path, strings.TrimSuffix(dir, "/")+"/")
}
