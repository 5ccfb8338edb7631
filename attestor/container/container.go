// Package container says which container a process is in and which image that
// runs, by asking the container's runtime. No other package knows a runtime's
// client.
//
// That a process is in a container, and in which, is the kernel's word alone:
// attestor.PlaceOf reads it from the cgroup file and believes only directories
// that root made. The runtime adds what that container is, and is believed once
// it and the kernel agree: the container runs, and its init process, pinned
// like any peer, stands in the same cgroup directory. Everything else fails
// closed. What defends against a moved tag is that the image is looked up by
// the container's own image ID.
//
// Whoever may talk to the runtime's socket is root of the host in all but
// name, and is trusted here like root. A caller owes the attestor a Close.
package container

import (
	"github.com/deputy-id/deputy/attestor"
)

// Prefixes are those of the selectors that a runtime's attestor gives: what is
// unknown while the runtime does not answer.
func prefixes(runtime string) []string {
	return []string{runtime + ":", "container:", "image:", "process:leader:"}
}

// add appends the selector if an entry could ask for it: a label of many KiB or
// with control characters is nobody's, and must not cost the rest.
func add(out []attestor.Selector, typ, value string) []attestor.Selector {
	s, err := attestor.ParseSelector(typ + ":" + value)
	if err != nil {
		return out
	}
	return append(out, s)
}
