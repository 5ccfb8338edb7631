package hardship

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"testing/fstest"

	"github.com/deputy-id/deputy/test/engine"
	"github.com/deputy-id/deputy/test/systemd"
)

// The README's three ways to give an identity to an agent whose executable is
// but an interpreter, each beside a second process of the same kind that is
// not the agent, and gets none.

// script puts the agent where every user can read it, and returns Python and
// its path.
func (p *place) script(t *testing.T) (python, path string) {
	t.Helper()
	// The system's own: another may stand where only its user can go.
	python = "/usr/bin/python3"
	if _, err := os.Stat(python); err != nil {
		if os.Getenv("CI") != "" {
			t.Fatal(err)
		}
		t.Skipf("SKIPPED: no agent written in Python: %v", err)
	}
	text, err := os.ReadFile("testdata/agent.py")
	if err != nil {
		t.Fatal(err)
	}
	path = filepath.Join(p.dir, "agent.py")
	if err := os.WriteFile(path, text, 0o644); err != nil {
		t.Fatal(err)
	}
	return python, path
}

// agentAlone is what that script says when it has the identity, and its child none.
const agentAlone = "agent spiffe://hard.example/agent/researcher\nchild no identity\n"

func TestPythonAgentByItsUnit(t *testing.T) {
	needRoot(t)
	t.Parallel()
	p := newPlace(t, "entry \"/agent/researcher\" {\n  selectors = [\"cgroup:unit:researcher.service\", \"process:leader:true\"]\n}\n")
	python, script := p.script(t)
	out, log := filepath.Join(p.dir, "out"), filepath.Join(p.dir, "log")
	unit := func(lines string) *fstest.MapFile {
		return &fstest.MapFile{Data: []byte("[Unit]\nDefaultDependencies=no\n[Service]\n" + lines)}
	}
	node := systemd.Start(t, fstest.MapFS{
		"deputy.service": unit(fmt.Sprintf("Type=notify\nExecStart=%s run --config %s\nStandardError=append:%s\n", p.deputy, p.config, log)),
		// As most are written: the interpreter, a script, and a user.
		"researcher.service": unit(fmt.Sprintf("ExecStart=%s %s %s\nUser=nobody\nStandardOutput=append:%s\nStandardError=inherit\n", python, script, p.workload, out)),
	})
	t.Cleanup(func() {
		if text, _ := os.ReadFile(log); t.Failed() {
			t.Logf("log of the daemon:\n%s", text)
		}
	})
	for _, name := range []string{"deputy", "researcher"} {
		if said, err := node.Command("systemctl", "start", name).CombinedOutput(); err != nil {
			t.Fatalf("start %s: %v\n%s", name, err, said)
		}
	}
	eventually(t, func() error {
		if said, _ := os.ReadFile(out); string(said) != agentAlone {
			return fmt.Errorf("got %q, want %q", said, agentAlone)
		}
		return nil
	})
}

func TestPythonAgentByDeputyExec(t *testing.T) {
	needRoot(t)
	t.Parallel()
	d := newPlace(t, others).start(t)
	python, script := d.script(t)
	cmd := d.cli("exec", "--name", "researcher", "--user", "nobody", "--entry", "/agent/researcher", "--", python, script, d.workload)
	var said transcript
	cmd.Stdout, cmd.Stderr = &said, &said
	input, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	eventually(t, said.has(agentAlone))
	input.Close()
	if err := cmd.Wait(); err != nil {
		t.Errorf("deputy exec: %v\n%s", err, &said)
	}
	// The name and its entry end with it.
	eventually(t, func() error {
		if out := d.run(t, "entry", "list"); strings.Contains(out, "/agent/researcher") {
			return fmt.Errorf("got %q, want the entry gone", out)
		}
		return nil
	})
	// The user alone has nothing.
	out, err := user(exec.Command(python, script, d.workload, "stranger"), 65534).CombinedOutput()
	if err != nil || string(out) != "stranger no identity\n" {
		t.Errorf("got %q, %v, want no identity", out, err)
	}
}

func TestAgentByTheDigestOfItsImage(t *testing.T) {
	needRoot(t)
	t.Parallel()
	e := engine.Start(t)
	name, digest := e.Publish(t, "hardship/crawler", "1", engine.Image{Content: "crawler"})
	p := newPlace(t, fmt.Sprintf("attestor \"docker\" { socket = %q }\nentry \"/agent/crawler\" {\n  selectors = [\"image:digest:%s\", \"process:leader:true\"]\n}\n", e.Socket(), digest))
	p.start(t)
	public := filepath.Dir(p.workload)
	run := func(image string) *engine.Container {
		return e.Run(t, "-v", public+":"+public+":ro", "-e", "SPIFFE_ENDPOINT_SOCKET=unix://"+p.workload, image, "watch")
	}
	c := run(name)
	eventually(t, func() error {
		if said := c.Logs(t); !strings.Contains(said, "spiffe://hard.example/agent/crawler") {
			return fmt.Errorf("got %q, want its identity", said)
		}
		return nil
	})
	// What else is executed in it is no leader.
	second, err := e.Command("exec", c.ID, "/program", "x509").CombinedOutput()
	if err == nil || !strings.Contains(string(second), "PermissionDenied") {
		t.Errorf("docker exec: got %q, %v, want PermissionDenied", second, err)
	}
	// The tag moves to another image: what runs stays what it is, and the new
	// one is not it.
	e.Publish(t, "hardship/crawler", "1", engine.Image{Content: "another"})
	if out := p.run(t, "attest", fmt.Sprint(c.PID)); !strings.Contains(out, "image:digest:"+digest) {
		t.Errorf("got %q, want %s after the tag moved", out, digest)
	}
	moved := run(name)
	eventually(t, func() error {
		if out, err := e.Command("logs", moved.ID).CombinedOutput(); err != nil || !strings.Contains(string(out), "PermissionDenied") {
			return fmt.Errorf("another image: got %q, %v, want PermissionDenied", out, err)
		}
		return nil
	})
}
