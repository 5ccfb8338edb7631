package claims

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"unicode/utf8"
)

// maxValue bounds a string in a claim, in bytes.
const maxValue = 2048

// A template is a string of a rule, in which {name} stands for a segment of
// the SPIFFE ID.
type template struct {
	text  string // as written
	parts []part // nil: the text is all
}

type part struct {
	text    string // if segment is below zero
	segment int
}

// parseTemplate reads a value of a rule with this pattern. {{ and }} stand for
// braces.
//
// Two different IDs must not come to one value by moving a character from one
// segment to the next: "{a}-{b}" would be x-y-z for /x-y/z and for /x/y-z. So
// between two segments there is a character that no segment has.
func parseTemplate(s string, p *pattern) (t template, err error) {
	t.text = s
	if !strings.ContainsAny(s, "{}") {
		return t, nil
	}
	var literal strings.Builder
	parted, last := true, -1 // parted from the last segment
	flush := func() {
		if literal.Len() > 0 {
			t.parts = append(t.parts, part{literal.String(), -1})
			literal.Reset()
		}
	}
	for i := 0; i < len(s); {
		switch {
		case strings.HasPrefix(s[i:], "{{"), strings.HasPrefix(s[i:], "}}"):
			literal.WriteByte(s[i])
			parted = true
			i += 2
		case s[i] == '}':
			return t, errors.New("a } has no { before it; } itself is written }}")
		case s[i] == '{':
			name, _, closed := strings.Cut(s[i+1:], "}")
			if !closed {
				return t, errors.New("a { has no } after it; { itself is written {{")
			}
			n := p.index(name)
			if n < 0 {
				return t, fmt.Errorf("the pattern has no segment {%s}", name)
			}
			if !parted && n != last {
				return t, fmt.Errorf("between {%s} and what is before it stands no character that a segment cannot have, such as : @ or /, so two agents could come to one value", name)
			}
			flush()
			t.parts = append(t.parts, part{segment: n})
			parted, last = false, n
			i += len(name) + 2
		default:
			if !inSegment(s[i]) {
				parted = true
			}
			literal.WriteByte(s[i])
			i++
		}
	}
	flush()
	return t, nil
}

// inSegment reports whether a SPIFFE ID's segment may hold the byte
// (SPIFFE-ID §2.2).
func inSegment(c byte) bool {
	return isLetter(c) || isDigit(c) || c == '.' || c == '-'
}

// empty reports whether there is no value.
func (t *template) empty() bool { return t.text == "" }

// expand puts the segments of an ID in their places.
func (t *template) expand(segments []string) string {
	if t.parts == nil {
		return t.text
	}
	n := 0
	for _, p := range t.parts {
		if p.segment < 0 {
			n += len(p.text)
		} else {
			n += len(segments[p.segment])
		}
	}
	b := make([]byte, 0, n)
	for _, p := range t.parts {
		if p.segment < 0 {
			b = append(b, p.text...)
		} else {
			b = append(b, segments[p.segment]...)
		}
	}
	return string(b)
}

// dotted reports whether a segment that the value takes has a dot.
func (t *template) dotted(segments []string) bool {
	return slices.ContainsFunc(t.parts, func(p part) bool {
		return p.segment >= 0 && strings.Contains(segments[p.segment], ".")
	})
}

// example is the value for some ID.
func (t *template) example() string {
	segments := make([]string, 0, 16)
	for _, p := range t.parts {
		for len(segments) <= p.segment {
			segments = append(segments, "x")
		}
	}
	return t.expand(segments)
}

// checkText refuses what no claim should hold.
func checkText(s string) error {
	switch {
	case s == "":
		return errors.New("the string is empty")
	case len(s) > maxValue:
		return fmt.Errorf("the string is longer than %d bytes", maxValue)
	}
	for _, r := range s {
		if r < ' ' || r >= 0x7f && r < 0xa0 || r == utf8.RuneError {
			return errors.New("the string has a control character")
		}
	}
	return nil
}
