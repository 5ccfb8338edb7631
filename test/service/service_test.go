// Package service runs the sample unit of the daemon under a real systemd.
package service

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/deputy-id/deputy/test/binary"
	"github.com/deputy-id/deputy/test/need"
	"github.com/deputy-id/deputy/test/process"
	"github.com/deputy-id/deputy/test/scratch"
	"github.com/deputy-id/deputy/test/systemd"
	"github.com/deputy-id/deputy/test/wait"
)

func TestMain(m *testing.M) {
	code := m.Run()
	binary.Remove()
	os.Exit(code)
}

const config = `trust_domain = "unit.example"

attestor "systemd" {}

entry "/agent/researcher" {
  selectors = ["cgroup:unit:researcher.service", "process:leader:true"]
}
entry "/web" {
  selectors = ["cgroup:unit:deputy-watch.service", "process:leader:true"]
  x509_ttl = "6s"
}
`

// unit is a sample with the paths of the test, and these lines more, and the
// file of its log.
func unit(t *testing.T, name, more string) (text, log string) {
	t.Helper()
	sample, err := os.ReadFile("../../conf/samples/" + name)
	if err != nil {
		t.Fatal(err)
	}
	log = systemd.Log(t)
	return strings.NewReplacer(
		"/usr/local/bin/deputy", binary.Deputy(t),
		"/etc/deputy/deputy.hcl", scratch.Write(t, filepath.Join(t.TempDir(), "deputy.hcl"), config),
		// The test's files are there.
		"PrivateTmp=yes", "PrivateTmp=no",
		"[Service]\n", "[Service]\nStandardError=append:"+log+"\n"+more,
	).Replace(string(sample)), log
}

func TestSystemdKnowsEveryLineOfTheSamples(t *testing.T) {
	analyze := need.Program(t, "systemd-analyze")
	dir := t.TempDir()
	names := []string{"deputy.service", "deputy-watch.service"}
	for _, name := range names {
		text, _ := unit(t, name, "")
		scratch.Write(t, filepath.Join(dir, name), text)
	}
	for _, name := range names {
		// A key that it does not know is a warning alone.
		if out, err := process.Try(exec.Command(analyze, "verify", filepath.Join(dir, name))); err != nil || out != "" {
			t.Errorf("%s: got %v: %s", name, err, out)
		}
	}
}

func TestTheSampleAttestsUnderSystemd(t *testing.T) {
	deputy := binary.Deputy(t)
	out := systemd.Log(t)
	oneshot := "[Service]\nType=oneshot\nStandardOutput=append:" + out + "\nStandardError=append:" + out + "\nExecStart="
	sample, _ := unit(t, "deputy.service", "")
	node := systemd.Start(t, systemd.Units{
		"deputy.service": sample,
		// It is the unit's main process, and asks; a socket that is its standard
		// input makes the daemon look at that.
		"researcher.socket":  "[Socket]\nListenStream=/run/researcher.sock\n",
		"researcher.service": strings.Replace(oneshot, "oneshot", "exec", 1) + deputy + " watch\nUser=nobody\nStandardInput=socket\n",
		"other.service":      oneshot + deputy + " fetch x509\nUser=nobody\nSuccessExitStatus=3\n",
		"admin.service":      oneshot + "/bin/sh -c '" + deputy + " attest $(systemctl show -P MainPID researcher.service)'\n",
	})
	for _, unit := range []string{"deputy", "researcher.socket", "researcher", "other", "admin"} {
		node.Run(t, "systemctl", "start", unit)
	}
	node.Run(t, "systemctl", "reload", "deputy")
	// What a container has mounted is a directory, not its name.
	public, err := os.Open(fmt.Sprintf("/proc/%d/root/run/deputy/public", node.PID))
	if err != nil {
		t.Fatal(err)
	}
	defer public.Close()
	node.Run(t, "systemctl", "restart", "deputy")
	if names, err := public.Readdirnames(-1); err != nil || len(names) != 1 {
		t.Errorf("got %q, %v in the directory of the socket after a restart, want the socket", names, err)
	}
	// The watch gets its next SVID from the restarted daemon.
	var said []byte
	wait.Until(t, "an update after the restart", func() bool {
		said, _ = os.ReadFile(out)
		return strings.Contains(string(said), "update 2")
	})
	for _, want := range []string{
		"spiffe://unit.example/agent/researcher", "no identity issued",
		"cgroup:unit:researcher.service", "process:leader:true", "process:host:true", "systemd:id:researcher.service", "unix:path:" + deputy, "unix:user:nobody",
	} {
		if !strings.Contains(string(said), want) {
			t.Errorf("got %s\nwant %q in it", said, want)
		}
	}
}

// A program starts when its files are there, and hears of the next ones.
func TestTheSampleWatchKeepsTheFilesOfAUnit(t *testing.T) {
	out := systemd.Log(t)
	sample, _ := unit(t, "deputy.service", "")
	watch, log := unit(t, "deputy-watch.service", "")
	node := systemd.Start(t, systemd.Units{
		"deputy.service":       sample,
		"deputy-watch.service": watch,
		"stranger.service":     strings.NewReplacer("/run/web", "/run/stranger", "RuntimeDirectory=web", "RuntimeDirectory=stranger").Replace(watch),
		"nginx.service": "[Unit]\nRequires=deputy-watch.service\n[Service]\nStandardOutput=append:" + out + "\n" +
			`ExecStart=/bin/sh -c 'trap "echo again $(ls -m /run/web)" HUP; ls -m /run/web; echo $$$$ > /run/nginx.pid; while :; do sleep 0.05 & wait; done'` + "\n",
	})
	node.Run(t, "systemctl", "start", "nginx") // and with it the others
	const files = "bundle.0.pem, svid.0.key, svid.0.pem\n"
	wait.UntilNil(t, func() error {
		if said, _ := os.ReadFile(out); !strings.HasPrefix(string(said), files+"again "+files) {
			return fmt.Errorf("got %q, want the files at the start, and again after a signal", said)
		}
		return nil
	})
	// Another unit of the same program has no identity.
	if out, err := process.Try(node.Command("systemctl", "start", "stranger")); err == nil {
		t.Errorf("got a start of the stranger, want none\n%s", out)
	}
	if said, err := os.ReadFile(log); err != nil || !strings.Contains(string(said), "no identity issued") {
		t.Errorf("got %q, %v, want it to have no identity", said, err)
	}
	node.Run(t, "systemctl", "stop", "stranger")
	node.Run(t, "systemctl", "stop", "deputy-watch") // and nginx, which requires it
	if _, err := os.Stat(fmt.Sprintf("/proc/%d/root/run/web/svid.0.pem", node.PID)); err != nil {
		t.Errorf("the files are gone with the unit: %v", err)
	}
}

// A filter that would leave it blind stops it, with the reason.
func TestRefusesToStartWithoutOpenat2(t *testing.T) {
	text, log := unit(t, "deputy.service", "RestrictSUIDSGID=yes\n")
	node := systemd.Start(t, systemd.Units{"deputy.service": strings.Replace(text, "Restart=always", "Restart=no", 1)})
	if out, err := process.Try(node.Command("systemctl", "start", "deputy")); err == nil {
		t.Errorf("got a start, want none\n%s", out)
	}
	said, err := os.ReadFile(log)
	if want := "openat2"; err != nil || !strings.Contains(string(said), want) {
		t.Errorf("got %q, %v, want %s in it", said, err, want)
	}
}
