package hardship

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/deputy-id/deputy/test/engine"
	"github.com/deputy-id/deputy/test/need"
	"github.com/deputy-id/deputy/test/process"
	"github.com/deputy-id/deputy/test/scratch"
	"github.com/deputy-id/deputy/test/systemd"
	"github.com/deputy-id/deputy/test/wait"
)

// The README's three ways to give an identity to an agent whose executable is
// but an interpreter, each beside a second process of the same kind that is
// not the agent, and gets none.

// script puts the agent where every user can read it, and returns Python and
// its path.
func (d *host) script(t *testing.T) (python, path string) {
	t.Helper()
	// The system's own: another may stand where only its user can go.
	return need.Program(t, "/usr/bin/python3"), scratch.Program(t, filepath.Join(d.Dir, "agent.py"), "testdata/agent.py")
}

// agentAlone is what that script says when it has the identity, and its child none.
const agentAlone = "agent spiffe://hard.example/agent/researcher\nchild no identity\n"

func TestPythonAgentByItsUnit(t *testing.T) {
	need.Root(t, "another user")
	t.Parallel()
	d := newHost(t, "entry \"/agent/researcher\" {\n  selectors = [\"cgroup:unit:researcher.service\", \"process:leader:true\"]\n}\n")
	python, script := d.script(t)
	out := systemd.Log(t)
	node := systemd.Start(t, systemd.Units{
		"deputy.service": fmt.Sprintf("[Service]\nType=notify\nExecStart=%s\nStandardError=append:%s\n", strings.Join(d.Args(), " "), systemd.Log(t)),
		// As most are written: the interpreter, a script, and a user.
		"researcher.service": fmt.Sprintf("[Service]\nExecStart=%s %s %s\nUser=nobody\nStandardOutput=append:%s\nStandardError=inherit\n", python, script, d.Workload, out),
	})
	for _, name := range []string{"deputy", "researcher"} {
		node.Run(t, "systemctl", "start", name)
	}
	wait.UntilNil(t, func() error {
		if said, _ := os.ReadFile(out); string(said) != agentAlone {
			return fmt.Errorf("got %q, want %q", said, agentAlone)
		}
		return nil
	})
}

func TestPythonAgentByDeputyExec(t *testing.T) {
	need.Root(t, "another user")
	t.Parallel()
	d := start(t, others)
	python, script := d.script(t)
	cmd := d.Command("exec", "--name", "researcher", "--user", "nobody", "--entry", "/agent/researcher", "--", python, script, d.Workload)
	input, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	agent := process.Start(t, cmd)
	agent.Says(t, agentAlone)
	input.Close()
	if err := agent.Wait(t); err != nil {
		t.Errorf("deputy exec: %v", err)
	}
	// The name and its entry end with it.
	wait.UntilNil(t, func() error {
		if out := d.Run(t, "entry", "list"); strings.Contains(out, "/agent/researcher") {
			return fmt.Errorf("got %q, want the entry gone", out)
		}
		return nil
	})
	// The user alone has nothing.
	out, err := process.As(65534, exec.Command(python, script, d.Workload, "stranger")).CombinedOutput()
	if err != nil || string(out) != "stranger no identity\n" {
		t.Errorf("got %q, %v, want no identity", out, err)
	}
}

func TestAgentByTheDigestOfItsImage(t *testing.T) {
	need.Root(t, "another user")
	t.Parallel()
	e := engine.Start(t)
	name, digest := e.Publish(t, "hardship/crawler", "1", engine.Image{Content: "crawler"})
	d := start(t, fmt.Sprintf("attestor \"docker\" { socket = %q }\nentry \"/agent/crawler\" {\n  selectors = [\"image:digest:%s\", \"process:leader:true\"]\n}\n", e.Socket(), digest))
	public := filepath.Dir(d.Workload)
	run := func(image string) *engine.Container {
		return e.Run(t, "-v", public+":"+public+":ro", "-e", "SPIFFE_ENDPOINT_SOCKET=unix://"+d.Workload, image, "watch")
	}
	c := run(name)
	wait.UntilNil(t, func() error {
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
	if out := d.Run(t, "attest", fmt.Sprint(c.PID)); !strings.Contains(out, "image:digest:"+digest) {
		t.Errorf("got %q, want %s after the tag moved", out, digest)
	}
	moved := run(name)
	wait.UntilNil(t, func() error {
		if out, err := e.Command("logs", moved.ID).CombinedOutput(); err != nil || !strings.Contains(string(out), "PermissionDenied") {
			return fmt.Errorf("another image: got %q, %v, want PermissionDenied", out, err)
		}
		return nil
	})
}
