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

// HAProxy takes the page's lines, and reads the files again on its signal.
func TestHAProxyReadsTheFiles(t *testing.T) {
	haproxy := need.Program(t, "haproxy", "/usr/sbin/haproxy")
	h := newFileHost(t)
	port := loopback.Port(t)
	conf := h.at("/etc/haproxy/haproxy.cfg")
	text := "defaults\n    timeout connect 5s\n    timeout client 20s\n    timeout server 20s\n" +
		strings.Replace(h.page(t, "haproxy.cfg"), " :8443 ", fmt.Sprintf(" 127.0.0.1:%d ", port), 1)
	scratch.Write(t, conf, text)
	h.watch(t, h.page(t, "proxy.sh"), "/run/web")
	h.agent(t, "reporting")
	for _, name := range otherAgents {
		h.agent(t, name)
	}
	r := process.Start(t, exec.Command(haproxy, "-W", "-p", h.at("/run/haproxy.pid"), "-f", conf))
	h.webServer(t, port)
	if log := r.Log(); strings.Contains(log, "[ALERT]") {
		t.Errorf("got an alert:\n%s", log)
	}
}
