// Package service runs the sample unit of the daemon under a real systemd.
package service

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"testing/fstest"
	"time"

	"github.com/deputy-id/deputy/test/binary"
	"github.com/deputy-id/deputy/test/systemd"
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

// unit is a sample with the paths of the test, and these lines more.
func unit(t *testing.T, name, more string) string {
	t.Helper()
	sample, err := os.ReadFile("../../conf/samples/" + name)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "deputy.hcl"), []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	text := strings.NewReplacer(
		"/usr/local/bin/deputy", binary.Deputy(t),
		"/etc/deputy/deputy.hcl", filepath.Join(dir, "deputy.hcl"),
		// The test's files are there.
		"PrivateTmp=yes", "PrivateTmp=no",
		"[Unit]\n", "[Unit]\nDefaultDependencies=no\n",
		"[Service]\n", "[Service]\nStandardError=append:"+filepath.Join(dir, "log")+"\n"+more,
	).Replace(string(sample))
	t.Cleanup(func() {
		if log, err := os.ReadFile(filepath.Join(dir, "log")); err == nil && t.Failed() {
			t.Logf("log of %s:\n%s", name, log)
		}
	})
	return text
}

func file(text string) *fstest.MapFile { return &fstest.MapFile{Data: []byte(text)} }

func TestSystemdKnowsEveryLineOfTheSamples(t *testing.T) {
	analyze, err := exec.LookPath("systemd-analyze")
	if err != nil {
		if os.Getenv("CI") != "" {
			t.Fatal(err)
		}
		t.Skipf("LOUD: the sample unit is not verified: %v", err)
	}
	dir := t.TempDir()
	for _, name := range []string{"deputy.service", "deputy-watch.service"} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(unit(t, name, "")), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	for _, name := range []string{"deputy.service", "deputy-watch.service"} {
		// A key that it does not know is a warning alone.
		if out, err := exec.Command(analyze, "verify", filepath.Join(dir, name)).CombinedOutput(); err != nil || len(out) != 0 {
			t.Errorf("%s: got %v: %s", name, err, out)
		}
	}
}

