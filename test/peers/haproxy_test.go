package peers

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// HAProxy takes the page's lines, and reads the files again on its signal.
func TestHAProxyReadsTheFiles(t *testing.T) {
	haproxy := binaryOf(t, "haproxy", "/usr/sbin/haproxy")
	h := newFileHost(t)
	port := freePort(t)
	conf := h.at("/etc/haproxy/haproxy.cfg")
	text := "defaults\n    timeout connect 5s\n    timeout client 20s\n    timeout server 20s\n" +
		strings.Replace(h.page(t, "# haproxy.cfg"), " :8443 ", fmt.Sprintf(" 127.0.0.1:%d ", port), 1)
	if err := os.WriteFile(conf, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	h.watch(t, h.page(t, "# proxy.sh"), "/run/web")
	h.agent(t, "reporting")
	for _, name := range otherAgents {
		h.agent(t, name)
	}
	r := launch(t, filepath.Join(t.TempDir(), "haproxy.log"), haproxy, "-W", "-p", h.at("/run/haproxy.pid"), "-f", conf)
	h.webServer(t, port)
	if log := r.log(); strings.Contains(log, "[ALERT]") {
		t.Errorf("got an alert:\n%s", log)
	}
}
