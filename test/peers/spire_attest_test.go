package peers

import (
	"bufio"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/deputy-id/deputy/test/wait"
)

// A box is a container of the test's, on an engine of its own.
type box struct {
	ID           string
	Digest       string
	ConfigDigest string `json:"config_digest"`
	Docker       []string
}

// startBox runs the test agent in a container that sees the directory.
func startBox(t *testing.T, dir string, env ...string) *box {
	t.Helper()
	bin := plugins(t)
	args := []string{filepath.Join(bin, "agent"), "-v", dir + ":" + dir}
	for _, e := range env {
		args = append(args, "-e", e)
	}
	cmd := exec.Command(filepath.Join(bin, "container"), append(args, "--", "sleep")...)
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		in.Close()
		if err := cmd.Wait(); err != nil {
			t.Errorf("end the container: %v", err)
		}
	})
	line, err := bufio.NewReader(out).ReadBytes('\n')
	if err != nil {
		t.Fatalf("start a container: %v", err)
	}
	b := new(box)
	if err := json.Unmarshal(line, b); err != nil {
		t.Fatal(err)
	}
	return b
}

// socket is the engine's.
func (b *box) socket() string {
	return strings.TrimPrefix(b.Docker[slices.Index(b.Docker, "--host")+1], "unix://")
}

// ids are the SPIFFE IDs that a process in the container gets.
func (b *box) ids() ([]string, error) {
	args := append(slices.Clone(b.Docker[1:]), "exec", b.ID, "/program", "x509")
	out, err := exec.Command(b.Docker[0], args...).CombinedOutput()
	if err != nil {
		return nil, fmt.Errorf("%w: %s", err, out)
	}
	return decodeIDs(out)
}

func decodeIDs(out []byte) (ids []string, err error) {
	var got struct {
		SVIDs []struct {
			ID string `json:"spiffe_id"`
		}
	}
	if err := json.Unmarshal(out, &got); err != nil {
		return nil, err
	}
	for _, s := range got.SVIDs {
		ids = append(ids, strings.TrimPrefix(s.ID, "spiffe://example.org"))
	}
	slices.Sort(ids)
	return ids, nil
}

// hostIDs are the SPIFFE IDs that a process outside of the container gets.
func (s *spire) hostIDs(t *testing.T) ([]string, error) {
	t.Helper()
	bin := plugins(t)
	cmd := exec.Command(filepath.Join(bin, "agent"), "x509")
	cmd.Env = append(os.Environ(), "SPIFFE_ENDPOINT_SOCKET=unix://"+s.workload)
	out, err := cmd.Output()
	if err != nil {
		return nil, err
	}
	return decodeIDs(out)
}

func TestStockAgentAttestsByDeputysPlugin(t *testing.T) {
	s := newSPIRE(t, changes{
		server: without(`CredentialComposer "deputy"`),
		agent:  func(text string) string { return strings.ReplaceAll(text, "/run/docker.sock", "DOCKER") },
	})
	b := startBox(t, filepath.Dir(s.workload), "SPIFFE_ENDPOINT_SOCKET=unix://"+s.workload)
	s.write(t, "agent.conf", strings.ReplaceAll(s.read(t, "agent.conf"), "DOCKER", b.socket()))
	s.startServer(t)
	s.entry(t, "/agent/by-digest", "deputy:image:digest:"+b.Digest)
	s.entry(t, "/agent/by-config", "deputy:image:config_digest:"+b.ConfigDigest, "deputy:container:id:"+b.ID)
	s.entry(t, "/agent/by-type", "image:digest:"+b.Digest)
	s.entry(t, "/agent/other-image", "deputy:image:digest:sha256:"+strings.Repeat("0", 64))
	s.entry(t, "/agent/on-host", "deputy:process:host:true", fmt.Sprintf("deputy:unix:uid:%d", os.Getuid()))
	s.entry(t, "/agent/by-spire", fmt.Sprintf("unix:uid:%d", os.Getuid()))
	s.startAgent(t)

	boxed := []string{"/agent/by-config", "/agent/by-digest", "/agent/by-spire", "/agent/by-type"}
	eventually(t, "a process in the container", b.ids, boxed)
	outside := func() ([]string, error) { return s.hostIDs(t) }
	eventually(t, "a process on the host", outside, []string{"/agent/by-spire", "/agent/on-host"})
	contains(t, s.agent.Log(), "Configured plugin")
	if strings.Contains(s.agent.Log(), "Plugin checksum not configured") {
		t.Error("a plugin runs without a checksum")
	}

	// SPIRE does not start a plugin again that has ended: its selectors are
	// missing, the log says so, and what others tell remains.
	plugins := children(t, s.agent.PID(), "deputy-attest")
	if len(plugins) != 2 {
		t.Fatalf("got %d processes of the plugin, want 2", len(plugins))
	}
	for _, pid := range plugins {
		if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
	}
	eventually(t, "a process in the container, without the plugins", b.ids, []string{"/agent/by-spire"})
	contains(t, s.agent.Log(), `workload attestor \"deputy\" failed`)
}

