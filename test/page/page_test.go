package page

import (
	"slices"
	"strings"
	"testing"
)

const text = `# Page
## One
~~~sh
# title
first
~~~
* a list
  goes on
### Below one
~~~conf
# One
# title that is longer
~~~
  indented
~~~sh
## Two
~~~
## Two
~~~sh
other
~~~
`

var page = Page(strings.ReplaceAll(text, "~~~", "```"))

func TestBlocksOfASection(t *testing.T) {
	for heading, want := range map[string][]string{
		"Page":      {"# title\nfirst\n", "## Two\n", "other\n"},
		"One":       {"# title\nfirst\n", "## Two\n"}, // a comment is no heading
		"Below one": {"## Two\n"},
		"Two":       {"other\n"},
	} {
		if got := page.Section(t, heading).Blocks(t, "sh"); !slices.Equal(got, want) {
			t.Errorf("%s: got %q, want %q", heading, got, want)
		}
	}
}

func TestBlockByItsComment(t *testing.T) {
	if got := page.Block(t, "title"); got != "first\n" {
		t.Errorf("got %q, want the first block without its comment", got)
	}
}

func TestChangeIsInOrder(t *testing.T) {
	if got := Change(t, "a b a", "a", "bb", "b", "c"); got != "cc c cc" {
		t.Errorf("got %q", got)
	}
}
