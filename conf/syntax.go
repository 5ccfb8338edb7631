package conf

import (
	"maps"
	"slices"
	"strings"
	"unicode"
	"unicode/utf8"

	"github.com/hashicorp/hcl/v2"
	"github.com/hashicorp/hcl/v2/hclsyntax"
	"github.com/zclconf/go-cty/cty"
)

const (
	maxFile  = 1 << 20 // bytes
	maxDepth = 8       // of blocks and lists in one another
)

// parse reads the part of HCL that is data: blocks, and keys with strings,
// booleans and lists. The tokens are looked at first, so that nothing else,
// and no nesting without end, comes before the parser.
func parse(src []byte, file string) (*hclsyntax.Body, Problems) {
	tokens, diags := hclsyntax.LexConfig(src, file, hcl.InitialPos)
	var p Problems
	depth, inside := 0, 0
	for _, t := range tokens {
		switch t.Type {
		case hclsyntax.TokenTemplateInterp, hclsyntax.TokenTemplateControl:
			if inside++; inside == 1 {
				p.Add(t.Range, "a string has no variables; for %s itself write %[2]c%[1]s", t.Bytes, t.Bytes[0])
			}
		case hclsyntax.TokenTemplateSeqEnd:
			inside--
		}
		if inside > 0 {
			continue // the one complaint is enough
		}
		switch t.Type {
		case hclsyntax.TokenOBrace, hclsyntax.TokenOBrack:
			if depth++; depth > maxDepth {
				p.Add(t.Range, "blocks and lists are more than %d deep", maxDepth)
				return nil, p
			}
		case hclsyntax.TokenCBrace, hclsyntax.TokenCBrack:
			depth--
		case hclsyntax.TokenOParen:
			p.Add(t.Range, "there are no functions here")
		case hclsyntax.TokenOHeredoc:
			p.Add(t.Range, "a string stands in double quotes, on one line")
		case hclsyntax.TokenQuotedNewline:
			p.Add(t.Range, "the string has no closing quote")
			return nil, p // from here on strings and what is between them are mixed up
		case hclsyntax.TokenIdent, hclsyntax.TokenNumberLit, hclsyntax.TokenEqual, hclsyntax.TokenComma,
			hclsyntax.TokenOQuote, hclsyntax.TokenQuotedLit, hclsyntax.TokenCQuote,
			hclsyntax.TokenNewline, hclsyntax.TokenComment, hclsyntax.TokenEOF,
			hclsyntax.TokenTemplateSeqEnd, hclsyntax.TokenCParen, hclsyntax.TokenStringLit, hclsyntax.TokenCHeredoc:
			// Of the last four, the beginning is reported.
		case hclsyntax.TokenApostrophe, hclsyntax.TokenBacktick, hclsyntax.TokenSemicolon, hclsyntax.TokenTabs,
			hclsyntax.TokenInvalid, hclsyntax.TokenBadUTF8:
			return nil, problems(diags) // the lexer has the better word on these
		default:
			p.Add(t.Range, "%q has no meaning here", t.Bytes)
		}
	}
	if len(p) > 0 {
		return nil, p
	}
	f, diags := hclsyntax.ParseConfig(src, file, hcl.InitialPos)
	if diags.HasErrors() {
		return nil, problems(diags)
	}
	return f.Body.(*hclsyntax.Body), nil
}

// problems puts the parser's complaints into our form.
func problems(diags hcl.Diagnostics) (p Problems) {
	for _, d := range diags {
		if d.Severity != hcl.DiagError {
			continue
		}
		var at hcl.Range
		if d.Subject != nil {
			at = *d.Subject
		}
		reason := lower(d.Summary)
		if d.Detail != "" {
			reason += ": " + strings.TrimSuffix(lower(d.Detail), ".")
		}
		p.Add(at, "%s", strings.ReplaceAll(reason, "\n", " "))
	}
	return p
}

func lower(s string) string {
	r, n := utf8.DecodeRuneInString(s)
	return string(unicode.ToLower(r)) + s[n:]
}

// A reader reads blocks and collects what is wrong with them.
type reader struct {
	problems Problems
}

