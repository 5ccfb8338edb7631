package claims

import (
	"errors"
	"fmt"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// maxID is the longest SPIFFE ID that every implementation accepts
// (SPIFFE-ID §2.3).
const maxID = 2048

// A pattern is a set of SPIFFE IDs of one trust domain.
type pattern struct {
	segments []segment
	below    bool // with one more segment at least
}

// A segment stands for itself or, if it is named, for any segment.
type segment struct {
	text  string // the name, where named
	named bool
}

// parsePattern reads a path, or a full SPIFFE ID. The trust domain of the
// latter is returned as written; it is empty for a path.
func parsePattern(s string) (p pattern, trustDomain string, err error) {
	path := s
	if rest, full := strings.CutPrefix(s, "spiffe://"); full {
		name, after, _ := strings.Cut(rest, "/")
		td, err := spiffeid.TrustDomainFromString(name)
		if err != nil {
			return p, "", err
		}
		if td.Name() != name {
			return p, "", fmt.Errorf("the trust domain is written %q", td.Name())
		}
		trustDomain, path = name, "/"+after
	}
	switch {
	case path == "" || path[0] != '/':
		return p, "", errors.New(`a pattern is a path such as "/agent/{team}/*", or a SPIFFE ID`)
	case path == "/":
		return p, "", errors.New("the pattern has no segment")
	case len(s) > maxID:
		return p, "", fmt.Errorf("the pattern is longer than a SPIFFE ID, which has %d bytes at most", maxID)
	}
	all := strings.Split(path[1:], "/")
	if last := len(all) - 1; all[last] == "*" {
		p.below, all = true, all[:last]
	}
	p.segments = make([]segment, 0, len(all))
	for _, one := range all {
		seg, err := parseSegment(one)
		if err != nil {
			return p, "", err
		}
		if seg.named && p.index(seg.text) >= 0 {
			return p, "", fmt.Errorf("two segments have the name {%s}", seg.text)
		}
		p.segments = append(p.segments, seg)
	}
	if len(p.segments) > 0 && p.segments[0] == (segment{text: "spire"}) {
		return p, "", errors.New("IDs under /spire belong to SPIRE itself")
	}
	return p, trustDomain, nil
}

func parseSegment(s string) (segment, error) {
	if strings.ContainsAny(s, "{}") {
		name := strings.TrimSuffix(strings.TrimPrefix(s, "{"), "}")
		if len(name) != len(s)-2 || !validName(name) {
			return segment{}, fmt.Errorf("segment %q: {name} stands for a whole segment, its name for a word of a-z, 0-9 and _", s)
		}
		return segment{name, true}, nil
	}
	if s == "*" {
		return segment{}, errors.New("a * may only be the last segment; name this one: {name}")
	}
	if strings.Contains(s, "*") {
		return segment{}, fmt.Errorf("segment %q: a * is a segment of its own, and the last one", s)
	}
	if err := spiffeid.ValidatePathSegment(s); err != nil {
		return segment{}, fmt.Errorf("segment %q: %w", s, err)
	}
	return segment{text: s}, nil
}

func validName(s string) bool {
	for i := range len(s) {
		if c := s[i]; (c < 'a' || c > 'z') && (i == 0 || !isDigit(c) && c != '_') {
			return false
		}
	}
	return s != ""
}

// index is the place of the segment with a name, or -1.
func (p *pattern) index(name string) int {
	for i, s := range p.segments {
		if s.named && s.text == name {
			return i
		}
	}
	return -1
}
