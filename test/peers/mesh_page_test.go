package peers

import (
	"os"
	"strings"
	"testing"
)

// meshBlocks returns the blocks of a language in one section of docs/mesh.md.
func meshBlocks(t *testing.T, section, language string) []string {
	t.Helper()
	text, err := os.ReadFile("../../docs/mesh.md")
	if err != nil {
		t.Fatal(err)
	}
	_, rest, ok := strings.Cut(string(text), "\n## "+section+"\n")
	if !ok {
		t.Fatalf("docs/mesh.md has no section %s", section)
	}
	rest, _, _ = strings.Cut(rest, "\n## ")
	var blocks []string
	for _, part := range strings.Split(rest, "\n```"+language+"\n")[1:] {
		block, _, ok := strings.Cut(part, "\n```")
		if !ok {
			t.Fatalf("section %s: a block of %s does not end", section, language)
		}
		blocks = append(blocks, block+"\n")
	}
	return blocks
}