type (
	keys   map[string]func(*hclsyntax.Attribute)
	blocks map[string]func(*hclsyntax.Block)
)

// body reads a block's body, or the file's. Whatever has no reader is a problem.
func (r *reader) body(b *hclsyntax.Body, in string, k keys, bl blocks) {
	for name, a := range b.Attributes {
		switch {
		case k[name] != nil:
			k[name](a)
		case bl[name] != nil:
			r.problems.Add(a.NameRange, "%s is a block: %[1]s { … }, without =", name)
		default:
			r.problems.Add(a.NameRange, "unknown key %q in %s; there %s", name, in, list(k))
		}
	}
	for _, block := range b.Blocks {
		switch {
		case bl[block.Type] != nil:
			bl[block.Type](block)
		case k[block.Type] != nil:
			r.problems.Add(block.TypeRange, "%s is a key: %[1]s = …", block.Type)
		default:
			r.problems.Add(block.TypeRange, "unknown block %q in %s; there %s", block.Type, in, list(bl))
		}
	}
}

func list[V any](m map[string]V) string {
	names := slices.Sorted(maps.Keys(m))
	switch len(names) {
	case 0:
		return "are none"
	case 1:
		return "is only " + names[0]
	}
	return "are " + strings.Join(names[:len(names)-1], ", ") + " and " + names[len(names)-1]
}

// labels checks how many labels a block has; what says what they are.
func (r *reader) labels(b *hclsyntax.Block, what ...string) bool {
	if len(b.Labels) == len(what) {
		return true
	}
	if len(what) == 0 {
		r.problems.Add(b.LabelRanges[0], "%s takes no name", b.Type)
	} else {
		at := b.TypeRange
		if len(b.LabelRanges) > len(what) {
			at = b.LabelRanges[len(what)]
		}
		r.problems.Add(at, "%s takes one name: %[1]s \"%s\" { … }", b.Type, what[0])
	}
	return false
}

// text reads a string, which may not be empty.
func (r *reader) text(e hclsyntax.Expression) (s Setting[string], ok bool) {
	t, isString := e.(*hclsyntax.TemplateExpr)
	if !isString {
		r.problems.Add(e.Range(), "this is %s; a string in double quotes belongs here", kind(e))
		return s, false
	}
	v, diags := t.Value(nil)
	if diags.HasErrors() {
		r.problems = append(r.problems, problems(diags)...)
		return s, false
	}
	if v.AsString() == "" {
		r.problems.Add(e.Range(), "the string is empty")
		return s, false
	}
	return Setting[string]{v.AsString(), e.Range()}, true
}

// texts reads a list of strings.
func (r *reader) texts(e hclsyntax.Expression) (all []Setting[string]) {
	tuple, ok := e.(*hclsyntax.TupleConsExpr)
	if !ok {
		r.problems.Add(e.Range(), "this is %s; a list of strings belongs here: [\"…\"]", kind(e))
		return nil
	}
	for _, one := range tuple.Exprs {
		if s, ok := r.text(one); ok {
			all = append(all, s)
		}
	}
	return all
}

// flag reads a boolean.
func (r *reader) flag(e hclsyntax.Expression) (s Setting[bool], ok bool) {
	if l, is := e.(*hclsyntax.LiteralValueExpr); is && kind(e) == "a boolean" {
		return Setting[bool]{l.Val.True(), e.Range()}, true
	}
	r.problems.Add(e.Range(), "this is %s; true or false belongs here", kind(e))
	return s, false
}

// kind names what stands in the place of a value.
func kind(e hclsyntax.Expression) string {
	switch e := e.(type) {
	case *hclsyntax.TemplateExpr:
		return "a string"
	case *hclsyntax.TupleConsExpr:
		return "a list"
	case *hclsyntax.ObjectConsExpr:
		return "a block"
	case *hclsyntax.LiteralValueExpr:
		switch {
		case e.Val.IsNull():
			return "null"
		case e.Val.Type() == cty.Bool:
			return "a boolean"
		}
		return "a number"
	}
	return "a bare word"
}
