package claims

import (
	"strconv"
	"strings"
	"unicode/utf8"
)

const (
	// maxNesting is how deep blocks and lists may be in one another.
	maxNesting = 8
	// maxParts is how many names, keys and values a text may have. A part takes
	// far more memory than its bytes, and a file of another kind that used up all
	// of it would end the plugin. It is enough for a hundred thousand rules with
	// eighty parts each.
	maxParts = 1 << 23
	// maxInOne is how many of them one block or list may have. What is right has
	// fewer by far; the decoder says by how many.
	maxInOne = 1 << 10
	// blockParts is what a block counts for, with the room for what is in it.
	blockParts = 8
)

// A Source is the text of rules, with the place in its file at which it begins.
type Source struct {
	Name         string // of the file, for messages
	Text         string
	Line, Column int // 0: the beginning of the file
	Byte         int
}

// text is a source whose places can be told.
type text struct{ Source }

// A pos is a place in a text. Its column is counted only when somebody is to
// read it: a line may be as long as the file.
type pos struct {
	line  int32 // from 0
	start int32 // offset of the line
	off   int32
}

func (t *text) place(at pos) (line, column int) {
	line = max(t.Line, 1) + int(at.line)
	column = 1 + utf8.RuneCountInString(t.Text[at.start:at.off])
	if at.line == 0 {
		column += max(t.Column, 1) - 1
	}
	return line, column
}

// What a text consists of.
type (
	body struct {
		attributes []attribute
		blocks     []block
	}
	attribute struct {
		name  string
		at    pos
		value value
	}
	block struct {
		name   string
		at     pos
		labels []word
		body   body
	}
	word struct {
		text string
		at   pos
	}
	value struct {
		word
		kind valueKind
		list []value
	}
)

type valueKind byte

const (
	aString valueKind = iota
	aNumber
	aList
	aWord
)

func (k valueKind) String() string {
	return [...]string{"a string", "a number", "a list", "a bare word"}[k]
}

// A parser reads the part of HCL 2 that is data: blocks, and keys with strings,
// whole numbers and lists of strings. What it takes, HCL's own parser takes and
// understands alike; that one needs seconds for as many rules as are read here
// in a fraction of one.
//
// It ends at the first mistake: what follows would be guesswork.
type parser struct {
	*text
	src   string
	at    pos
	depth int
	parts int
	found findings
}

// parse returns nil, and what is wrong in found, for a text that is not HCL.
func parse(t *text) (body, error) {
	p := &parser{text: t, src: t.Text}
	if !utf8.ValidString(p.src) {
		for i, r := range p.src {
			if _, size := utf8.DecodeRuneInString(p.src[i:]); r == utf8.RuneError && size == 1 {
				p.fail(p.at, "this is not UTF-8")
				break
			}
			if p.at.off = int32(i) + 1; r == '\n' {
				p.at.line, p.at.start = p.at.line+1, p.at.off
			}
		}
		return body{}, p.found.err()
	}
	b, ok := p.body(false)
	if !ok {
		return body{}, p.found.err()
	}
	return b, nil
}

func (p *parser) fail(at pos, format string, args ...any) bool {
	p.found.add(p.text, at, format, args...)
	return false
}

// count wants room for more parts.
func (p *parser) count(parts int) bool {
	if p.parts += parts; p.parts > maxParts {
		return p.fail(p.at, "there are too many rules and values: %d by here, and a block counts for %d", maxParts, blockParts)
	}
	return true
}

func (p *parser) peek() byte {
	if int(p.at.off) < len(p.src) {
		return p.src[p.at.off]
	}
	return 0
}

func (p *parser) end() bool { return int(p.at.off) >= len(p.src) }

func (p *parser) newline() {
	p.at.off++
	p.at.line, p.at.start = p.at.line+1, p.at.off
}

// space skips blanks and comments, and ends of lines if lines is set. It
// reports whether there was an end of line.
func (p *parser) space(lines bool) (ended, ok bool) {
	for !p.end() {
		rest := p.src[p.at.off:]
		switch c := rest[0]; {
		case c == ' ' || c == '\t':
			p.at.off++
		case c == '\n', strings.HasPrefix(rest, "\r\n"):
			if !lines {
				return true, true
			}
			if c == '\r' {
				p.at.off++
			}
			p.newline()
			ended = true
		case c == '#', strings.HasPrefix(rest, "//"):
			if i := strings.IndexByte(rest, '\n'); i >= 0 {
				p.at.off += int32(i)
			} else {
				p.at.off += int32(len(rest))
			}
		case strings.HasPrefix(rest, "/*"):
			i := strings.Index(rest, "*/")
			if i < 2 {
				return ended, p.fail(p.at, "the comment has no end")
			}
			for stop := p.at.off + int32(i) + 2; p.at.off < stop; {
				if p.peek() == '\n' {
					p.newline()
				} else {
					p.at.off++
				}
			}
		default:
			return ended, true
		}
	}
	return true, true
}

