package peers

import (
	"fmt"
	"os/exec"
	"strings"
	"testing"

	"github.com/deputy-id/deputy/test/loopback"
	"github.com/deputy-id/deputy/test/need"
	"github.com/deputy-id/deputy/test/process"
	"github.com/deputy-id/deputy/test/scratch"
)

// nginx takes the page's lines: it lets one agent in by its SPIFFE ID, and gets
// its own next certificates without a request lost.
func TestNginxReadsTheFiles(t *testing.T) {
	nginx := need.Program(t, "nginx", "/usr/sbin/nginx")
	for name, more := range map[string]string{
		"signalled by its PID file": "",
		"reloaded by a command":     "--exec",
	} {
		t.Run(name, func(t *testing.T) {
			h := newFileHost(t)
			port := loopback.Port(t)
			conf := h.at("/etc/nginx.conf")
			server := strings.Replace(h.page(t, "web.conf"), " 8443 ", fmt.Sprintf(" 127.0.0.1:%d ", port), 1)
			text := fmt.Sprintf("daemon off;\nworker_processes 2;\npid %s;\nerror_log stderr;\nevents {}\nhttp {\naccess_log off;\n%s}\n", h.at("/run/nginx.pid"), server)
			scratch.Write(t, conf, text)
			script := h.page(t, "web.sh")
			if more != "" {
				before, _, _ := strings.Cut(script, "--signal")
				script = before + "--exec 'nginx -s reload -c " + conf + "'"
			}
			h.watch(t, script, "/run/web")
			h.agent(t, "reporting")
			for _, name := range otherAgents {
				h.agent(t, name)
			}
			r := process.Start(t, exec.Command(nginx, "-c", conf, "-e", "stderr"))
			h.webServer(t, port)

			curl := h.page(t, "curl.sh")
			curl = strings.Replace(curl, "curl ", fmt.Sprintf("curl -sS --resolve web.example.org:%d:127.0.0.1 ", port), 1)
			out, err := h.command(strings.Replace(curl, ":8443", fmt.Sprintf(":%d", port), 1)).CombinedOutput()
			if want := "spiffe://example.org/agents/reporting\n"; err != nil || string(out) != want {
				t.Errorf("curl: got %q, %v, want %q", out, err, want)
			}
			subject, err := h.command(h.page(t, "subject")).CombinedOutput()
			if want := "subject=UID=spiffe://example.org/agents/reporting,O=Deputy\n"; err != nil || string(subject) != want {
				t.Errorf("openssl: got %q, %v, want %q", subject, err, want)
			}
			contains(t, string(meshPage(t)), strings.TrimSpace(string(subject)))
			if log := r.Log(); strings.Contains(log, "[emerg]") {
				t.Errorf("a reload failed:\n%s", log)
			}
		})
	}
}
