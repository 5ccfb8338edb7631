package peers

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/deputy-id/deputy/test/page"
	"github.com/deputy-id/deputy/test/scratch"
)

// python makes a virtual environment with the SPIFFE client, once for this machine.
var python = sync.OnceValues(func() (string, error) {
	const client = "spiffe==0.3.2"
	venv := cached("python-" + client)
	path := filepath.Join(venv, "bin/python")
	if exec.Command(path, "-c", "import spiffe").Run() == nil {
		return path, nil
	}
	if out, err := exec.Command("python3", "-m", "venv", "--clear", venv).CombinedOutput(); err != nil {
		return "", fmt.Errorf("make a virtual environment: %w\n%s", err, out)
	}
	if out, err := exec.Command(path, "-m", "pip", "install", "-q", client).CombinedOutput(); err != nil {
		return "", fmt.Errorf("install %s: %w\n%s", client, err, out)
	}
	return path, nil
})

// The README's lines, under deputy exec with a name, as it says.
func TestPythonAgentOfTheReadme(t *testing.T) {
	interpreter := built(t, python)
	d := start(t, "peers.example", "")
	script := scratch.Write(t, filepath.Join(d.Dir, "agent.py"), page.Open(t, "../../README.md").Blocks(t, "python")[0])
	got := run(t, d.Binary, "exec", "--socket", d.Workload, "--admin-socket", d.Admin,
		"--name", "researcher", "--entry", "/agent/researcher", "--", interpreter, script)
	if want := "spiffe://peers.example/agent/researcher"; strings.TrimSpace(got) != want {
		t.Errorf("got %q, want %s", got, want)
	}
	contains(t, d.cli(t, "entry", "count"), "0 registration entries")
}

// A JWT-SVID and the bundles, by the same client.
func TestPythonClientFetchesAndValidates(t *testing.T) {
	interpreter := built(t, python)
	d := start(t, "peers.example", "entry \"/agent/py\" {\n  selectors = [\"unix:uid:"+fmt.Sprint(os.Getuid())+"\"]\n}\n")
	got := run(t, interpreter, "-c", `
import sys
from spiffe import WorkloadApiClient
with WorkloadApiClient(sys.argv[1]) as c:
    svid = c.fetch_jwt_svid(audience={"tool"})
    print(c.validate_jwt_svid(svid.token, audience="tool").spiffe_id)
    print(len(c.fetch_x509_bundles().bundles), len(c.fetch_jwt_bundles().bundles))
`, "unix://"+d.Workload)
	contains(t, got, "spiffe://peers.example/agent/py", "1 1")
}