// body reads up to the end of the text, or to the brace that closes a block.
func (p *parser) body(inBlock bool) (b body, ok bool) {
	// A block whose brace is followed by no end of line holds one key at most.
	ended, ok := p.space(true)
	single := inBlock && !ended
	for ok {
		switch {
		case p.end():
			if inBlock {
				return b, p.fail(p.at, "a block is not closed")
			}
			return b, true
		case p.peek() == '}' && inBlock:
			p.at.off++
			return b, true
		case single && len(b.attributes) == 1:
			return b, p.fail(p.at, "a block on one line holds one key; give each its own line")
		}
		at := p.at
		name := p.name()
		if name == "" {
			if p.peek() == '"' {
				return b, p.fail(at, "a key stands without quotes")
			}
			return b, p.fail(at, "a key or a block belongs here, not %s", p.here())
		}
		if _, ok = p.space(false); !ok {
			break
		}
		switch c := p.peek(); {
		case c == '=':
			p.at.off++
			if _, ok = p.space(false); !ok {
				break
			}
			var v value
			if v, ok = p.value(name); ok {
				if len(b.attributes) == maxInOne {
					return b, p.fail(at, "there are more than %d keys in one place", maxInOne)
				}
				if b.attributes == nil && !single {
					b.attributes = make([]attribute, 0, 8)
				}
				b.attributes = append(b.attributes, attribute{name, at, v})
				ok = p.ends(single)
			}
		case c == '"' || c == '{':
			if single {
				return b, p.fail(at, "a block on one line holds one key; give each its own line")
			}
			var inner block
			if inner, ok = p.block(name, at); ok {
				b.blocks = append(b.blocks, inner)
				ok = p.ends(false)
			}
		default:
			return b, p.fail(p.at, "after %s comes = and a value, or { and what is in the block, not %s", name, p.here())
		}
	}
	return b, false
}

// ends wants the end of the line, or the brace of a block on one line.
func (p *parser) ends(single bool) bool {
	ended, ok := p.space(true)
	switch {
	case !ok:
		return false
	case single && ended:
		return p.fail(p.at, "a block that begins on one line with its key is closed there")
	case ended, single && p.peek() == '}':
		return true
	}
	return p.fail(p.at, "the line should end here, not go on with %s", p.here())
}

func (p *parser) block(name string, at pos) (b block, ok bool) {
	b.name, b.at = name, at
	if !p.count(blockParts) {
		return b, false
	}
	for p.peek() == '"' {
		label := word{at: p.at}
		if label.text, ok = p.quoted(); !ok || !p.count(1) {
			return b, false
		}
		b.labels = append(b.labels, label)
		if _, ok = p.space(false); !ok {
			return b, false
		}
	}
	if p.peek() != '{' {
		return b, p.fail(p.at, "after %s and its name comes {, not %s", name, p.here())
	}
	if p.depth++; p.depth > maxNesting {
		return b, p.fail(p.at, "blocks and lists are more than %d deep", maxNesting)
	}
	p.at.off++
	b.body, ok = p.body(true)
	p.depth--
	return b, ok
}

func isLetter(c byte) bool { return c|0x20 >= 'a' && c|0x20 <= 'z' || c == '_' }
func isDigit(c byte) bool  { return c >= '0' && c <= '9' }

func (p *parser) name() string {
	from := p.at.off
	for !p.end() {
		c := p.peek()
		if !isLetter(c) && (p.at.off == from || !isDigit(c) && c != '-') {
			break
		}
		p.at.off++
	}
	return p.src[from:p.at.off]
}

// here is what stands at this place, for a message.
func (p *parser) here() string {
	if p.end() {
		return "the end of the text"
	}
	r, _ := utf8.DecodeRuneInString(p.src[p.at.off:])
	if r == '\n' || r == '\r' {
		return "the end of the line"
	}
	return strconv.QuoteRune(r)
}

