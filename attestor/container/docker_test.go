package container_test

import (
	"context"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/deputy-id/deputy/attestor"
	"github.com/deputy-id/deputy/attestor/container"
	"github.com/deputy-id/deputy/attestor/peer"
	"github.com/deputy-id/deputy/test/engine"
)

func TestMain(m *testing.M) { os.Exit(engine.Main(m)) }

// subject is an attestor and what it attests through.
type subject struct {
	*container.Docker
	table *peer.Table
}

func attestorOf(t *testing.T, socket string, env ...string) subject {
	t.Helper()
	table, _, err := peer.NewTable()
	if err != nil {
		t.Fatal(err)
	}
	d, err := container.NewDocker(container.Options{Socket: socket, Env: env, Table: table})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := d.Close(); err != nil {
			t.Error(err)
		}
		table.Close()
	})
	return subject{d, table}
}

func (s subject) open(t *testing.T, pid int) *peer.Process {
	t.Helper()
	p, err := s.table.Open(int32(pid))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.Close() })
	return p
}

// attest returns the selectors of a process in sorted text.
func (s subject) attest(t *testing.T, pid int) []string {
	t.Helper()
	out, err := s.Attest(t.Context(), s.open(t, pid))
	if err != nil {
		t.Fatalf("attest %d: %v", pid, err)
	}
	return texts(out)
}

func texts(selectors []attestor.Selector) []string {
	var out []string
	for _, s := range selectors {
		out = append(out, s.String())
	}
	slices.Sort(out)
	return out
}

func only(selectors []string, prefixes ...string) []string {
	return slices.DeleteFunc(slices.Clone(selectors), func(s string) bool {
		return !slices.ContainsFunc(prefixes, func(p string) bool { return strings.HasPrefix(s, p) })
	})
}

func want(t *testing.T, got []string, want ...string) {
	t.Helper()
	got = slices.Sorted(slices.Values(got))
	slices.Sort(want)
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("selectors differ (-want +got):\n%s", diff)
	}
}

func TestPulledImage(t *testing.T) {
	e := engine.Start(t)
	name, digest := e.Publish(t, "agents/crawler", "1", engine.Image{
		Labels:  map[string]string{"team": "search"},
		Env:     map[string]string{"STAGE": "live", "SECRET": "s3cret"},
		Content: t.Name(),
	})
	e.Forget(t, name)
	e.Docker(t, "pull", "--quiet", name)
	c := e.Run(t, "--name", "crawler", "--label", "line=two\nthree", "--label", "long="+strings.Repeat("x", 9000), name, "sleep")
	id := c.Inspect(t).Image
	repository := strings.TrimSuffix(name, ":1")

	want(t, attestorOf(t, e.Socket(), "STAGE").attest(t, c.PID),
		"container:id:"+c.ID,
		"container:name:crawler",
		"container:path:/program",
		"container:runtime:docker",
		"docker:env:STAGE=live",
		"docker:image_config_digest:"+id,
		"docker:image_id:"+name,
		"docker:label:team:search",
		"image:config_digest:"+id,
		"image:digest:"+digest,
		"image:reference:"+repository+"@"+digest,
		"image:repository:"+repository,
		"process:leader:true",
	)
}

func TestImageThatNoRegistryKnowsHasItsConfigurationDigestAlone(t *testing.T) {
	e := engine.Start(t)
	id := e.Image(t, engine.Image{Content: t.Name()})
	c := e.Run(t, id, "sleep")
	want(t, only(attestorOf(t, e.Socket()).attest(t, c.PID), "image:"), "image:config_digest:"+id)
}

func TestMovedTagChangesNothing(t *testing.T) {
	e := engine.Start(t)
	name, old := e.Publish(t, "agents/moved", "1", engine.Image{Content: "old"})
	c := e.Run(t, name, "sleep")
	before := attestorOf(t, e.Socket()).attest(t, c.PID)
	_, moved := e.Publish(t, "agents/moved", "1", engine.Image{Content: "new"})
	if moved == old {
		t.Fatal("two contents have one digest")
	}
	after := attestorOf(t, e.Socket()).attest(t, c.PID) // a new one, that has kept nothing
	want(t, after, before...)
	want(t, only(after, "image:digest:"), "image:digest:"+old)
}

func TestImageInTwoRepositoriesHasBoth(t *testing.T) {
	e := engine.Start(t)
	name, digest := e.Publish(t, "agents/here", "1", engine.Image{Content: t.Name()})
	other := e.Registry(t).Address() + "/agents/there"
	e.Docker(t, "tag", name, other+":1")
	e.Docker(t, "push", "--quiet", other+":1")
	c := e.Run(t, name, "sleep")
	want(t, only(attestorOf(t, e.Socket()).attest(t, c.PID), "image:digest:", "image:repository:"),
		"image:digest:"+digest, "image:repository:"+strings.TrimSuffix(name, ":1"), "image:repository:"+other)
}

