package registry

import (
	"slices"
	"strings"

	"github.com/deputy-id/deputy/attestor"
)

// Hopeless lists why no process could ever match the entry: selectors, and
// values in its path, that no attestor of this build gives. What is of a type
// that is not known here counts only with foreign: an attestor may come later.
// Nor do selectors of pods, which delegates describe with keys of their own.
func Hopeless(e Entry, foreign bool) Faults {
	var f Faults
	ours := func(typ string) bool { return foreign || slices.Contains(attestor.KnownTypes(), typ) }
	for _, s := range e.Selectors {
		if !ours(s.Type) || s.Type == "k8s" && !foreign {
			continue
		}
		if err := attestor.CheckSelector(s); err != nil {
			f.add("selectors", "%s", err)
		}
	}
	t, err := parsePath(e.Path)
	if err != nil {
		return f // Check's to say
	}
	for _, key := range t.keys {
		typ, name, _ := strings.Cut(strings.TrimSuffix(key, ":"), ":")
		name, of, _ := strings.Cut(name, ":")
		if !ours(typ) {
			continue
		}
		if err := attestor.CheckPrefix(typ, name, of); err != nil {
			f.add("path", "path %q: {{%s}} never has a value: %s", e.Path, place(key), err)
		}
	}
	return f
}

// place writes a key of a template as it stands in the path.
func place(key string) string {
	return strings.Replace(strings.TrimSuffix(key, ":"), ":", ".", 1)
}

// An Unfilled is an entry all of whose selectors a process has, and which has no
// path for it.
type Unfilled struct {
	ID, Path string
	Reason   string // which value is missing, or not the only one
}

// unfilled says why the path could not be rendered.
func (r *record) unfilled(ev *attestor.Evidence) Unfilled {
	u := Unfilled{ID: r.ID, Path: r.Path, Reason: "its path would be no SPIFFE ID's"}
	for _, key := range r.path.keys {
		if _, ok := single(ev.Selectors, key); ok {
			continue
		}
		u.Reason = "the process has no value for {{" + place(key) + "}}"
		typ, name, _ := strings.Cut(key, ":")
		if slices.ContainsFunc(ev.Selectors, func(s attestor.Selector) bool { return s.Type == typ && strings.HasPrefix(s.Value, name) }) {
			u.Reason = "the process has more than one value for {{" + place(key) + "}}"
		}
		break
	}
	return u
}
