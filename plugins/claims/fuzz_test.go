package claims

import (
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/hashicorp/hcl/v2"
	"github.com/hashicorp/hcl/v2/hclsyntax"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/zclconf/go-cty/cty"
	"google.golang.org/protobuf/types/known/structpb"
)

func seeds(f *testing.F) {
	files, err := filepath.Glob("testdata/*.hcl")
	if err != nil || len(files) == 0 {
		f.Fatalf("got %d files, %v", len(files), err)
	}
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(string(text))
	}
	for _, text := range []string{
		"a = 1\nb=\"\\u00fc\"#\n", "a{}\n", "a \"b\"{c=[\"d\",]}", "a {\n b {}\n}\n", "a = [ # c\n\"x\" /* y */ , z\n]", "/**/a=b", "a = \"${b}\"", "a = \"$${b}\"",
		"a = \"%%{b}\"", "a = [[[[[[[[[[", "a=01", "a \"\" {}", "a = \"\\ud800\"", "\ufeffa=1", "a = 1\r\nb = 2\r\n", "a {\r\n}\r", "a-b = 1", "a = b-c", "_ = 1", "a { b = 1 }", "a { b = 1\n}",
	} {
		f.Add(text)
	}
}

// What our parser takes, HCL's own takes too, and reads alike.
func FuzzParse(f *testing.F) {
	seeds(f)
	f.Fuzz(func(t *testing.T, src string) {
		ours, err := parse(&text{Source{Name: "x", Text: src}})
		if err != nil {
			var p Problems
			if !errors.As(err, &p) || len(p) == 0 || p[0].Line < 1 || p[0].Column < 1 || p[0].Byte > len(src) || strings.Contains(p[0].Reason, "\n") {
				t.Errorf("got %v, want problems with their places, each a line", err)
			}
			return
		}
		file, diags := hclsyntax.ParseConfig([]byte(src), "x", hcl.InitialPos)
		if diags.HasErrors() {
			// It finds a key that is there twice while parsing, and we later.
			for _, d := range diags {
				if d.Summary != "Attribute redefined" {
					t.Fatalf("taken, but not by HCL: %v", diags)
				}
			}
			return
		}
		theirs := file.Body.(*hclsyntax.Body)
		if diff := cmp.Diff(fromHCL(t, theirs), fromUs(ours)); diff != "" {
			t.Error(diff)
		}
	})
}

// plainBody is what both parsers' bodies come down to.
type plainBody struct {
	Keys   map[string]any
	Blocks []plainBlock
}

type plainBlock struct {
	Name   string
	Labels []string
	Body   plainBody
}

func fromUs(b body) plainBody {
	p := plainBody{Keys: map[string]any{}}
	for _, a := range b.attributes {
		p.Keys[a.name] = ourValue(a.value)
	}
	for _, one := range b.blocks {
		var labels []string
		for _, l := range one.labels {
			labels = append(labels, l.text)
		}
		p.Blocks = append(p.Blocks, plainBlock{one.name, labels, fromUs(one.body)})
	}
	return p
}

func ourValue(v value) any {
	switch v.kind {
	case aList:
		all := []any{}
		for _, one := range v.list {
			all = append(all, ourValue(one))
		}
		return all
	case aWord, aNumber:
		return v.kind.String() // of no use as a value beyond small numbers, which tests of rules see
	}
	return cty.StringVal(v.text).AsString() // HCL keeps strings in their composed form
}

func fromHCL(t *testing.T, b *hclsyntax.Body) plainBody {
	p := plainBody{Keys: map[string]any{}}
	for name, a := range b.Attributes {
		p.Keys[name] = theirValue(t, a.Expr)
	}
	for _, one := range b.Blocks {
		var labels []string
		labels = append(labels, one.Labels...)
		p.Blocks = append(p.Blocks, plainBlock{one.Type, labels, fromHCL(t, one.Body)})
	}
	return p
}

