package conf

import (
	"errors"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestParseAttest(t *testing.T) {
	got, err := ParseAttest(`# as SPIRE prints it
type = "image"

allow_traced = true
digests      = false
on_unknown   = "deny"

attestor "docker" {
  socket = "/run/podman.sock"
  env    = ["AGENT"]
}

attestor "systemd" {}`)
	if err != nil {
		t.Fatal(err)
	}
	if got.Type.Value != "image" || !got.AllowTraced.Value || got.Digests.Value || got.OnUnknown.Value != Deny {
		t.Errorf("got %+v, want what the text says", got)
	}
	if got.Systemd == nil || got.Docker == nil || got.Docker.Socket.Value != "/run/podman.sock" ||
		len(got.Docker.Env) != 1 || got.Docker.Env[0].Value != "AGENT" {
		t.Errorf("got %+v and %+v, want both attestors", got.Docker, got.Systemd)
	}
}

func TestParseAttestDefaults(t *testing.T) {
	got, err := ParseAttest("")
	if err != nil {
		t.Fatal(err)
	}
	if got.Type.Given() || got.AllowTraced.Value || !got.Digests.Value || got.OnUnknown.Value != Omit || got.Docker != nil || got.Systemd != nil {
		t.Errorf("got %+v, want the defaults", got)
	}
}

func TestParseAttestReportsEveryProblemWithItsPlace(t *testing.T) {
	for _, c := range []struct{ name, text, want string }{
		{"unknown key", "typ = \"image\"", `plugin_data:1:1: unknown key "typ"`},
		{"wrong type", "\ntype = 7", "plugin_data:2:8: this is a number"},
		{"unknown choice", `on_unknown = "no"`, `plugin_data:1:14: unknown on_unknown "no"`},
		{"unknown attestor", "attestor \"dokcer\" {\n}", `plugin_data:1:10: unknown attestor "dokcer"`},
		{"an attestor twice", "attestor \"docker\" {}\nattestor \"docker\" {}", "plugin_data:2:1: attestor docker is there already"},
		{"a relative socket", "attestor \"docker\" {\n  socket = \"docker.sock\"\n}", "plugin_data:2:12: socket \"docker.sock\" is not an absolute path"},
		{"a variable", "type = \"${HOME}\"", "plugin_data:1:9: a string has no variables"},
		{"a block of the daemon's", "entry \"/x\" {\n}", `plugin_data:1:1: unknown block "entry"`},
		{"an object", "attestor = {}", "plugin_data:1:1: attestor is a block"},
		{"too much", strings.Repeat("#", maxFile+1), "plugin_data:1:1: plugin_data is larger"},
	} {
		t.Run(c.name, func(t *testing.T) {
			got, err := ParseAttest(c.text)
			if _, ok := errors.AsType[Problems](err); !ok || !strings.HasPrefix(err.Error(), c.want) {
				t.Errorf("got %v, want %s…", err, c.want)
			}
			if got != nil {
				t.Errorf("got %+v beside the error, want nothing", got)
			}
		})
	}
	_, err := ParseAttest("a = 1\nb = 2")
	if diff := cmp.Diff(2, strings.Count(err.Error(), "plugin_data:")); diff != "" {
		t.Errorf("problems (-want +got):\n%s", diff)
	}
}

func FuzzParseAttest(f *testing.F) {
	f.Add("")
	f.Add("type = \"image\"\nattestor \"docker\" {\n  env = [\"A\"]\n}\nattestor \"systemd\" {}")
	f.Add("digests = false\non_unknown = \"deny\"")
	f.Fuzz(func(t *testing.T, text string) {
		got, err := ParseAttest(text)
		problems, ok := errors.AsType[Problems](err)
		switch {
		case err == nil && got == nil:
			t.Error("got neither a configuration nor an error")
		case err != nil && (!ok || len(problems) == 0 || got != nil):
			t.Errorf("got %v, %v, want problems alone", got, err)
		}
	})
}
