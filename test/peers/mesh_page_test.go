package peers

import (
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/deputy-id/deputy/test/page"
	"github.com/deputy-id/deputy/test/process"
	"github.com/deputy-id/deputy/test/scratch"
)

func meshPage(t *testing.T) page.Page {
	t.Helper()
	return page.Open(t, "../../docs/mesh.md")
}

// meshBlocks returns the blocks of a language in one section of docs/mesh.md.
func meshBlocks(t *testing.T, section, language string) []string {
	t.Helper()
	return meshPage(t).Section(t, section).Blocks(t, language)
}

// meshBlock returns the block of docs/mesh.md that begins with this comment.
func meshBlock(t *testing.T, comment string) string {
	t.Helper()
	return meshPage(t).Block(t, comment)
}

// place makes a copy of a program that other users may execute, beside the
// daemon.
func (d *host) place(t *testing.T, name, binary string) {
	t.Helper()
	scratch.Program(t, filepath.Join(d.Dir, "bin", name), binary)
}

// asRoot runs a command line of the page that starts with "sudo deputy", for
// the length of the test and with these replacements of old by new.
func (d *host) asRoot(t *testing.T, line string, replace ...string) *process.Process {
	t.Helper()
	words, ok := strings.CutPrefix(page.Change(t, line, replace...), "sudo deputy ")
	if !ok {
		t.Fatalf("the page's line does not start with sudo deputy:\n%s", line)
	}
	cmd := exec.Command("sh", "-c", `PATH="$1:$PATH" exec "$0" `+words, d.Binary, filepath.Join(d.Dir, "bin"))
	cmd.Env = d.Env()
	return process.Start(t, cmd)
}
