package arch

import (
	"go/parser"
	"go/token"
	"io/fs"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestTheSourceKeepsTheRules(t *testing.T) {
	pkgs, err := read(filepath.Join("..", ".."))
	if err != nil {
		t.Fatal(err)
	}
	if len(pkgs) < len(may) {
		t.Errorf("got %d packages, fewer than there are rules", len(pkgs))
	}
	for _, v := range violations(pkgs) {
		t.Error(v)
	}
}

// A rule function that finds nothing wrong with anything would pass the test above.
func TestViolations(t *testing.T) {
	// good is the smallest tree that keeps the rules.
	good := func() []pkg {
		var pkgs []pkg
		for path, imports := range may {
			p := pkg{Path: path, Name: filepath.Base(path), Docs: 1, Own: 1, Imports: []string{"fmt"}}
			for _, imp := range imports {
				p.Imports = append(p.Imports, module+"/"+imp)
			}
			pkgs = append(pkgs, p)
		}
		return append(pkgs,
			pkg{Path: "cmd/deputy", Name: "main", Docs: 1, Own: 1, Imports: []string{module + "/conf", module + "/endpoint", "github.com/spf13/cobra"}},
			pkg{Path: "test/demo", Name: "main", Docs: 1, Own: 1, Imports: []string{"testing", "google.golang.org/grpc"}},
		)
	}
	imports := func(path, imp string) func([]pkg) []pkg {
		return func(pkgs []pkg) []pkg {
			for i := range pkgs {
				if pkgs[i].Path == path {
					pkgs[i].Imports = append(pkgs[i].Imports, imp)
				}
			}
			return pkgs
		}
	}
	change := func(path string, f func(*pkg)) func([]pkg) []pkg {
		return func(pkgs []pkg) []pkg {
			for i := range pkgs {
				if pkgs[i].Path == path {
					f(&pkgs[i])
				}
			}
			return pkgs
		}
	}
	tests := map[string]struct {
		change func([]pkg) []pkg
		want   []string
	}{
		"a tree that keeps them": {func(p []pkg) []pkg { return p }, nil},
		"an import backwards": {imports("attestor/peer", module+"/attestor"),
			[]string{"attestor/peer imports " + module + "/attestor: the rules do not allow it"}},
		"svid that sees attestors": {imports("svid", module+"/attestor"),
			[]string{"svid imports " + module + "/attestor: the rules do not allow it"}},
		"endpoint that sees conf": {imports("endpoint", module+"/conf"),
			[]string{"endpoint imports " + module + "/conf: the rules do not allow it"}},
		"conf that sees a stage": {imports("conf", module+"/svid/registry"),
			[]string{"conf imports " + module + "/svid/registry: the rules do not allow it"}},
		"internal is open": {imports("conf", module+"/internal/durable"), nil},
		"internal that imports a stage": {imports("internal/watch", module+"/svid"),
			[]string{"internal/watch imports " + module + "/svid: the rules do not allow it"}},
		"an import of a program": {imports("cmd/deputy", module+"/cmd/other"),
			[]string{"cmd/deputy imports " + module + "/cmd/other: nothing may import a program"}},
		"a program that imports what serves tests": {imports("cmd/deputy", module+"/test/engine"),
			[]string{"cmd/deputy imports " + module + "/test/engine: only tests may"}},
		"a test that imports what serves tests": {change("svid", func(p *pkg) { p.Tests = []string{module + "/test/engine"} }), nil},
		"a runtime client elsewhere": {imports("attestor", "github.com/moby/moby/client"),
			[]string{"attestor imports github.com/moby/moby/client: only attestor/container may"}},
		"testing in the program": {imports("svid", "testing/synctest"),
			[]string{"svid imports testing/synctest: it is not a test"}},
		"a bubble on more than one processor": {change("svid", func(p *pkg) { p.Tests = []string{"testing/synctest"} }),
			[]string{"svid imports testing/synctest in a test: test/bubble does it"}},
		"a test that imports backwards": {change("attestor", func(p *pkg) { p.Tests = []string{module + "/svid", module + "/attestor"} }),
			[]string{"attestor imports " + module + "/svid in a test: the rules do not allow it"}},
		"no package comment": {change("svid", func(p *pkg) { p.Docs = 0 }),
			[]string{"svid: got 0 package comments, want 1"}},
		"two package comments": {change("svid", func(p *pkg) { p.Docs = 2 }),
			[]string{"svid: got 2 package comments, want 1"}},
		"generated code alone": {change("proto/deputy/admin/v1", func(p *pkg) { p.Docs, p.Own = 0, 0 }), nil},
		"a name that says nothing": {change("conf", func(p *pkg) { p.Name = "util" }),
			[]string{"conf: the name util says nothing"}},
		"a package without a rule": {func(p []pkg) []pkg { return append(p, pkg{Path: "stray", Name: "stray", Docs: 1, Own: 1}) },
			[]string{"stray: no rule says what it may import"}},
		"a rule without a package": {func(p []pkg) []pkg {
			var rest []pkg
			for _, one := range p {
				if one.Path != "conf" {
					rest = append(rest, one)
				}
			}
			return rest
		}, []string{"the rule of conf names conf, which is not there"}},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			if diff := cmp.Diff(tt.want, violations(tt.change(good()))); diff != "" {
				t.Errorf("violations (-want +got):\n%s", diff)
			}
		})
	}
}

// read parses every package below root. Modules of their own are not ours.
func read(root string) ([]pkg, error) {
	byPath := make(map[string]*pkg)
	var order []string
	err := filepath.WalkDir(root, func(file string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() {
			name := d.Name()
			if name == "testdata" || name != ".." && (strings.HasPrefix(name, ".") || strings.HasPrefix(name, "_")) {
				return filepath.SkipDir
			}
			if file != root {
				if mods, _ := filepath.Glob(filepath.Join(file, "go.mod")); len(mods) > 0 {
					return filepath.SkipDir
				}
			}
			return nil
		}
		if filepath.Ext(file) != ".go" {
			return nil
		}
		f, err := parser.ParseFile(token.NewFileSet(), file, nil, parser.ImportsOnly|parser.ParseComments)
		if err != nil {
			return err
		}
		dir, err := filepath.Rel(root, filepath.Dir(file))
		if err != nil {
			return err
		}
		dir = filepath.ToSlash(dir)
		if dir == "." {
			dir = ""
		}
		p := byPath[dir]
		if p == nil {
			p = &pkg{Path: dir}
			byPath[dir] = p
			order = append(order, dir)
		}
		var imports []string
		for _, spec := range f.Imports {
			path, err := strconv.Unquote(spec.Path.Value)
			if err != nil {
				return err
			}
			imports = append(imports, path)
		}
		if strings.HasSuffix(file, "_test.go") {
			p.Tests = append(p.Tests, imports...)
			return nil
		}
		p.Name = f.Name.Name
		p.Imports = append(p.Imports, imports...)
		generated := false
		for _, c := range f.Comments {
			generated = generated || strings.HasPrefix(c.Text(), "Code generated ")
		}
		if !generated {
			p.Own++
			if f.Doc != nil {
				p.Docs++
			}
		}
		return nil
	})
	pkgs := make([]pkg, 0, len(order))
	for _, path := range order {
		pkgs = append(pkgs, *byPath[path])
	}
	return pkgs, err
}
