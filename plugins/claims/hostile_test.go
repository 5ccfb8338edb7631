package claims

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	composerv1 "github.com/spiffe/spire-plugin-sdk/proto/spire/plugin/server/credentialcomposer/v1"
	"google.golang.org/protobuf/types/known/structpb"
)

// Ten megabytes of anything are refused, or read, in a time that somebody would
// wait for.
func TestLargeTexts(t *testing.T) {
	fill := func(s string) string { return strings.Repeat(s, 10<<20/len(s)) }
	for name, text := range map[string]string{
		"brackets":                  "a = " + fill("["),
		"braces":                    fill("a {\n"),
		"one string":                `a = "` + fill("x"),
		"one line of escapes":       `a = "` + fill(`\u0041`) + `"`,
		"one key, again and again":  fill("unmapped = \"omit\"\n"),
		"unknown keys":              fill("a = 1\n"),
		"unknown blocks":            fill("a {\n}\n"),
		"one rule, again and again": fill("rule \"/a\" {}\n"),
		"bad patterns":              fill("rule \"/a/..\" {}\n"),
		"one list":                  "rule \"/a\" {\n  scopes = [" + fill(`"x",`) + "]\n}",
		"one pattern":               `rule "` + fill("/x") + `" {}`,
		"labels":                    "rule " + fill(`"/a" `) + " {}",
		"comments":                  fill("/**/") + "\nx = 1",
		"zero bytes":                fill("\x00"),
	} {
		t.Run(name, func(t *testing.T) {
			start := time.Now()
			if _, err := Load(t.Context(), Source{Name: "x", Text: text}, domain); err == nil || len(err.Error()) > 64<<10 {
				t.Errorf("got an error of %d bytes", len(fmt.Sprint(err)))
			}
			if took := time.Since(start); took > 20*time.Second {
				t.Errorf("took %s", took)
			}
		})
	}
}

// What a text of many small parts takes of memory is bounded: a plugin that runs
// out of it ends, and the server signs no more.
func TestManyParts(t *testing.T) {
	many := strings.Repeat(`"",`, maxInOne)
	for name, c := range map[string]struct{ text, want string }{
		"keys":   {strings.Repeat("a=1\n", maxInOne+1), "more than 1024 keys"},
		"values": {"rule \"/a\" {\nscopes=[" + many + "1]\n}\n", "more than 1024 values"},
		"lists":  {strings.Repeat("rule \"/a\" {\nscopes=["+many+"]\n}\n", maxParts/maxInOne), "too many rules and values"},
		"labels": {"rule " + strings.Repeat(`""`, maxParts) + " {}\n", "too many rules and values"},
		"blocks": {strings.Repeat("a {}\n", maxParts/blockParts+1), "too many rules and values"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := Load(t.Context(), Source{Name: "x", Text: c.text}, domain)
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("got %.200v, want %q", err, c.want)
			}
		})
	}
}

// A file system that hangs costs a few threads, however often it is asked: the
// runtime ends a process that has ten thousand.
func TestAFileSystemThatHangs(t *testing.T) {
	release := make(chan struct{})
	for range cap(reading) {
		ctx, cancel := context.WithCancel(t.Context())
		if _, err := within(ctx, "x", func() (int, error) { cancel(); <-release; return 0, nil }); !errors.Is(err, context.Canceled) {
			t.Errorf("got %v, want that it waits no longer", err)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	for range 64 { // where there is room, some would go on to the call
		if _, err := within(ctx, "x", func() (int, error) { return 0, nil }); err == nil || !strings.Contains(err.Error(), "with others under way") {
			t.Fatalf("got %v, want that no more is begun", err)
		}
	}
	close(release)
	if got, err := within(t.Context(), "x", func() (int, error) { return 7, nil }); got != 7 || err != nil {
		t.Errorf("got %d, %v after the end of the others, want 7", got, err)
	}
}

// Rules of very many shapes that have nothing in common load like others.
func TestRulesOfManyShapes(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	var b strings.Builder
	for i := range 100_000 {
		fmt.Fprintf(&b, "rule \"/n%d", i)
		for s := range 14 {
			if r.IntN(2) == 0 {
				fmt.Fprintf(&b, "/{s%d}", s)
			} else {
				fmt.Fprintf(&b, "/f%d", r.IntN(9))
			}
		}
		b.WriteString("\" {}\n")
	}
	if _, err := Load(t.Context(), Source{Name: "x", Text: b.String()}, domain); err != nil {
		t.Error(err)
	}
}

func FuzzCompose(f *testing.F) {
	r := load(f, "on_error = \"omit\"\nrule \"/agent/{team}/*\" {\n  owner = \"{team}\"\n  chain = [\"/agent/{team}/planner\"]\n  x509 { dns_names = [\"{team}.example\"] }\n}\nrule \"/{any}\" {}\n")
	for _, id := range []string{"spiffe://prod.example/agent/x/y", "spiffe://prod.example/agent/../y", "spiffe://prod.example", "", "spiffe://prod.example/agent/x/planner", "spiffe://PROD.example/a", "spiffe://prod.example/agent/x%2fy/z"} {
		f.Add(id, "sub")
	}
	f.Fuzz(func(t *testing.T, id, name string) {
		before := &composerv1.JWTSVIDAttributes{Claims: &structpb.Struct{Fields: map[string]*structpb.Value{name: structpb.NewStringValue("kept")}}}
		after, err := r.compose(id, before, noon)
		if after != nil {
			if err != nil || after.Claims.Fields[name].GetStringValue() != "kept" || len(after.Claims.Fields) != 2 {
				t.Errorf("got %v, %v", after, err)
			}
			object := after.Claims.Fields["delegation"].GetStructValue().Fields
			if got := object["act"].GetStructValue().Fields["sub"].GetStringValue(); got != id {
				t.Errorf("got act.sub %q for %q", got, id)
			}
			// The owner is the team of the path and nobody else's.
			if owner := object["owner"].GetStringValue(); owner != "" && !strings.HasPrefix(id, "spiffe://prod.example/agent/"+owner+"/") {
				t.Errorf("got owner %q for %q", owner, id)
			}
		}
		if c, err := r.certify(id, nil, noon); c != nil && err == nil && len(c.DnsSans) != 1 {
			t.Errorf("got %v", c)
		}
	})
}
