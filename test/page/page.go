// Package page reads pages of the documentation, for tests that run what these
// show.
package page

import (
	"os"
	"strings"
	"testing"
)

// A Page is the Markdown of a page, or of a section of one.
type Page string

// Open reads a page.
func Open(tb testing.TB, file string) Page {
	tb.Helper()
	text, err := os.ReadFile(file)
	if err != nil {
		tb.Fatal(err)
	}
	return Page(text)
}

const fence = "```"

// Section returns what stands under a heading, with the sections below it.
func (p Page) Section(tb testing.TB, heading string) Page {
	tb.Helper()
	var section strings.Builder
	level, fenced := 0, false
	for line := range strings.Lines(string(p)) {
		fenced = fenced != strings.HasPrefix(line, fence)
		marks, title, ok := strings.Cut(line, " ")
		switch {
		case fenced || !ok || marks == "" || strings.Trim(marks, "#") != "": // no heading
		case level > 0 && len(marks) <= level:
			return Page(section.String())
		case level == 0 && strings.TrimSpace(title) == heading:
			level = len(marks)
			continue
		}
		if level > 0 {
			section.WriteString(line)
		}
	}
	if level == 0 {
		tb.Fatalf("the page has no section %q", heading)
	}
	return Page(section.String())
}

// Blocks returns the fenced blocks of a language, in order and at least one.
func (p Page) Blocks(tb testing.TB, language string) []string {
	tb.Helper()
	var blocks []string
	p.each(tb, func(lang, text string) {
		if lang == language {
			blocks = append(blocks, text)
		}
	})
	if len(blocks) == 0 {
		tb.Fatalf("the page has no block of %s", language)
	}
	return blocks
}

// Block returns the fenced block whose first line is this comment, without
// that line.
func (p Page) Block(tb testing.TB, comment string) string {
	tb.Helper()
	var found []string
	p.each(tb, func(_, text string) {
		if rest, ok := strings.CutPrefix(text, "# "+comment+"\n"); ok {
			found = append(found, rest)
		}
	})
	if len(found) != 1 {
		tb.Fatalf("the page has %d blocks that begin with %q, want one", len(found), "# "+comment)
	}
	return found[0]
}

// each calls f with each fenced block and its language.
func (p Page) each(tb testing.TB, f func(language, text string)) {
	tb.Helper()
	var language string
	var text strings.Builder
	fenced := false
	for line := range strings.Lines(string(p)) {
		rest, ok := strings.CutPrefix(line, fence)
		switch {
		case !ok && fenced:
			text.WriteString(line)
		case ok && fenced:
			f(language, text.String())
			fenced = false
		case ok:
			language, fenced = strings.TrimSpace(rest), true
			text.Reset()
		}
	}
	if fenced {
		tb.Fatalf("a block of %s does not end", language)
	}
}

// Change puts what is a test's own, as paths and ports, in the place of what a
// text shows. Each old one is replaced everywhere, in order, and has to be there.
func Change(tb testing.TB, text string, oldnew ...string) string {
	tb.Helper()
	for i := 0; i < len(oldnew); i += 2 {
		if !strings.Contains(text, oldnew[i]) {
			tb.Fatalf("no %q in:\n%s", oldnew[i], text)
		}
		text = strings.ReplaceAll(text, oldnew[i], oldnew[i+1])
	}
	return text
}
