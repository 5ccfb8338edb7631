package main

import (
	"errors"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/deputy-id/deputy/attestor"
	"github.com/deputy-id/deputy/conf"
	"github.com/deputy-id/deputy/plugins/claims"
	"github.com/deputy-id/deputy/svid/federation"
	"github.com/deputy-id/deputy/svid/local"
	"github.com/deputy-id/deputy/svid/registry"
)

// settings are a configuration with its entries as the registry takes them.
type settings struct {
	*conf.Config
	entries  []registry.Entry
	claims   *claims.Rules
	warnings conf.Problems

	relationships []federation.Relationship
}

// load reads and checks a configuration, all of it; with no file it is the
// defaults. An error about its content is a conf.Problems.
func load(file string) (*settings, error) {
	base, err := conf.Default(os.Geteuid() == 0, os.Getenv)
	if err != nil || file == "" {
		return &settings{Config: base, claims: new(claims.Rules)}, err
	}
	c, warnings, err := conf.Load(file, base)
	var problems conf.Problems
	if err != nil && !errors.As(err, &problems) {
		return nil, err
	}
	s := &settings{Config: c, warnings: warnings}
	if c != nil {
		problems = s.check(slices.Clone(problems))
		problems = append(problems, s.readClaims()...)
		problems = append(problems, s.readFederation()...)
	}
	s.outlive()
	s.warnings.Sort()
	if len(problems) > 0 {
		problems.Sort()
		return s, problems
	}
	return s, nil
}

// outlive warns of a ca_ttl that the upstream cuts short. What is wrong with its
// files is said where a CA is made.
func (s *settings) outlive() {
	if s.Config == nil || s.Authority.UpstreamCert.Value == "" {
		return
	}
	a := s.Authority
	end, err := local.Upstream{Cert: a.UpstreamCert.Value}.Ends()
	if err != nil || time.Until(end) >= a.CATTL.Value {
		return
	}
	s.warnings.Add(a.UpstreamCert.Range, "upstream_cert ends at %s, within a ca_ttl of %s: CAs and SVIDs end with it, and it has to be renewed before", stamp(end), a.CATTL.Value)
}

// check turns the entries into the registry's, and adds what attestors and
// registry have to say about them to the problems, unless the same place has
// one already.
func (s *settings) check(problems conf.Problems) conf.Problems {
	said := slices.Clone(problems)
	for i := range s.Entries {
		e := &s.Entries[i]
		entry, selectorsFine := s.entry(e, &problems)
		hopeless := false
		for _, f := range registry.Hopeless(entry, true) {
			if f.Field == "path" { // the selectors have been looked at
				problems.Add(e.At("path"), "%s", f.Reason)
				hopeless = true
			}
		}
		checked, err := entry.Check(s.TrustDomain.Value)
		var faults registry.Faults
		if errors.As(err, &faults) {
			for _, f := range faults {
				at := e.At(f.Field)
				switch {
				case f.Field == "selectors" && !selectorsFine: // said at the selector itself
				case said.Within(at):
				default:
					problems.Add(at, "%s", f.Reason)
				}
			}
			continue
		}
		if err != nil {
			problems.Add(e.Range, "%s", err)
			continue
		}
		if !selectorsFine || hopeless {
			continue
		}
		weak := registry.Weak(checked)
		if weak != "" {
			s.warnings.Add(e.Range, "weak entry: %s", weak)
		}
		for _, sel := range e.Selectors {
			if why := s.absent(sel.Value); why != "" {
				s.warnings.Add(sel.Range, "%s", why)
			}
			if weak == "" && strings.HasPrefix(sel.Value, "docker:image_id:") {
				s.warnings.Add(sel.Range, "docker:image_id is a name, which can move to another image; image:digest stays with its content")
			}
		}
		s.entries = append(s.entries, checked)
	}
	return problems
}

// entry is an entry of the file as one of the registry's, unchecked but for
// its selectors.
func (s *settings) entry(e *conf.Entry, problems *conf.Problems) (entry registry.Entry, selectorsFine bool) {
	entry = registry.Entry{
		Path:        e.Path.Value,
		X509TTL:     e.X509TTL.Value,
		JWTTTL:      e.JWTTTL.Value,
		DNSNames:    values(e.DNSNames),
		Hint:        e.Hint.Value,
		Audiences:   values(e.Audiences),
		Instance:    e.Instance.Value,
		AllowTraced: e.AllowTraced.Value,
		JWTFresh:    e.JWTFresh.Value,
		FromFile:    true,
	}
	entry.FederatesWith = values(e.FederatesWith)
	selectorsFine = true
	for _, text := range e.Selectors {
		sel, err := attestor.ParseSelector(text.Value)
		if err == nil {
			err = attestor.CheckSelector(sel)
		}
		if err != nil {
			problems.Add(text.Range, "%s", err)
			selectorsFine = false
			continue
		}
		entry.Selectors = append(entry.Selectors, sel)
	}
	return entry, selectorsFine
}

// absent says which attestor a selector needs that the file does not list.
func (s *settings) absent(selector string) string {
	sel, err := attestor.ParseSelector(selector)
	if err != nil {
		return ""
	}
	switch sel.Type {
	case "docker", "container", "image":
		if s.Docker == nil {
			return `nothing gives ` + sel.Type + ` selectors: the file has no attestor "docker"`
		}
	case "k8s":
		if s.Broker == nil || s.Broker.Kubelet == nil {
			return `nothing gives k8s selectors: the file has no kubelet block in broker`
		}
	case "systemd":
		if s.Systemd == nil {
			return `nothing gives systemd selectors: the file has no attestor "systemd"`
		}
	}
	return ""
}

func values[T any](settings []conf.Setting[T]) []T {
	var out []T
	for _, s := range settings {
		out = append(out, s.Value)
	}
	return out
}
