// Command composer is a CredentialComposer plugin that composes nothing, for
// benchmarks: what it costs is SPIRE's price of asking any plugin at all.
package main

import (
	"github.com/spiffe/spire-plugin-sdk/pluginmain"
	composerv1 "github.com/spiffe/spire-plugin-sdk/proto/spire/plugin/server/credentialcomposer/v1"
)

type composer struct {
	composerv1.UnimplementedCredentialComposerServer
}

func main() { pluginmain.Serve(composerv1.CredentialComposerPluginServer(composer{})) }
