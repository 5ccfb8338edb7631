package main

import (
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/spf13/pflag"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"

	"github.com/deputy-id/deputy/attestor"
	adminv1 "github.com/deputy-id/deputy/proto/deputy/admin/v1"
)

// entryFlags are the fields of an entry as flags.
type entryFlags struct {
	selectors, dnsNames, federatesWith, audiences []string
	x509TTL, jwtTTL                               time.Duration
	hint                                          string
	instance, allowTraced, jwtFresh               bool
}

func (f *entryFlags) add(flags *pflag.FlagSet) {
	flags.StringArrayVar(&f.selectors, "selector", nil, "`selector` that a process must have; may be repeated")
	flags.DurationVar(&f.x509TTL, "x509-ttl", 0, "life of X.509-SVIDs, whole seconds (0s: the daemon's default); at most a sixth of ca_ttl")
	flags.DurationVar(&f.jwtTTL, "jwt-ttl", 0, "life of JWT-SVIDs, whole seconds (0s: the daemon's default); at most a sixth of ca_ttl")
	flags.StringArrayVar(&f.dnsNames, "dns-name", nil, "DNS `name` of the X.509-SVID; may be repeated")
	flags.StringVar(&f.hint, "hint", "", "a `word` that tells the process what the identity is for")
	flags.StringArrayVar(&f.federatesWith, "federates-with", nil, "`trust domain` whose bundle the process gets; may be repeated")
	flags.StringArrayVar(&f.audiences, "audience", nil, "the only `audience` that JWT-SVIDs may have; may be repeated")
	flags.BoolVar(&f.instance, "instance", false, "append an ID of the process, so that each run is a principal of its own")
	flags.BoolVar(&f.allowTraced, "allow-traced", false, "serve a process that is being traced")
	flags.BoolVar(&f.jwtFresh, "jwt-fresh", false, "make a new JWT-SVID for each request")
}

// apply sets the fields whose flags were given.
func (f *entryFlags) apply(flags *pflag.FlagSet, e *adminv1.Entry) (err error) {
	seconds := func(name string, d time.Duration, to *int32) {
		if !flags.Changed(name) || err != nil {
			return
		}
		if d < 0 || d%time.Second != 0 || d > 1<<31*time.Second-time.Second {
			err = usage(fmt.Errorf("--%s %s is not a number of whole seconds", name, d))
			return
		}
		*to = int32(d / time.Second)
	}
	list := func(name string, values []string, to *[]string) {
		if !flags.Changed(name) {
			return
		}
		*to = nil
		for _, v := range values {
			if v != "" {
				*to = append(*to, v)
			}
		}
	}
	flag := func(name string, value bool, to *bool) {
		if flags.Changed(name) {
			*to = value
		}
	}
	if flags.Changed("selector") {
		if e.Entry.Selectors, err = parseSelectors(f.selectors); err != nil {
			return err
		}
	}
	seconds("x509-ttl", f.x509TTL, &e.Entry.X509SvidTtl)
	seconds("jwt-ttl", f.jwtTTL, &e.Entry.JwtSvidTtl)
	list("dns-name", f.dnsNames, &e.Entry.DnsNames)
	list("federates-with", f.federatesWith, &e.Entry.FederatesWith)
	list("audience", f.audiences, &e.Audiences)
	flag("instance", f.instance, &e.Instance)
	flag("allow-traced", f.allowTraced, &e.AllowTraced)
	if flags.Changed("hint") {
		e.Entry.Hint = f.hint
	}
	if flags.Changed("jwt-fresh") {
		if e.Entry.AdditionalAttributes == nil {
			e.Entry.AdditionalAttributes = &types.Entry_AdditionalAttributes{}
		}
		e.Entry.AdditionalAttributes.JwtSvidIncludeJti = f.jwtFresh
	}
	return err
}

// noteTTLs warns of lives that were asked for and that no SVID will have.
func (f *entryFlags) noteTTLs(notes io.Writer, flags *pflag.FlagSet, longest int32) {
	most := time.Duration(longest) * time.Second
	for _, t := range []struct {
		name string
		ttl  time.Duration
	}{{"x509-ttl", f.x509TTL}, {"jwt-ttl", f.jwtTTL}} {
		if most > 0 && flags.Changed(t.name) && t.ttl > most {
			fmt.Fprintf(notes, "deputy: warning: --%s %s is longer than an SVID of this daemon lives: %s, a sixth of ca_ttl\n", t.name, t.ttl, most)
		}
	}
}

func parseSelectors(texts []string) ([]*types.Selector, error) {
	var selectors []*types.Selector
	for _, text := range texts {
		s, err := attestor.ParseSelector(text)
		if err != nil {
			return nil, usage(err)
		}
		selectors = append(selectors, &types.Selector{Type: s.Type, Value: s.Value})
	}
	return selectors, nil
}

// parseID reads a path, which stands for an ID of the daemon's own trust
// domain, or a full ID; either may be a template. What a path may be is the
// daemon's to say.
func parseID(s string) (*types.SPIFFEID, error) {
	if strings.HasPrefix(s, "/") {
		return &types.SPIFFEID{Path: s}, nil
	}
	rest, ok := strings.CutPrefix(s, "spiffe://")
	at := strings.IndexByte(rest, '/')
	if !ok || at < 1 {
		return nil, usage(fmt.Errorf("%q is neither a path that begins with / nor a SPIFFE ID with a path", s))
	}
	return &types.SPIFFEID{TrustDomain: rest[:at], Path: rest[at:]}, nil
}
