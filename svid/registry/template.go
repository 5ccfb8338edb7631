package registry

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/deputy-id/deputy/attestor"
)

// maxID bounds the length of a SPIFFE ID in bytes (SPIFFE-ID §2.3).
const maxID = 2048

// A template is the path of an entry, cut at its {{type.name}} places. A path
// without any is a template too.
type template struct {
	literals []string // one more than keys: what stands before, between and after them
	keys     []string // prefixes of the selectors whose values go there: "unix:user:"
}

// parsePath reads a path. A place in it is {{type.name}}, for the value of the
// one selector type:name:value; where a selector has a key before its value,
// the key follows a colon: {{docker.label:com.example.role}}.
//
// At most one place stands in a segment: with two, the pairs "a-b", "c" and
// "a", "b-c" would give one ID.
func parsePath(path string) (*template, error) {
	t := &template{}
	var shape strings.Builder // the path with a harmless segment in each place
	rest := path
	for {
		before, after, ok := strings.Cut(rest, "{{")
		t.literals = append(t.literals, before)
		shape.WriteString(before)
		if !ok {
			break
		}
		place, tail, ok := strings.Cut(after, "}}")
		if !ok {
			return nil, fmt.Errorf("path %q has {{ without }}", path)
		}
		if len(t.keys) > 0 && !strings.Contains(before, "/") {
			return nil, fmt.Errorf("path %q has two values in one segment, so that different values could give one ID", path)
		}
		key, err := parsePlace(place)
		if err != nil {
			return nil, fmt.Errorf("path %q: %w", path, err)
		}
		t.keys = append(t.keys, key)
		shape.WriteByte('x')
		rest = tail
	}
	if err := checkPath(shape.String()); err != nil {
		return nil, fmt.Errorf("path %q: %w", path, err)
	}
	return t, nil
}

// parsePlace turns "type.name" into the prefix "type:name:".
func parsePlace(place string) (string, error) {
	typ, name, ok := strings.Cut(place, ".")
	if !ok || typ == "" || name == "" {
		return "", fmt.Errorf("{{%s}} is not {{type.name}}", place)
	}
	first, key, keyed := strings.Cut(name, ":")
	if bad := strings.IndexFunc(typ, notWord); bad >= 0 {
		return "", fmt.Errorf("{{%s}} has a selector type with %q in it", place, typ[bad])
	}
	if strings.Contains(first, ".") {
		return "", fmt.Errorf("{{%s}} has a second dot; a key follows a colon, as in {{docker.label:com.example.role}}", place)
	}
	if bad := strings.IndexFunc(first, notWord); bad >= 0 || first == "" || keyed && key == "" {
		return "", fmt.Errorf("{{%s}} is not {{type.name}} or {{type.name:key}}", place)
	}
	if _, err := attestor.ParseSelector(typ + ":" + name); err != nil {
		return "", fmt.Errorf("{{%s}}: %w", place, err)
	}
	return typ + ":" + name + ":", nil
}

func notWord(r rune) bool {
	return !(r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || r == '_' || r == '-')
}

var (
	errNoPath   = errors.New("an identity needs a path of at least one segment")
	errReserved = errors.New("IDs under /spire belong to SPIRE itself")
)

// checkPath holds a path without places against the rules for a workload's ID.
func checkPath(path string) error {
	if path == "" {
		return errNoPath
	}
	if err := spiffeid.ValidatePath(path); err != nil {
		return err
	}
	if path == "/spire" || strings.HasPrefix(path, "/spire/") {
		return errReserved
	}
	return nil
}

// fixed reports whether the path is the same for every process.
func (t *template) fixed() bool { return len(t.keys) == 0 }

// mayDiffer reports whether an unknown selector could give a place of the
// template a value, or a second one.
func (t *template) mayDiffer(prefix string) bool {
	return slices.ContainsFunc(t.keys, func(key string) bool { return overlap(key, prefix) })
}

// overlap reports whether some selector begins with both.
func overlap(a, b string) bool { return strings.HasPrefix(a, b) || strings.HasPrefix(b, a) }

// render fills the places in. It fails where a selector is missing or there
// is a choice, since an identity must not depend on which one came first.
func (t *template) render(selectors []attestor.Selector) (string, bool) {
	var b strings.Builder
	for i, key := range t.keys {
		value, ok := single(selectors, key)
		if !ok {
			return "", false
		}
		b.WriteString(t.literals[i])
		escape(&b, value)
		if b.Len() > maxID {
			return "", false
		}
	}
	b.WriteString(t.literals[len(t.keys)])
	// A value may have made the first segment "spire".
	return b.String(), checkPath(b.String()) == nil
}

// single returns the value of the only selector with this prefix.
func single(selectors []attestor.Selector, prefix string) (value string, ok bool) {
	typ, name, _ := strings.Cut(prefix, ":")
	for _, s := range selectors {
		if s.Type != typ {
			continue
		}
		v, has := strings.CutPrefix(s.Value, name)
		if !has {
			continue
		}
		if ok || v == "" {
			return "", false
		}
		value, ok = v, true
	}
	return value, ok
}

// escape writes a value as one segment, or a part of one, of a SPIFFE ID's
// path. Bytes other than A-Z a-z 0-9 . - become _xx, which includes _ itself,
// so that no two values are written alike; a value of one or two dots, which
// no segment may be, is escaped as a whole.
func escape(b *strings.Builder, value string) {
	const hex = "0123456789abcdef"
	dots := value == "." || value == ".."
	for i := range len(value) {
		c := value[i]
		plain := c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || c == '-' || c == '.' && !dots
		if plain {
			b.WriteByte(c)
			continue
		}
		b.Write([]byte{'_', hex[c>>4], hex[c&15]})
	}
}
