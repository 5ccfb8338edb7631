// Package conf is the configuration as checked types. Load reads the file and
// reports everything that is wrong with it, each with its place; Default is
// what holds without a file.
//
// It defends against a setting that is misspelt and so not in force, and
// against sockets and keys that are put where a container could reach them. The
// file is data: it has no variables, functions or expressions.
//
// It knows nothing of what selectors and templates mean. A caller turns an
// Entry into one of the registry's and puts its complaints at the ranges that
// are kept here, as Problems of the same form.
package conf

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/hcl/v2"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// A Setting is a value with its place in the file, which is the zero Range
// where the value is a default.
type Setting[T any] struct {
	Value T
	Range hcl.Range
}

// Given reports whether the setting stands in the file.
func (s Setting[T]) Given() bool { return s.Range != hcl.Range{} }

// Config is a whole configuration.
type Config struct {
	File           string // empty: none
	TrustDomain    Setting[spiffeid.TrustDomain]
	DataDir        Setting[string] // absolute
	LogLevel       Setting[hclog.Level]
	LogFormat      Setting[LogFormat]
	WorkloadSocket Socket
	AdminSocket    AdminSocket
	Authority      Local
	Docker         *Docker  // nil: the file does not list it
	Systemd        *Systemd // likewise
	Claims         *Claims  // nil: tokens carry none beside the standard's
	SDS            SDS
	OIDCDiscovery  *Discovery  // nil: not served
	Federation     *Federation // nil: bundles are neither served nor fetched
	Experimental   Experimental
	Entries        []Entry // in the order of the file

	DelegatedIdentity *DelegatedIdentity // nil: not offered
	Broker            *Broker            // likewise

	run string // the directory of the sockets' directories
}

// LogFormat is how log lines are written.
type LogFormat string

// The formats of the log.
const (
	Text LogFormat = "text"
	JSON LogFormat = "json"
)

// Socket is a Unix socket. Its path is absolute and at most 107 bytes long.
type Socket struct {
	Path Setting[string]
}

// AdminSocket is the socket of operators.
type AdminSocket struct {
	Path  Setting[string]
	Group Setting[string] // may connect beside root; empty: nobody
}

// Local is the embedded authority.
type Local struct {
	Range           hcl.Range
	CATTL           Setting[time.Duration]
	KeyType         Setting[string] // ec-p256, ec-p384 or rsa-2048
	WorkloadKeyType Setting[string] // likewise
	Keys            Setting[KeyStorage]
	UpstreamCert    Setting[string] // absolute path of a PEM file; empty: self-signed
	UpstreamKey     Setting[string]
	UpstreamBundle  Setting[string]
	JWTIssuer       Setting[string] // a URL; empty: tokens have no issuer
}

// X509TTL is the life of an X.509-SVID whose entry does not say: an hour, or
// as long as the CA can vouch for.
func (l Local) X509TTL() time.Duration { return min(time.Hour, l.maxTTL()) }

// JWTTTL is the life of a JWT-SVID whose entry does not say.
func (l Local) JWTTTL() time.Duration { return min(5*time.Minute, l.maxTTL()) }

// maxTTL bounds what is signed: a key signs until five sixths of its life, and
// everything that it signed must end before it does.
func (l Local) maxTTL() time.Duration { return (l.CATTL.Value / 6).Truncate(time.Second) }

// KeyStorage is where the authority keeps its private keys.
type KeyStorage string

// The places for private keys.
const (
	Disk   KeyStorage = "disk"
	Memory KeyStorage = "memory"
)

// Docker is the attestor that asks a Docker engine.
type Docker struct {
	Range  hcl.Range
	Socket Setting[string]   // absolute path
	Env    []Setting[string] // names of variables that may become selectors
}

// Systemd is the attestor that asks systemd.
type Systemd struct {
	Range hcl.Range
}

// Claims is the text of the claims block, which plugins/claims reads: the one
// grammar for the plugin and for us.
type Claims struct {
	Range hcl.Range // of the block's header
	Text  string    // between the braces
	Start hcl.Pos   // of the text
}

// An Entry is one entry block. Only its form is checked here.
type Entry struct {
	Range         hcl.Range       // of the block's header
	Path          Setting[string] // the SPIFFE ID's, maybe with templates
	Selectors     []Setting[string]
	X509TTL       Setting[time.Duration] // 0: the authority's default
	JWTTTL        Setting[time.Duration] // 0: the authority's default
	DNSNames      []Setting[string]
	Hint          Setting[string]
	FederatesWith []Setting[spiffeid.TrustDomain]
	Audiences     []Setting[string]
	Instance      Setting[bool]
	AllowTraced   Setting[bool]
	JWTFresh      Setting[bool]

	keys map[string]hcl.Range
}

// At is the place of a key's value; of the block itself where it has no such key.
func (e *Entry) At(key string) hcl.Range {
	if r, ok := e.keys[key]; ok {
		return r
	}
	return e.Range
}

// A Problem is something wrong, or doubtful, at one place of the file.
type Problem struct {
	Range  hcl.Range
	Reason string
}

// String is FILE:LINE:COL: reason; columns count characters from 1.
func (p Problem) String() string {
	return fmt.Sprintf("%s:%d:%d: %s", p.Range.Filename, p.Range.Start.Line, p.Range.Start.Column, p.Reason)
}

// Problems is all that is wrong with a file. It is never empty where it is an
// error.
type Problems []Problem

// Within reports whether one of the problems lies in that part of the file.
func (p Problems) Within(r hcl.Range) bool {
	return slices.ContainsFunc(p, func(one Problem) bool {
		return one.Range.Filename == r.Filename && one.Range.Start.Byte >= r.Start.Byte && one.Range.End.Byte <= r.End.Byte
	})
}

// Error writes a problem a line.
func (p Problems) Error() string {
	lines := make([]string, len(p))
	for i, one := range p {
		lines[i] = one.String()
	}
	return strings.Join(lines, "\n")
}

// Add appends a problem.
func (p *Problems) Add(at hcl.Range, format string, args ...any) {
	*p = append(*p, Problem{at, fmt.Sprintf(format, args...)})
}

// Sort puts the problems in the order of the file.
func (p *Problems) Sort() {
	slices.SortStableFunc(*p, func(a, b Problem) int {
		return cmp.Or(
			strings.Compare(a.Range.Filename, b.Range.Filename),
			a.Range.Start.Byte-b.Range.Start.Byte,
			strings.Compare(a.Reason, b.Reason),
		)
	})
}
