package registry

import (
	"strings"
	"testing"
)

func TestHopelessEntries(t *testing.T) {
	for _, c := range []struct {
		name, path, selector string
		api, file            string // part of what is said, with the field; "" for nothing
	}{
		{"one that can be matched", "/u/{{unix.user}}", "unix:uid:1", "", ""},
		{"a key that a type of ours lacks", "/x", "unix:uidd:1", `selectors: selector "unix:uidd:1": unix has no "uidd"`, "selectors: "},
		{"a value that a key never has", "/x", "unix:uid:bob", "selectors: ", "selectors: "},
		{"a type that is not ours", "/x", "cilium:mutual-auth", "", "selectors: "},
		{"a pod in a delegate's words", "/x", "k8s:container-name:web", "", "selectors: "},
		{"a place of a key that there is not", "/{{unix.nope}}", "unix:uid:1", "path: path \"/{{unix.nope}}\": {{unix.nope}} never has a value", "path: "},
		{"a place of a pod's", "/{{k8s.nope}}", "unix:uid:1", "path: ", "path: "},
		{"a place of a type that is not ours", "/{{nope.x}}", "unix:uid:1", "", "path: "},
		{"a place with a name that no value has", "/{{docker.env:TEAM}}", "unix:uid:1", "path: ", "path: "},
		{"a place with a name", "/{{docker.label:team}}", "unix:uid:1", "", ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			e := entry(t, c.path, c.selector)
			for foreign, want := range map[bool]string{false: c.api, true: c.file} {
				got := ""
				for _, f := range Hopeless(e, foreign) {
					got += f.Field + ": " + f.Reason
				}
				if want == "" && got != "" || !strings.HasPrefix(got, want) {
					t.Errorf("foreign %t: got %q, want %q", foreign, got, want)
				}
			}
		})
	}
}

func TestMatchSaysWhichPathHasNoValue(t *testing.T) {
	set := NewSet(checked(t,
		entry(t, "/none/{{unix.user}}", "unix:uid:1"),
		entry(t, "/two/{{container.name}}", "unix:uid:1"),
		entry(t, "/{{unix.group}}/x", "unix:uid:1"),
		entry(t, "/fine/{{unix.uid}}", "unix:uid:1"),
		entry(t, "/others/{{unix.user}}", "unix:uid:2"),
	))
	got := make(map[string]string)
	for _, u := range set.Match(evidence(t, "unix:uid:1", "container:name:a", "container:name:b", "unix:group:spire")).Unfilled {
		got[u.Path] = u.Reason
	}
	want := map[string]string{
		"/none/{{unix.user}}":     "the process has no value for {{unix.user}}",
		"/two/{{container.name}}": "the process has more than one value for {{container.name}}",
		"/{{unix.group}}/x":       "its path would be no SPIFFE ID's",
	}
	if len(got) != len(want) {
		t.Errorf("got %v, want %v", got, want)
	}
	for path, reason := range want {
		if got[path] != reason {
			t.Errorf("%s: got %q, want %q", path, got[path], reason)
		}
	}
}
