package peers

import (
	"os"
	"path/filepath"
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

// reachable lets other users than ours in to the daemon's public socket, as it
// is where the daemon makes the directory in /run.
func (d *daemon) reachable(t *testing.T) {
	t.Helper()
	if err := os.Chmod(d.dir, 0o755); err != nil {
		t.Fatal(err)
	}
}

// place makes a copy of a program that other users may execute, beside the
// daemon, and returns the directory.
func (d *daemon) place(t *testing.T, name, binary string) string {
	t.Helper()
	dir := filepath.Join(d.dir, "bin")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	content, err := os.ReadFile(binary)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, name), content, 0o755); err != nil {
		t.Fatal(err)
	}
	return dir
}

// asRoot runs a command line of the page that starts with "sudo deputy", for
// the length of the test and with these replacements of old by new.
func (d *daemon) asRoot(t *testing.T, log, line string, replace ...string) *running {
	t.Helper()
	for i := 0; i < len(replace); i += 2 {
		if !strings.Contains(line, replace[i]) {
			t.Fatalf("the page does not say %q any more:\n%s", replace[i], line)
		}
	}
	words, ok := strings.CutPrefix(strings.NewReplacer(replace...).Replace(line), "sudo deputy ")
	if !ok {
		t.Fatalf("the page's line does not start with sudo deputy:\n%s", line)
	}
	script := `PATH="$1:$PATH" SPIFFE_ENDPOINT_SOCKET="unix://$2" DEPUTY_ADMIN_SOCKET="$3" exec "$0" ` + words
	return launch(t, filepath.Join(d.dir, log), "sh", "-c", script, d.binary, filepath.Join(d.dir, "bin"), d.workload, d.admin)
}

// needRoot ends a test that other users cannot run.
func needRoot(t *testing.T) {
	t.Helper()
	if os.Getuid() == 0 {
		return
	}
	if os.Getenv("CI") != "" {
		t.Fatal("the page's lines use sudo: they need root")
	}
	t.Skip("SKIPPED: the page's lines use sudo: they need root")
}
