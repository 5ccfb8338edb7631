// Package readme runs what the README shows.
package readme

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/deputy-id/deputy/test/binary"
	"github.com/deputy-id/deputy/test/need"
	"github.com/deputy-id/deputy/test/page"
	"github.com/deputy-id/deputy/test/process"
	"github.com/deputy-id/deputy/test/scratch"
)

// blocks returns the fenced blocks of a language, in order.
func blocks(t *testing.T, language string) []string {
	t.Helper()
	return page.Open(t, "../../README.md").Blocks(t, language)
}

func TestMain(m *testing.M) {
	code := m.Run()
	binary.Remove()
	os.Exit(code)
}

func TestConfigurationsCheck(t *testing.T) {
	deputy := binary.Deputy(t)
	all := blocks(t, "hcl")
	if len(all) < 4 {
		t.Fatalf("got %d configurations in the README, want at least 4", len(all))
	}
	for i, text := range all {
		file := scratch.Write(t, filepath.Join(t.TempDir(), fmt.Sprintf("readme-%d.hcl", i)), text)
		if _, err := process.Try(exec.Command(deputy, "conf", "check", file)); err != nil {
			t.Errorf("%v\nof\n%s", err, text)
		}
	}
}

// The lines under "By hand", as root, on file systems of their own where the
// daemon's default paths are empty.
func TestSixtySecondsByHand(t *testing.T) {
	need.Root(t, "the lines that use sudo")
	var lines string
	for _, b := range blocks(t, "sh") {
		if strings.Contains(b, "deputy run &") {
			lines = b
		}
	}
	if lines == "" {
		t.Fatal("the README does not start the daemon")
	}
	root := t.TempDir()
	if err := os.MkdirAll(filepath.Join(root, "bin"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(binary.Deputy(t), filepath.Join(root, "bin/deputy")); err != nil {
		t.Fatal(err)
	}
	// All of them at once, as they are pasted.
	lines = strings.Replace(lines, "make build\n", "", 1)
	before, after, _ := strings.Cut(lines, "sudo bin/deputy run &")
	_, after, _ = strings.Cut(after, "\n")
	script := `set -eu
mount --make-rprivate /
mount -t tmpfs tmpfs /run
mkdir -p /var/lib && mount -t tmpfs tmpfs /var/lib
sudo() { "$@"; }
` + before + `bin/deputy run 2>log & daemon=$!
trap 'kill $daemon; wait $daemon' EXIT
trap 'exit 1' TERM
` + after
	cmd := exec.Command("unshare", "--mount", "timeout", "60", "sh", "-c", script)
	cmd.Dir = root
	out, err := cmd.CombinedOutput()
	log, _ := os.ReadFile(filepath.Join(root, "log"))
	if err != nil {
		t.Fatalf("%v\n%s\nlog:\n%s", err, out, log)
	}
	for _, want := range []string{"spiffe://deputy.internal/agent/hello", "unix:uid:0"} {
		if !strings.Contains(string(out), want) {
			t.Errorf("got %q, want %s in it", out, want)
		}
	}
}

func TestTasksExist(t *testing.T) {
	makefile, err := os.ReadFile("../../Makefile")
	if err != nil {
		t.Fatal(err)
	}
	var seen int
	for _, b := range blocks(t, "sh") {
		for line := range strings.Lines(b) {
			task, ok := strings.CutPrefix(line, "make ")
			if !ok {
				continue
			}
			seen++
			if task = strings.Fields(task)[0]; !strings.Contains(string(makefile), "\n"+task+":") {
				t.Errorf("the README tells to make %s, which the Makefile does not know", task)
			}
		}
	}
	if seen == 0 {
		t.Error("the README names no task")
	}
}
