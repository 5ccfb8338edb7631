package claims

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"

	"github.com/deputy-id/deputy/test/bubble"
)

func TestTheBookFollowsTheFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "rules.hcl")
	write := func(text string) {
		t.Helper()
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	rule := func(owner string) string { return "rule \"/a\" {\n  owner = \"" + owner + "\"\n}\n" }
	write(rule("one"))
	source := Source{Name: "plugin_data", Text: "rules_file = \"" + path + "\"\nrule \"/b\" {}\n"}
	bubble.Test(t, func(t *testing.T) {
		var log bytes.Buffer
		book := NewRulebook(hclog.New(&hclog.LoggerOptions{Output: &log}))
		first, err := Load(t.Context(), source, domain)
		if err != nil {
			t.Fatal(err)
		}
		book.Put(first)
		_, stale := book.Rules()
		book.Put(first)
		select {
		case <-stale:
			t.Error("the same rules count as others")
		default:
		}
		var w watcher
		owner := func(want string) {
			t.Helper()
			rules, _ := book.Rules()
			c, err := rules.Claims(id("/a"), noon)
			if err != nil || c == nil || c.Owner != want {
				t.Errorf("got %+v, %v, want owner %s; log:\n%s", c, err, want, &log)
			}
			if c, err := rules.Claims(id("/b"), noon); err != nil || c == nil {
				t.Errorf("the rule of plugin_data: got %v, %v", c, err)
			}
		}
		logs := func(want string, times int) {
			t.Helper()
			if got := strings.Count(log.String(), want); got != times {
				t.Errorf("got %q %d times in the log, want %d:\n%s", want, got, times, &log)
			}
		}
		look := func() { book.look(t.Context(), &w) }
		look()
		owner("one")
		logs("reloaded", 0)

		// A change is read when it has settled.
		write(rule("two, and longer"))
		look()
		owner("one")
		look()
		owner("two, and longer")
		logs("reloaded", 1)

		// A broken one is said once.
		write("rule \"/a\" {")
		look()
		look()
		look()
		owner("two, and longer")
		logs("path=", 0)
		logs("rules.hcl:1:12: a block is not closed", 1)
		logs("failed_reloads=1", 1)

		// So is one that is not there, or cannot be read.
		if err := os.Remove(path); err != nil {
			t.Fatal(err)
		}
		look()
		look()
		owner("two, and longer")
		logs("no such file", 1)
		if err := syscall.Mkfifo(path, 0o600); err != nil {
			t.Fatal(err)
		}
		look()
		look()
		look()
		logs("not a regular file", 1)
		if err := os.Remove(path); err != nil {
			t.Fatal(err)
		}
		write(rule("three"))
		look()
		look()
		owner("three")
		logs(" reloads=2", 1)

		// One that clashes with plugin_data is refused as a whole.
		write("rule \"/{x}\" {}\nrule \"/b\" {}\n")
		look()
		look()
		owner("three")
		logs("rules.hcl:2:1: the rule at plugin_data:2 has the same IDs", 1)
	})
}

// A file that could not be read for a reason that passes is read later, though
// nobody touches it again.
func TestAFileThatCouldNotBeReadIsReadLater(t *testing.T) {
	path := filepath.Join(t.TempDir(), "rules.hcl")
	write := func(text string) {
		t.Helper()
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("rule \"/a\" {}\n")
	var log bytes.Buffer
	book := NewRulebook(hclog.New(&hclog.LoggerOptions{Output: &log}))
	rules, err := Load(t.Context(), Source{Name: "plugin_data", Text: "rules_file = \"" + path + "\"\n"}, domain)
	if err != nil {
		t.Fatal(err)
	}
	book.Put(rules)
	var w watcher
	book.look(t.Context(), &w)
	write("rule \"/a\" {}\nrule \"/b\" {}\n")

	var usual syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &usual); err != nil {
		t.Fatal(err)
	}
	none := syscall.Rlimit{Cur: 0, Max: usual.Max}
	if err := syscall.Setrlimit(syscall.RLIMIT_NOFILE, &none); err != nil {
		t.Fatal(err)
	}
	for range 4 {
		book.look(t.Context(), &w)
	}
	if err := syscall.Setrlimit(syscall.RLIMIT_NOFILE, &usual); err != nil {
		t.Fatal(err)
	}
	if got := strings.Count(log.String(), "too many open files"); got != 1 {
		t.Errorf("got %d complaints, want 1:\n%s", got, &log)
	}
	book.look(t.Context(), &w)
	if now, _ := book.Rules(); now.Len() != 2 {
		t.Errorf("got %d rules, want 2; log:\n%s", now.Len(), &log)
	}
}