func theirValue(t *testing.T, e hclsyntax.Expression) any {
	switch e := e.(type) {
	case *hclsyntax.TemplateExpr:
		v, diags := e.Value(nil)
		if diags.HasErrors() {
			t.Fatal(diags)
		}
		return v.AsString()
	case *hclsyntax.TupleConsExpr:
		all := []any{}
		for _, one := range e.Exprs {
			all = append(all, theirValue(t, one))
		}
		return all
	case *hclsyntax.LiteralValueExpr:
		if e.Val.IsNull() || e.Val.Type().FriendlyName() == "bool" {
			return aWord.String()
		}
		return aNumber.String()
	case *hclsyntax.ScopeTraversalExpr:
		return aWord.String()
	}
	t.Fatalf("taken as a value: %T", e)
	return nil
}

// Whatever the rules are, they load or say where they are wrong, and what they
// make of an ID is the ID's own.
func FuzzRules(f *testing.F) {
	files, err := filepath.Glob("testdata/*.hcl")
	if err != nil {
		f.Fatal(err)
	}
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(string(text), "/agent/x/researcher")
	}
	f.Add("rule \"/a/{b}/*\" {\n owner = \"{b}@{{}}\"\n chain = [\"/{b}/x\", \"spiffe://o.example/{b}.\"]\n}", "/a/../b")
	f.Add("rule \"/*\" {\n may_act = [\"/.{{\"]\n}", "/a")
	f.Add("rule \"/{a}/{b}\" {\n scopes = [\"{a}:{b}\"]\n}\nrule \"/{a}/x/*\" {}\nrule \"/y/{c}\" {}", "/y/x")
	f.Fuzz(func(t *testing.T, text, path string) {
		if strings.Contains(text, "rules_file") {
			return
		}
		r, err := Load(t.Context(), Source{Name: "x", Text: text}, domain)
		if err != nil {
			if !errors.As(err, new(Problems)) {
				t.Errorf("got %v, want Problems", err)
			}
			return
		}
		id, err := spiffeid.FromPath(domain, path)
		if err != nil {
			return
		}
		c, err := r.Claims(id, noon)
		again, errAgain := r.Claims(id, noon)
		if diff := cmp.Diff(c, again); diff != "" || (err == nil) != (errAgain == nil) {
			t.Errorf("the mapping is no function: %s, %v, %v", diff, err, errAgain)
		}
		if c == nil {
			return
		}
		if c.Act == nil || c.Act.Subject != id.String() || c.Depth < 1 || c.Depth > 8 {
			t.Errorf("got act %+v, depth %d for %s", c.Act, c.Depth, id)
		}
		s, err := structpb.NewStruct(c.Map())
		if err != nil {
			t.Fatal(err)
		}
		b, err := json.Marshal(s.AsMap())
		if err != nil || strings.Contains(string(b), "${") {
			t.Errorf("got %s, %v", b, err)
		}
	})
}

// Two IDs of one rule whose value takes all segments never get the same value.
func FuzzNobodyGetsAnothersClaims(f *testing.F) {
	f.Add("/a-b/c", "/a/b-c", "{x}-{y}")
	f.Add("/a.b/c", "/a/b.c", "{x}.{y}")
	f.Add("/a:b/c", "/a/b", "{x}:{y}@z")
	f.Add("/a/a", "/aa/a", "{x}{x}/{y}{y}")
	f.Fuzz(func(t *testing.T, a, b, value string) {
		p, _, err := parsePattern("/{x}/{y}")
		if err != nil {
			t.Fatal(err)
		}
		tmpl, err := parseTemplate(value, &p)
		if err != nil || !strings.Contains(value, "{x}") || !strings.Contains(value, "{y}") {
			return
		}
		var named [2]bool
		for _, part := range tmpl.parts {
			if part.segment >= 0 {
				named[part.segment] = true
			}
		}
		if !named[0] || !named[1] || a == b {
			return
		}
		expand := func(path string) (string, bool) {
			if spiffeid.ValidatePath(path) != nil || strings.Count(path, "/") != 2 {
				return "", false
			}
			return tmpl.expand(strings.Split(path[1:], "/")), true
		}
		one, ok := expand(a)
		other, ok2 := expand(b)
		if ok && ok2 && one == other {
			t.Errorf("%s and %s both get %q by %q", a, b, one, value)
		}
	})
}