func TestSecondProcessOfAContainerIsNoLeader(t *testing.T) {
	e := engine.Start(t)
	c := e.Run(t, e.Image(t, engine.Image{}), "sleep")
	s := attestorOf(t, e.Socket())
	first := s.attest(t, c.PID)
	second := s.attest(t, c.Exec(t, "/program", "sleep"))
	want(t, append(second, "process:leader:true"), first...)
}

func TestContainerInTheHostsPIDNamespace(t *testing.T) {
	e := engine.Start(t)
	c := e.Run(t, "--pid=host", e.Image(t, engine.Image{}), "sleep")
	s := attestorOf(t, e.Socket())
	want(t, only(s.attest(t, c.PID), "container:id:", "container:path:", "process:"),
		"container:id:"+c.ID, "container:path:/program", "process:leader:true")
}

func TestUserNamespaceInAContainerLosesPathAndLeader(t *testing.T) {
	e := engine.Start(t)
	c := e.Run(t, "--security-opt", "seccomp=unconfined", e.Image(t, engine.Image{}), "unshare")
	var inner int
	await(t, "a process in a user namespace of its own", func() bool {
		for _, pid := range c.PIDs(t) {
			if pid != c.PID {
				inner = pid
			}
		}
		exe, _ := os.Readlink("/proc/" + strconv.Itoa(inner) + "/exe")
		args, _ := os.ReadFile("/proc/" + strconv.Itoa(inner) + "/cmdline")
		return exe == "/program" && strings.Contains(string(args), "sleep")
	})
	s := attestorOf(t, e.Socket())
	want(t, only(s.attest(t, inner), "container:id:", "container:path:", "process:"), "container:id:"+c.ID)
	want(t, only(s.attest(t, c.PID), "container:path:"), "container:path:/program")
}

func TestProcessOutsideOfContainersHasNoSelectors(t *testing.T) {
	e := engine.Start(t)
	want(t, attestorOf(t, e.Socket()).attest(t, os.Getpid()))
}

func TestContainerThatStops(t *testing.T) {
	e := engine.Start(t)
	c := e.Run(t, e.Image(t, engine.Image{}), "sleep")
	s := attestorOf(t, e.Socket())
	p := s.open(t, c.PID)
	if _, err := s.Attest(t.Context(), p); err != nil {
		t.Fatal(err)
	}
	e.Docker(t, "stop", c.ID)
	select {
	case <-p.Done():
	case <-time.After(10 * time.Second):
		t.Fatal("the process is not done")
	}
	if out, err := s.Attest(t.Context(), p); err == nil || len(out) > 0 {
		t.Errorf("got %v, %v of a process that ended, want an error alone", texts(out), err)
	}
}

func TestRestartedContainerIsAnotherRun(t *testing.T) {
	e := engine.Start(t)
	c := e.Run(t, "--name", "before", e.Image(t, engine.Image{}), "sleep")
	s := attestorOf(t, e.Socket())
	s.attest(t, c.PID)
	e.Docker(t, "stop", c.ID)
	e.Docker(t, "rename", "before", "after")
	e.Docker(t, "start", c.ID)
	pid := c.Inspect(t).State.Pid
	want(t, only(s.attest(t, pid), "container:name:", "process:"), "container:name:after", "process:leader:true")
}

func TestEngineThatStandsStillIsUnknownOnlyForWhoIsNew(t *testing.T) {
	e := engine.Start(t)
	image := e.Image(t, engine.Image{})
	old, fresh := e.Run(t, image, "sleep"), e.Run(t, image, "sleep")
	s := attestorOf(t, e.Socket())
	s.attest(t, old.PID)
	defer e.Freeze(t)()
	want(t, only(s.attest(t, old.PID), "container:id:"), "container:id:"+old.ID)
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	if out, err := s.Attest(ctx, s.open(t, fresh.PID)); err == nil {
		t.Errorf("got %v, want an error", texts(out))
	}
}

// await returns when ready says so.
func await(t *testing.T, what string, ready func() bool) {
	t.Helper()
	deadline := time.After(10 * time.Second)
	for tick := time.Tick(10 * time.Millisecond); !ready(); {
		select {
		case <-tick:
		case <-deadline:
			t.Fatalf("there is not %s", what)
		}
	}
}