func TestTheSampleAttestsUnderSystemd(t *testing.T) {
	deputy := binary.Deputy(t)
	out := filepath.Join(t.TempDir(), "out")
	oneshot := "[Unit]\nDefaultDependencies=no\n[Service]\nType=oneshot\nStandardOutput=append:" + out + "\nStandardError=append:" + out + "\nExecStart="
	node := systemd.Start(t, fstest.MapFS{
		"deputy.service": file(unit(t, "deputy.service", "")),
		// It is the unit's main process, and asks; a socket that is its standard
		// input makes the daemon look at that.
		"researcher.socket":  file("[Unit]\nDefaultDependencies=no\n[Socket]\nListenStream=/run/researcher.sock\n"),
		"researcher.service": file(strings.Replace(oneshot, "oneshot", "exec", 1) + deputy + " watch\nUser=nobody\nStandardInput=socket\n"),
		"other.service":      file(oneshot + deputy + " fetch x509\nUser=nobody\nSuccessExitStatus=3\n"),
		"admin.service":      file(oneshot + "/bin/sh -c '" + deputy + " attest $(systemctl show -P MainPID researcher.service)'\n"),
	})
	systemctl := func(verb, unit string) {
		t.Helper()
		if got, err := node.Command("systemctl", verb, unit).CombinedOutput(); err != nil {
			said, _ := os.ReadFile(out)
			t.Fatalf("systemctl %s %s: %v: %s\n%s", verb, unit, err, got, said)
		}
	}
	for _, unit := range []string{"deputy", "researcher.socket", "researcher", "other", "admin"} {
		systemctl("start", unit)
	}
	systemctl("reload", "deputy")
	// What a container has mounted is a directory, not its name.
	public, err := os.Open(fmt.Sprintf("/proc/%d/root/run/deputy/public", node.PID))
	if err != nil {
		t.Fatal(err)
	}
	defer public.Close()
	systemctl("restart", "deputy")
	if names, err := public.Readdirnames(-1); err != nil || len(names) != 1 {
		t.Errorf("got %q, %v in the directory of the socket after a restart, want the socket", names, err)
	}
	// The watch gets its next SVID from the restarted daemon.
	var said []byte
	for end := time.Now().Add(20 * time.Second); !strings.Contains(string(said), "update 2"); <-time.After(50 * time.Millisecond) {
		said, _ = os.ReadFile(out)
		if time.Now().After(end) {
			t.Fatalf("no update after the restart:\n%s", said)
		}
	}
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
	out := filepath.Join(t.TempDir(), "out")
	watch := unit(t, "deputy-watch.service", "")
	node := systemd.Start(t, fstest.MapFS{
		"deputy.service":       file(unit(t, "deputy.service", "")),
		"deputy-watch.service": file(watch),
		"stranger.service":     file(strings.NewReplacer("/run/web", "/run/stranger", "RuntimeDirectory=web", "RuntimeDirectory=stranger").Replace(watch)),
		"nginx.service": file("[Unit]\nDefaultDependencies=no\nRequires=deputy-watch.service\n[Service]\nStandardOutput=append:" + out + "\n" +
			`ExecStart=/bin/sh -c 'trap "echo again $(ls -m /run/web)" HUP; ls -m /run/web; echo $$$$ > /run/nginx.pid; while :; do sleep 0.05 & wait; done'` + "\n"),
	})
	systemctl := func(verb, unit string, want bool) {
		t.Helper()
		if got, err := node.Command("systemctl", verb, unit).CombinedOutput(); (err == nil) != want {
			t.Fatalf("systemctl %s %s: got %v: %s", verb, unit, err, got)
		}
	}
	systemctl("start", "nginx", true) // and with it the others
	const files = "bundle.0.pem, svid.0.key, svid.0.pem\n"
	var said []byte
	for end := time.Now().Add(20 * time.Second); !strings.HasPrefix(string(said), files+"again "+files); <-time.After(50 * time.Millisecond) {
		said, _ = os.ReadFile(out)
		if time.Now().After(end) {
			t.Fatalf("got %q, want the files at the start, and again after a signal", said)
		}
	}
	// Another unit of the same program has no identity.
	systemctl("start", "stranger", false)
	_, rest, _ := strings.Cut(watch, "StandardError=append:")
	if log, err := os.ReadFile(strings.SplitN(rest, "\n", 2)[0]); err != nil || !strings.Contains(string(log), "no identity issued") {
		t.Errorf("got %q, %v, want it to have no identity", log, err)
	}
	systemctl("stop", "stranger", true)
	systemctl("stop", "deputy-watch", true) // and nginx, which requires it
	if _, err := os.Stat(fmt.Sprintf("/proc/%d/root/run/web/svid.0.pem", node.PID)); err != nil {
		t.Errorf("the files are gone with the unit: %v", err)
	}
}

// A filter that would leave it blind stops it, with the reason.
func TestRefusesToStartWithoutOpenat2(t *testing.T) {
	text := unit(t, "deputy.service", "RestrictSUIDSGID=yes\n")
	node := systemd.Start(t, fstest.MapFS{"deputy.service": file(strings.Replace(text, "Restart=always", "Restart=no", 1))})
	if out, err := node.Command("systemctl", "start", "deputy").CombinedOutput(); err == nil {
		t.Errorf("got a start, want none\n%s", out)
	}
	_, rest, _ := strings.Cut(text, "StandardError=append:")
	log, err := os.ReadFile(strings.SplitN(rest, "\n", 2)[0])
	if want := "openat2"; err != nil || !strings.Contains(string(log), want) {
		t.Errorf("got %q, %v, want %s in it", log, err, want)
	}
}
