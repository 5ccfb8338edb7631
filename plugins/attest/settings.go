package attest

import (
	"fmt"
	"slices"
	"strings"

	"github.com/deputy-id/deputy/attestor"
)

// Settings are what the plugin is configured with. The zero value gives all
// selectors that this host has attestors for.
type Settings struct {
	// Type limits the selectors to this one type and takes it off their values:
	// SPIRE puts the name in its place under which it knows the plugin. Empty
	// gives "type:value" of all types.
	Type string
	// NoDigests leaves out unix:sha256 and process:parent_sha256, for which
	// executables are read.
	NoDigests bool
	// AllowTraced attests processes that a debugger is attached to.
	AllowTraced bool
	// DenyUnknown fails an attestation in which anything is unknown. Otherwise
	// what is certain is given.
	DenyUnknown bool
	// Docker and Systemd are the attestors that are on. With neither, those are
	// whose socket root owns, and those that alone give Type.
	Docker  *Docker
	Systemd bool
}

// Docker is the attestor that asks a Docker engine.
type Docker struct {
	Socket string   // absolute path; empty for Docker's own
	Env    []string // names of the variables that may become selectors
}

// given lists, for the types that one attestor alone gives, that attestor.
var given = map[string]string{
	"container": "docker", "docker": "docker", "image": "docker",
	"systemd": "systemd",
}

// Check returns why no process would ever have a selector under these settings.
func (s *Settings) Check() error {
	if s.Type == "" {
		return nil
	}
	// k8s is of pods that a broker refers to, not of processes.
	if known := slices.DeleteFunc(attestor.KnownTypes(), func(t string) bool { return t == "k8s" }); !slices.Contains(known, s.Type) {
		return fmt.Errorf("unknown type %q of selectors; there are %s", s.Type, strings.Join(known, ", "))
	}
	if by := given[s.Type]; s.listed() && (by == "docker" && s.Docker == nil || by == "systemd" && !s.Systemd) {
		return fmt.Errorf("selectors of the type %s come from the attestor %s, which is not among those listed", s.Type, by)
	}
	return nil
}

func (s *Settings) listed() bool { return s.Docker != nil || s.Systemd }

// wants reports whether selectors with the prefix may be among those to give.
func (s *Settings) wants(prefix string) bool {
	return s.Type == "" || strings.HasPrefix(prefix, s.Type+":")
}

// values writes the selectors as SPIRE is to have them.
func (s *Settings) values(all []attestor.Selector) []string {
	var out []string
	for _, one := range all {
		switch s.Type {
		case "":
			out = append(out, one.String())
		case one.Type:
			out = append(out, one.Value)
		}
	}
	return out
}

// demand is which digests are worth reading executables for. SPIRE's agent
// tells its plugins nothing of the entries.
func (s *Settings) demand() attestor.Demand {
	return attestor.Demand{
		ExecutableDigest: !s.NoDigests && s.wants("unix:"),
		ParentDigest:     !s.NoDigests && s.wants("process:"),
	}
}
