package engine_test

import (
	"os"
	"strings"
	"testing"

	"github.com/deputy-id/deputy/test/engine"
)

func TestMain(m *testing.M) { os.Exit(engine.Main(m)) }

func TestImageKeepsItsDigestThroughTheRegistry(t *testing.T) {
	e := engine.Start(t)
	name, digest := e.Publish(t, "deputy/agent", "1", engine.Image{Labels: map[string]string{"purpose": `a "quoted" $value`}})
	e.Forget(t, name)
	e.Docker(t, "pull", "--quiet", name)
	got := e.Docker(t, "image", "inspect", "--format", "{{range .RepoDigests}}{{.}} {{end}}", name)
	if want := strings.TrimSuffix(name, ":1") + "@" + digest; got != want {
		t.Errorf("got repository digests %q, want %q", got, want)
	}
	label := e.Docker(t, "image", "inspect", "--format", "{{index .Config.Labels \"purpose\"}}", name)
	if want := `a "quoted" $value`; label != want {
		t.Errorf("got label %q, want %q", label, want)
	}
}

func TestRunAndExecGiveLiveProcesses(t *testing.T) {
	e := engine.Start(t)
	image := e.Image(t, engine.Image{})
	c := e.Run(t, image, "sleep")
	second := c.Exec(t, "/program", "sleep")
	if second == c.PID || second <= 0 {
		t.Errorf("got PID %d of the second process, want one beside the init's %d", second, c.PID)
	}
	if in := c.Inspect(t); !in.State.Running || in.State.Pid != c.PID || in.Image != image {
		t.Errorf("got %+v, want image %s running as %d", in, image, c.PID)
	}
}
