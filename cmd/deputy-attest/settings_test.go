package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/deputy-id/deputy/plugins/attest"
)

func TestDecode(t *testing.T) {
	for _, c := range []struct {
		name, text string
		want       attest.Settings
	}{
		{"nothing", "", attest.Settings{}},
		{"everything", `
type = "docker"
digests = false
allow_traced = true
on_unknown = "deny"
attestor "docker" {
  socket = "/run/d.sock"
  env = ["A", "B"]
}
attestor "systemd" {}
`, attest.Settings{
			Type: "docker", NoDigests: true, AllowTraced: true, DenyUnknown: true,
			Docker: &attest.Docker{Socket: "/run/d.sock", Env: []string{"A", "B"}}, Systemd: true,
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			got, err := decode(c.text)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(c.want, got); diff != "" {
				t.Errorf("settings (-want +got):\n%s", diff)
			}
		})
	}
}

func TestDecodeRefusesWithThePlace(t *testing.T) {
	for _, c := range []struct{ text, want string }{
		{"digests = \"no\"", `plugin_data:1:11: this is a string; true or false belongs here`},
		{"\n  type = \"images\"", `plugin_data:2:10: unknown type "images" of selectors; there are cgroup, container, docker, image, process, systemd, unix`},
		{"type = \"image\"\nattestor \"systemd\" {}", `plugin_data:1:8: selectors of the type image come from the attestor docker, which is not among those listed`},
	} {
		if _, err := decode(c.text); err == nil || err.Error() != c.want {
			t.Errorf("decode %q: got %v, want %s", c.text, err, c.want)
		}
	}
}

// A missing socket at the time of the configuration is no reason to refuse it.
func TestDecodeDoesNotLookAtSockets(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "d.sock")
	if _, err := os.Stat(socket); err == nil {
		t.Fatal("there is a socket")
	}
	if _, err := decode("attestor \"docker\" {\n  socket = \"" + socket + "\"\n}"); err != nil {
		t.Error(err)
	}
}

// What the documentation shows is read as it stands.
func TestDecodeReadsTheDocumentation(t *testing.T) {
	text, err := os.ReadFile("../../docs/spire-plugins.md")
	if err != nil {
		t.Fatal(err)
	}
	_, block, ok := strings.Cut(string(text), "```hcl\n# plugin_data of deputy-attest\n")
	block, _, ok2 := strings.Cut(block, "```")
	if !ok || !ok2 {
		t.Fatal("the documentation has no plugin_data of deputy-attest")
	}
	got, err := decode(block)
	if err != nil {
		t.Fatal(err)
	}
	if got.Type != "image" || got.Docker == nil || !got.Systemd || got.NoDigests || got.AllowTraced || got.DenyUnknown {
		t.Errorf("got %+v, want what the text says", got)
	}
}