// Whoever may write the file gives out claims, so it is said at a start, and as
// soon as its mode becomes so.
func TestAFileThatOthersMayWriteIsDoubtful(t *testing.T) {
	path := filepath.Join(t.TempDir(), "rules.hcl")
	if err := os.WriteFile(path, []byte("rule \"/a\" {}\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	source := Source{Name: "plugin_data", Text: "rules_file = \"" + path + "\"\n"}
	var log bytes.Buffer
	book := NewRulebook(hclog.New(&hclog.LoggerOptions{Output: &log}))
	rules, err := Load(t.Context(), source, domain)
	if err != nil {
		t.Fatal(err)
	}
	book.Put(rules)
	var w watcher
	book.look(t.Context(), &w)
	if log.Len() > 0 {
		t.Errorf("got a log of a file that is nobody else's:\n%s", &log)
	}
	want := path + " may be written by others than its owner (mode 0662)"
	if err := os.Chmod(path, 0o662); err != nil {
		t.Fatal(err)
	}
	book.look(t.Context(), &w)
	book.look(t.Context(), &w)
	if !strings.Contains(log.String(), want) {
		t.Errorf("got the log %q, want %q", &log, want)
	}
	if rules, err := Load(t.Context(), source, domain); err != nil || !strings.HasPrefix(rules.Warning(), want) {
		t.Errorf("got %v, want rules with the warning %q", err, want)
	}
	if rules, err := LoadFile(t.Context(), path, domain); err != nil || !strings.HasPrefix(rules.Warning(), want) {
		t.Errorf("got %v, want rules with the warning %q", err, want)
	}
}

func TestRunLooksByItself(t *testing.T) {
	path := filepath.Join(t.TempDir(), "rules.hcl")
	if err := os.WriteFile(path, []byte("rule \"/a\" {}\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	book := NewRulebook(nil)
	rules, err := Load(t.Context(), Source{Text: "rules_file = \"" + path + "\""}, domain)
	if err != nil {
		t.Fatal(err)
	}
	book.Put(rules)
	_, stale := book.Rules()
	done := make(chan error, 1)
	go func() { done <- book.Run(t.Context()) }()
	if err := os.WriteFile(path, []byte("rule \"/a\" {}\nrule \"/b\" {}\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	select {
	case <-stale:
	case <-time.After(20 * time.Second):
		t.Fatal("the change was not seen")
	}
	if now, _ := book.Rules(); now.Len() != 2 {
		t.Errorf("got %d rules, want 2", now.Len())
	}
}

func TestTheFileMayHoldSettingsOnce(t *testing.T) {
	path := filepath.Join(t.TempDir(), "rules.hcl")
	if err := os.WriteFile(path, []byte("claim_name = \"x\"\nunmapped = \"deny\"\nrules_file = \"/x\"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	_, err := Load(t.Context(), Source{Name: "plugin_data", Text: "rules_file = \"" + path + "\"\nunmapped = \"omit\"\n"}, domain)
	want := path + ":2:12: unmapped is set in plugin_data already\n" + path + `:3:1: unknown key "rules_file" in the rules; there are claim_name, on_error and unmapped, and the block rule`
	if err == nil || err.Error() != want {
		t.Errorf("got\n%v\nwant\n%s", err, want)
	}
}

func TestAFileThatIsTooLargeIsRefused(t *testing.T) {
	path := filepath.Join(t.TempDir(), "rules.hcl")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := f.Truncate(maxFile + 1); err != nil {
		t.Fatal(err)
	}
	if _, err := LoadFile(t.Context(), path, domain); err == nil || !strings.Contains(err.Error(), "larger than 64 MiB") {
		t.Errorf("got %v, want that it is too large", err)
	}
}

func TestTheBooksClaims(t *testing.T) {
	for name, tc := range map[string]struct {
		rules, path string
		claim, fail bool
	}{
		"a rule":                 {"claim_name = \"c\"\nrule \"/a\" {}", "/a", true, false},
		"no rule":                {"rule \"/a\" {}", "/b", false, false},
		"no rule, and denied":    {"on_error = \"omit\"\nunmapped = \"deny\"", "/b", false, true},
		"an error":               {"rule \"/{x}\" {\n chain = [\"/a\"]\n}", "/a", false, true},
		"an error, let through":  {"on_error = \"omit\"\nrule \"/{x}\" {\n chain = [\"/a\"]\n}", "/a", false, false},
		"nothing was put, so no": {"", "/a", false, false},
	} {
		t.Run(name, func(t *testing.T) {
			book := NewRulebook(nil)
			if tc.rules != "" {
				book.Put(load(t, tc.rules))
			}
			got, err := book.Claims(id(tc.path), noon)
			if (err != nil) != tc.fail || (got["c"] != nil) != tc.claim || len(got) > 1 || len(got) == 1 && !tc.claim {
				t.Errorf("got %v, %v", got, err)
			}
		})
	}
}
