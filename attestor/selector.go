package attestor

import (
	"cmp"
	"fmt"
	"strings"
	"unicode/utf8"
)

// A Selector is one attested fact about a process, written "type:value". The
// type is what stands before the first colon ("unix"), the value all that
// follows ("uid:1000"). Selectors compare with ==.
type Selector struct {
	Type  string
	Value string
}

// maxSelector bounds the length of a selector in bytes, so that one line of a
// label cannot fill the database.
const maxSelector = 8192

// ParseSelector reads "type:value". It checks the form alone; whether any
// attestor gives such a selector is Check's to say.
func ParseSelector(s string) (Selector, error) {
	if len(s) > maxSelector {
		return Selector{}, fmt.Errorf("selector is %d bytes long, longer than %d", len(s), maxSelector)
	}
	if !utf8.ValidString(s) || strings.ContainsFunc(s, func(r rune) bool { return r < ' ' || r == 0x7f }) {
		return Selector{}, fmt.Errorf("selector %q has bytes that are not printable text", s)
	}
	typ, value, ok := strings.Cut(s, ":")
	switch {
	case !ok:
		return Selector{}, fmt.Errorf("selector %q has no colon; it is written type:value", s)
	case typ == "":
		return Selector{}, fmt.Errorf("selector %q has no type before its colon", s)
	case value == "":
		return Selector{}, fmt.Errorf("selector %q has no value after its colon", s)
	}
	return Selector{Type: typ, Value: value}, nil
}

// String writes the selector as ParseSelector reads it.
func (s Selector) String() string { return s.Type + ":" + s.Value }

// Compare orders selectors by type, then value.
func (s Selector) Compare(o Selector) int {
	return cmp.Or(strings.Compare(s.Type, o.Type), strings.Compare(s.Value, o.Value))
}

// selectable reports whether an entry could be written that asks for it.
func selectable(selector string) bool {
	_, err := ParseSelector(selector)
	return err == nil
}
