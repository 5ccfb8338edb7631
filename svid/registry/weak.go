package registry

import (
	"strings"

	"github.com/deputy-id/deputy/attestor"
)

var leader = attestor.Selector{Type: "process", Value: "leader:true"}

// led reports whether the selector names what a process can be the leader of.
// process:exec counts because its holder is a leader by itself.
func led(s attestor.Selector) bool {
	name, _, _ := strings.Cut(s.Value, ":")
	switch s.Type {
	case "cgroup":
		return name == "unit"
	case "systemd":
		return name == "id" || name == "fragment_path"
	case "container":
		return name == "id" || name == "name"
	case "docker", "image":
		return true
	case "k8s":
		return name != "node-name"
	case "process":
		return name == "exec"
	}
	return false
}

// names reports whether not just anybody can come to have the selector: it
// says which user, cgroup, container, pod or registered command. Of a type
// that is not known here nothing can be said against it.
func names(typ, name string) bool {
	switch typ {
	case "unix":
		return name == "uid" || name == "user"
	case "systemd", "container":
		return name == "id" || name == "name" || name == "fragment_path"
	case "docker":
		// The name that an image was asked for by is a tag, and tags move.
		return name != "image_id"
	case "k8s":
		return !strings.HasSuffix(name, "image") && name != "node-name"
	case "process":
		return name == "exec"
	}
	return true
}

// Weak says why an entry identifies less than its author may think, or
// nothing: a program that anybody may run is no identity by itself. A value
// that goes into the path counts as named.
func Weak(e Entry) string {
	for _, s := range e.Selectors {
		name, _, _ := strings.Cut(s.Value, ":")
		if names(s.Type, name) {
			return ""
		}
	}
	if t, err := parsePath(e.Path); err == nil {
		for _, key := range t.keys {
			part := strings.SplitN(key, ":", 3)
			if names(part[0], part[1]) {
				return ""
			}
		}
	}
	for _, s := range e.Selectors {
		if s.Type == "docker" && strings.HasPrefix(s.Value, "image_id:") {
			return "docker:image_id is the name that the container was started by, a tag that anybody who can move it decides; image:digest is proof"
		}
	}
	return "no selector names a user, unit, container, pod or exec name, so that whoever may run the program has the identity"
}