func (p *parser) value(of string) (v value, ok bool) {
	v.at = p.at
	if !p.count(1) {
		return v, false
	}
	switch c := p.peek(); {
	case c == '"':
		v.text, ok = p.quoted()
		return v, ok
	case c == '[':
		v.kind = aList
		return p.list(v, of)
	case isDigit(c):
		v.kind = aNumber
		from := p.at.off
		for isDigit(p.peek()) {
			p.at.off++
		}
		v.text = p.src[from:p.at.off]
		if c := p.peek(); c == '.' || isLetter(c) {
			return v, p.fail(v.at, "a number here is whole: digits and nothing else")
		}
		return v, true
	case isLetter(c):
		v.kind, v.text = aWord, p.name()
		if c := p.peek(); c == '(' || c == '.' || c == '[' {
			return v, p.fail(v.at, "there are no functions or variables here")
		}
		return v, true
	case c == '{':
		return v, p.fail(p.at, "%s is a block: %[1]s { … }, without =", of)
	case c == '<':
		return v, p.fail(p.at, "a string stands in double quotes, on one line")
	}
	return v, p.fail(p.at, "a value belongs here, not %s", p.here())
}

func (p *parser) list(v value, of string) (value, bool) {
	if p.depth++; p.depth > maxNesting {
		return v, p.fail(p.at, "blocks and lists are more than %d deep", maxNesting)
	}
	defer func() { p.depth-- }()
	p.at.off++
	for {
		if _, ok := p.space(true); !ok {
			return v, false
		}
		if p.peek() == ']' {
			p.at.off++
			return v, true
		}
		one, ok := p.value(of)
		if !ok {
			return v, false
		}
		if len(v.list) == maxInOne {
			return v, p.fail(one.at, "the list has more than %d values", maxInOne)
		}
		v.list = append(v.list, one)
		if _, ok := p.space(true); !ok {
			return v, false
		}
		switch p.peek() {
		case ',':
			p.at.off++
		case ']':
		default:
			return v, p.fail(p.at, "a comma or ] belongs here, not %s", p.here())
		}
	}
}

// quoted reads a string in double quotes. Where nothing is escaped it is a part
// of the text, and no copy.
func (p *parser) quoted() (s string, ok bool) {
	opening := p.at
	p.at.off++
	from := p.at.off
	var buf []byte
	for {
		if p.end() {
			return "", p.fail(opening, "the string has no closing quote")
		}
		switch c := p.peek(); {
		case c == '"':
			s = p.src[from:p.at.off]
			if buf != nil {
				s = string(append(buf, s...))
			}
			p.at.off++
			if strings.Contains(s, "${") || strings.Contains(s, "%{") {
				return "", p.fail(opening, "a string may not contain ${ or %%{")
			}
			return s, true
		case c == '\n':
			return "", p.fail(opening, "the string has no closing quote")
		case c == '\\':
			buf = append(buf, p.src[from:p.at.off]...)
			r, ok := p.escape()
			if !ok {
				return "", false
			}
			buf = utf8.AppendRune(buf, r)
			from = p.at.off
		case (c == '$' || c == '%') && strings.HasPrefix(p.src[p.at.off+1:], "{"):
			return "", p.fail(p.at, "a string has no variables: %c{ may not be in it; a segment is {name}", c)
		case c < ' ' || c == 0x7f:
			return "", p.fail(p.at, "a string has no control characters")
		default:
			p.at.off++
		}
	}
}

func (p *parser) escape() (rune, bool) {
	at := p.at
	rest := p.src[p.at.off+1:]
	if rest == "" {
		return 0, p.fail(at, "the string has no closing quote")
	}
	p.at.off += 2
	digits := 0
	switch rest[0] {
	case '"', '\\':
		return rune(rest[0]), true
	case 'u':
		digits = 4
	case 'U':
		digits = 8
	default:
		// \n, \r and \t exist, and would put control characters into a claim.
		return 0, p.fail(at, `of the escapes there are \", \\, \uNNNN and \UNNNNNNNN here`)
	}
	if len(rest) < 1+digits {
		return 0, p.fail(at, "the escape is cut off")
	}
	n, err := strconv.ParseUint(rest[1:1+digits], 16, 32)
	r := rune(n)
	if err != nil || n > utf8.MaxRune || !utf8.ValidRune(r) || r < ' ' || r >= 0x7f && r < 0xa0 {
		return 0, p.fail(at, "the escape names no character that may be in a claim")
	}
	p.at.off += int32(digits)
	return r, true
}
