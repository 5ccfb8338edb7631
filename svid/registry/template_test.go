package registry

import (
	"strings"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/deputy-id/deputy/attestor"
)

func TestEscape(t *testing.T) {
	for value, want := range map[string]string{
		"Az09.-": "Az09.-",
		"a_b":    "a_5fb",
		"/x":     "_2fx",
		".":      "_2e",
		"..":     "_2e_2e",
		"...":    "...",
		"é":      "_c3_a9",
		"{{":     "_7b_7b",
		"\xff":   "_ff",
	} {
		var b strings.Builder
		escape(&b, value)
		if got := b.String(); got != want {
			t.Errorf("%q: got %q, want %q", value, got, want)
		}
	}
}

// No two different pairs of values may give one ID.
func FuzzTemplate(f *testing.F) {
	f.Add("a", "b", "a", "c")
	f.Add("a_5f", "b", "a_", "b")
	f.Add("a/b", "c", "a", "b/c")
	f.Add(".", "..", "..", ".")
	f.Add("_2e", "x", ".", "x")
	f.Add("spire", "x", "spire", "y")
	path, err := parsePath("/{{a.b}}/x-{{c.d:e}}-y/z")
	if err != nil {
		f.Fatal(err)
	}
	render := func(t *testing.T, one, two string) (string, bool) {
		got, ok := path.render([]attestor.Selector{{Type: "a", Value: "b:" + one}, {Type: "c", Value: "d:e:" + two}})
		if !ok {
			return "", false
		}
		id, err := spiffeid.FromPath(td, got)
		if err != nil {
			t.Fatalf("%q, %q: %v", one, two, err)
		}
		if strings.HasPrefix(got, "/spire/") || strings.Count(got, "/") != 3 {
			t.Fatalf("%q, %q: got %s", one, two, got)
		}
		return id.String(), true
	}
	f.Fuzz(func(t *testing.T, a1, a2, b1, b2 string) {
		a, okA := render(t, a1, a2)
		b, okB := render(t, b1, b2)
		if okA && okB && (a == b) != (a1 == b1 && a2 == b2) {
			t.Errorf("(%q, %q) gives %s, (%q, %q) gives %s", a1, a2, a, b1, b2, b)
		}
		if !okA && a1 != "" && a2 != "" && a1 != "spire" && len(a1)+len(a2) < 500 {
			t.Errorf("(%q, %q) gives nothing", a1, a2)
		}
	})
}

func FuzzParsePath(f *testing.F) {
	for _, path := range []string{"/a", "/{{unix.user}}", "/a/{{docker.label:x}}-b", "{{", "/{{}}", "/{{a.b}}{{c.d}}", "/{{a.b}}/{{c.d}}", "/}}{{a.b}}", "/{{{{a.b}}}}"} {
		f.Add(path)
	}
	f.Fuzz(func(t *testing.T, path string) {
		p, err := parsePath(path)
		if err != nil {
			return
		}
		var all []attestor.Selector
		for _, key := range p.keys {
			typ, name, _ := strings.Cut(key, ":")
			all = append(all, attestor.Selector{Type: typ, Value: name + "v"})
		}
		if got, ok := p.render(all); ok {
			if err := spiffeid.ValidatePath(got); err != nil || got == "" {
				t.Errorf("%q gives %q: %v", path, got, err)
			}
		}
	})
}