// eventually wants these IDs, once the agent has heard of all entries.
func eventually(t *testing.T, whose string, get func() ([]string, error), want []string) {
	t.Helper()
	var got []string
	var err error
	defer func() {
		if t.Failed() {
			t.Logf("%s got %q, %v; want %q", whose, got, err, want)
		}
	}()
	wait.Until(t, whose, func() bool {
		got, err = get()
		return err == nil && slices.Equal(got, want)
	})
}

// A plugin_data_file is SPIRE's to read: it does at SIGUSR1.
func TestStockAgentReconfiguresThePlugin(t *testing.T) {
	s := newSPIRE(t, changes{
		server: without(`CredentialComposer "deputy"`),
		agent: func(text string) string {
			before, rest, _ := strings.Cut(without(`WorkloadAttestor "image"`)(text), "    plugin_data {\n      attestor")
			_, rest, _ = strings.Cut(rest, "\n    }\n")
			return before + "    plugin_data_file = \"/etc/spire/attest.hcl\"\n" + rest
		},
	})
	s.write(t, "agent.conf", strings.ReplaceAll(s.read(t, "agent.conf"), "/etc/spire", s.dir))
	s.write(t, "attest.hcl", `type = "unix"`)
	s.startServer(t)
	s.entry(t, "/agent/of-one-type", fmt.Sprintf("deputy:uid:%d", os.Getuid()))
	s.entry(t, "/agent/of-all", fmt.Sprintf("deputy:unix:uid:%d", os.Getuid()))
	s.startAgent(t)
	ids := func() ([]string, error) { return s.hostIDs(t) }
	eventually(t, "with one type", ids, []string{"/agent/of-one-type"})

	reload := func(text string) {
		s.write(t, "attest.hcl", text)
		s.agent.Signal(t, syscall.SIGUSR1)
	}
	reload("\ntype = \"unics\"")
	s.agent.Says(t, "plugin_data:2:8: unknown type")
	eventually(t, "after a broken configuration", ids, []string{"/agent/of-one-type"})
	reload("digests = false")
	eventually(t, "with all types", ids, []string{"/agent/of-all"})
}

func TestStockAgentRefusesBrokenPluginData(t *testing.T) {
	s := newSPIRE(t, changes{
		server: without(`CredentialComposer "deputy"`),
		agent: func(text string) string {
			return strings.Replace(text, `type = "image"`, `typ = "image"`, 1)
		},
	})
	out := fail(t, s.agentBin, "run", "-config", s.path("agent.conf"), "-joinToken", "none")
	contains(t, out, `plugin_data:1:1: unknown key \"typ\" in plugin_data`)
}

func TestStockAgentRefusesAnotherBinary(t *testing.T) {
	s := newSPIRE(t, changes{
		server: without(`CredentialComposer "deputy"`),
		agent: func(text string) string {
			return strings.ReplaceAll(text, strings.Repeat("0", 64), strings.Repeat("1", 64))
		},
	})
	contains(t, fail(t, s.agentBin, "run", "-config", s.path("agent.conf"), "-joinToken", "none"), "checksums did not match")
}
