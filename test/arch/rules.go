// Package arch holds the import rules of the repository: which package may
// see which, so that a stage of the pipeline cannot come to know more than
// its input. Its test reads the source as it is.
package arch

import (
	"fmt"
	"maps"
	"slices"
	"strings"
)

const module = "github.com/deputy-id/deputy"

// A pkg is one package of the module, as far as the rules look at it.
type pkg struct {
	Path    string   // below the module, "" for its root
	Name    string   // as in its package clause
	Imports []string // full import paths, of the code that is not a test
	Tests   []string // full import paths, of its tests
	Docs    int      // files with a package comment, generated ones left out
	Own     int      // files that are neither generated nor tests
}

// may lists, for each package, what else of the module it may import. Packages
// below internal are open to all.
var may = map[string][]string{
	"attestor/peer":      {},
	"attestor":           {"attestor/peer"},
	"attestor/container": {"attestor", "attestor/peer"},
	"svid/registry":      {"attestor"},
	"svid":               {"svid/registry"},
	"svid/discovery":     {"svid"},
	"svid/local":         {"svid", "svid/registry"},
	"svid/federation":    {"svid"},
	"endpoint":           {"attestor", "attestor/peer", "attestor/container", "attestor/kubernetes", "svid/registry", "svid", "svid/local", "svid/federation", "proto/deputy/admin/v1"},
	"delegation":         {},
	"plugins/attest":     {"attestor", "attestor/peer", "attestor/container"},
	"plugins/claims":     {"delegation"},
	"conf":               {},

	"attestor/kubernetes": {"attestor"},

	"internal/bounded":      {},
	"internal/crowd":        {},
	"internal/durable":      {},
	"internal/keypair":      {"internal/bounded"},
	"internal/owned":        {"internal/bounded"},
	"internal/watch":        {},
	"proto/deputy/admin/v1": {},
}

// free are the trees that may import everything: what joins the stages, and
// what drives them from outside.
var free = []string{"cmd/", "test/"}

// keepers lists foreign modules that only some packages may import, by the
// beginning of the import path: a container runtime's client, say, is one
// package's business.
var keepers = map[string][]string{
	"github.com/moby/moby":        {"attestor/container"},
	"github.com/godbus/dbus":      {"attestor"},
	"github.com/hashicorp/hcl":    {"conf", "cmd/deputy"},
	"github.com/zclconf/go-cty":   {"conf"},
	"github.com/spf13/cobra":      {"cmd/deputy"},
	"github.com/fsnotify":         {"cmd/deputy"},
	"modernc.org/sqlite":          {"svid/registry"},
	"github.com/envoyproxy":       {"endpoint"},
	"google.golang.org/grpc":      {"endpoint", "plugins/", "proto/", "cmd/deputy"},
	"github.com/spiffe/spire-api": {"endpoint", "proto/", "cmd/deputy"},

	"github.com/spiffe/spire-plugin-sdk": {"plugins/", "cmd/deputy-attest", "cmd/deputy-claims"},
}

// nameless are package names that say nothing of what is in them.
var nameless = []string{
	"base", "common", "core", "helper", "helpers", "lib", "manager", "misc", "model", "models",
	"shared", "tool", "tools", "type", "types", "util", "utils",
}

// violations says, in sorted order, where the packages break the rules.
func violations(pkgs []pkg) []string {
	var found []string
	add := func(format string, args ...any) { found = append(found, fmt.Sprintf(format, args...)) }

	seen := make(map[string]bool, len(pkgs))
	for _, p := range pkgs {
		seen[p.Path] = true
		if slices.Contains(nameless, p.Name) {
			add("%s: the name %s says nothing", p.Path, p.Name)
		}
		if p.Own > 0 && p.Docs != 1 {
			add("%s: got %d package comments, want 1", p.Path, p.Docs)
		}
		for _, imp := range p.Imports {
			if why := refused(p.Path, imp); why != "" {
				add("%s imports %s: %s", p.Path, imp, why)
			}
			if imp == "testing" || strings.HasPrefix(imp, "testing/") {
				if !strings.HasPrefix(p.Path, "test/") {
					add("%s imports %s: it is not a test", p.Path, imp)
				}
			}
		}
		// A test may use any foreign module, what serves tests, and what its
		// package may.
		for _, imp := range p.Tests {
			if imp == "testing/synctest" {
				add("%s imports %s in a test: test/bubble does it", p.Path, imp)
			}
			if local, ours := strings.CutPrefix(imp, module+"/"); ours && local != p.Path && !strings.HasPrefix(local, "test/") {
				if why := refused(p.Path, imp); why != "" {
					add("%s imports %s in a test: %s", p.Path, imp, why)
				}
			}
		}
		if _, ruled := may[p.Path]; !ruled && !isFree(p.Path) && p.Own > 0 {
			add("%s: no rule says what it may import", p.Path)
		}
	}
	for path, imports := range may {
		for _, p := range append([]string{path}, imports...) {
			if !seen[p] {
				add("the rule of %s names %s, which is not there", path, p)
			}
		}
	}
	slices.Sort(found)
	return slices.Compact(found)
}

// refused says why the package may not import this, "" if it may.
func refused(path, imp string) string {
	local, ours := strings.CutPrefix(imp, module+"/")
	if !ours {
		for _, prefix := range slices.Sorted(maps.Keys(keepers)) {
			if strings.HasPrefix(imp, prefix) && !strings.HasPrefix(path, "test/") && !keeps(keepers[prefix], path) {
				return "only " + strings.Join(keepers[prefix], ", ") + " may"
			}
		}
		return ""
	}
	switch {
	case strings.HasPrefix(local, "cmd/"):
		return "nothing may import a program"
	case strings.HasPrefix(local, "test/") && !strings.HasPrefix(path, "test/"):
		return "only tests may"
	case isFree(path):
		return ""
	case strings.HasPrefix(local, "internal/") && !strings.HasPrefix(path, "internal/") && !strings.HasPrefix(path, "proto/"):
		return ""
	case slices.Contains(may[path], local):
		return ""
	}
	return "the rules do not allow it"
}

func keeps(keepers []string, path string) bool {
	return slices.ContainsFunc(keepers, func(k string) bool {
		return k == path || strings.HasSuffix(k, "/") && strings.HasPrefix(path, k)
	})
}

func isFree(path string) bool {
	return path == "" || slices.ContainsFunc(free, func(f string) bool { return strings.HasPrefix(path, f) })
}
