// Command deputy-attest is a WorkloadAttestor plugin for SPIRE's agent, which
// starts it: Deputy's attestors behind the stock agent. See docs/spire-plugins.md.
package main

import (
	"fmt"
	"os"

	"github.com/spiffe/spire-plugin-sdk/pluginmain"
	workloadattestorv1 "github.com/spiffe/spire-plugin-sdk/proto/spire/plugin/agent/workloadattestor/v1"
	configv1 "github.com/spiffe/spire-plugin-sdk/proto/spire/service/common/config/v1"

	"github.com/deputy-id/deputy/plugins/attest"
)

// version is set by the linker.
var version = "unknown"

const usage = `usage: deputy-attest [--version]

SPIRE's agent starts this program as the WorkloadAttestor plugin whose
plugin_cmd it is; by hand it does nothing but print its version.
`

func main() {
	plugin := attest.New(decode)
	server := workloadattestorv1.WorkloadAttestorPluginServer(plugin)
	switch args := os.Args[1:]; {
	case len(args) == 0 && os.Getenv(server.Type()) == server.Type(): // so says the agent
		pluginmain.Serve(server, configv1.ConfigServiceServer(plugin))
	case len(args) == 1 && (args[0] == "--version" || args[0] == "-version" || args[0] == "version"):
		fmt.Println("deputy-attest", version)
	case len(args) == 1 && (args[0] == "--help" || args[0] == "-h" || args[0] == "help"):
		fmt.Print(usage)
	default:
		fmt.Fprint(os.Stderr, usage)
		os.Exit(2)
	}
}
