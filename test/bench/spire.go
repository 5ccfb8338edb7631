package main

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/deputy-id/deputy/test/loopback"
)

// spireVersion is that of test/peers/spire/go.mod.
const spireVersion = "1.15.3"

// spireBinaries are SPIRE's server and agent as `make bench-peers` builds them.
func spireBinaries() (server, agent string, err error) {
	cache, err := os.UserCacheDir()
	if err != nil {
		return "", "", err
	}
	server = filepath.Join(cache, "deputy-peers", "spire-server-"+spireVersion)
	agent = filepath.Join(cache, "deputy-peers", "spire-agent-"+spireVersion)
	for _, path := range []string{server, agent} {
		if _, err := os.Stat(path); err != nil {
			return "", "", err
		}
	}
	return server, agent, nil
}

// startSPIRE runs SPIRE's server and its agent, attested by a join token, with
// an entry of the same selectors as Deputy's. The clients find the agent's
// socket below the directory that they share with us.
func startSPIRE(p place) (agent *server, stop func(), err error) {
	serverBinary, agentBinary, err := spireBinaries()
	if err != nil {
		return nil, nil, err
	}
	dir := filepath.Join(p.dir, "spire")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, nil, err
	}
	port, err := loopback.Find()
	if err != nil {
		return nil, nil, err
	}
	api := filepath.Join(dir, "server.sock")
	file, err := writeFile(dir, "server.conf", `server {
  bind_address = "127.0.0.1"
  bind_port    = "%d"
  trust_domain = "bench.example"
  data_dir     = %q
  socket_path  = %q
  log_level    = "ERROR"
}
plugins {
  DataStore "sql" { plugin_data { database_type = "sqlite3", connection_string = %q } }
  KeyManager "memory" { plugin_data {} }
  NodeAttestor "join_token" { plugin_data {} }
}
`, port, dir, api, filepath.Join(dir, "server.db"))
	if err != nil {
		return nil, nil, err
	}
	s, err := start(exec.Command(serverBinary, "run", "-config", file), api)
	if err != nil {
		return nil, nil, err
	}
	defer func() {
		if err != nil {
			s.stop()
		}
	}()
	cli := func(args ...string) (string, error) {
		args = append(args[:2:2], append([]string{"-socketPath", api}, args[2:]...)...)
		out, err := exec.Command(serverBinary, args...).Output()
		if err != nil {
			err = fmt.Errorf("spire-server %s: %w", strings.Join(args[:2], " "), explain(err))
		}
		return string(out), err
	}
	const node = "spiffe://bench.example/node"
	token, err := cli("token", "generate", "-spiffeID", node)
	if err != nil {
		return nil, nil, err
	}
	bundle, err := cli("bundle", "show")
	if err != nil {
		return nil, nil, err
	}
	entry := []string{"entry", "create", "-parentID", node, "-spiffeID", "spiffe://bench.example/agent/bench"}
	for _, sel := range p.spire {
		entry = append(entry, "-selector", sel)
	}
	if _, err := cli(entry...); err != nil {
		return nil, nil, err
	}
	root, err := writeFile(dir, "bundle.pem", "%s", bundle)
	if err != nil {
		return nil, nil, err
	}
	socket := filepath.Join(dir, "agent.sock")
	docker := ""
	if p.docker != "" {
		docker = fmt.Sprintf("WorkloadAttestor \"docker\" { plugin_data { docker_socket_path = %q } }", "unix://"+p.docker)
	}
	file, err = writeFile(dir, "agent.conf", `agent {
  server_address    = "127.0.0.1"
  server_port       = "%d"
  trust_domain      = "bench.example"
  trust_bundle_path = %q
  join_token        = %q
  data_dir          = %q
  socket_path       = %q
  log_level         = "ERROR"
}
plugins {
  KeyManager "memory" { plugin_data {} }
  NodeAttestor "join_token" { plugin_data {} }
  WorkloadAttestor "unix" { plugin_data { discover_workload_path = true } }
  %s
}
`, port, root, strings.TrimSpace(strings.TrimPrefix(token, "Token: ")), filepath.Join(dir, "agent"), socket, docker)
	if err != nil {
		return nil, nil, err
	}
	a, err := start(exec.Command(agentBinary, "run", "-config", file), socket)
	if err != nil {
		return nil, nil, err
	}
	// The agent asks for its entries every five seconds.
	for end := time.Now().Add(30 * time.Second); ; time.Sleep(time.Second) {
		if _, err = p.client("save", socket, "x509").Output(); err == nil {
			return a, func() { a.stop(); s.stop() }, nil
		}
		if time.Now().After(end) {
			a.stop()
			return nil, nil, fmt.Errorf("fetch from spire-agent: %w\n%s", explain(err), a.log)
		}
	}
}

func writeFile(dir, name, format string, args ...any) (string, error) {
	path := filepath.Join(dir, name)
	return path, os.WriteFile(path, fmt.Appendf(nil, format, args...), 0o600)
}
