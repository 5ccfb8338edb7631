package plugins
import (
 _ "github.com/spiffe/spire-plugin-sdk/pluginmain"
 _ "github.com/spiffe/spire-plugin-sdk/plugintest"
 _ "github.com/spiffe/spire-plugin-sdk/proto/spire/plugin/server/credentialcomposer/v1"
 _ "github.com/spiffe/spire-plugin-sdk/proto/spire/plugin/agent/workloadattestor/v1"
 _ "github.com/hashicorp/go-plugin"
)
