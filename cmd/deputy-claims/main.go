// Command deputy-claims is a plugin of a SPIRE server: a CredentialComposer that
// puts delegation claims into JWT-SVIDs. SPIRE starts it without arguments; with
// arguments it checks rules and shows what they make of an ID.
//
// It defends against nothing by itself: see plugins/claims.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/spire-plugin-sdk/pluginmain"
	composerv1 "github.com/spiffe/spire-plugin-sdk/proto/spire/plugin/server/credentialcomposer/v1"
	configv1 "github.com/spiffe/spire-plugin-sdk/proto/spire/service/common/config/v1"

	"github.com/deputy-id/deputy/plugins/claims"
)

// version is set by the linker.
var version = "unknown"

// Exit statuses that scripts rely on; they are those of deputy.
const (
	statusDone   = 0
	statusFailed = 1
	statusUsage  = 2
	statusDenied = 3
)

const help = `deputy-claims is a CredentialComposer plugin: a SPIRE server starts it by its
plugin_cmd. Rules are checked and tried out by hand:

  deputy-claims check [--trust-domain TD] FILE
      Report all that is wrong with rules, as FILE:LINE:COL: reason.
  deputy-claims show FILE SPIFFE-ID
      Print what the tokens (and certificates) of an ID carry, as JSON.
  deputy-claims version

FILE is what stands in plugin_data, or a rules_file. Exit status: 0 done,
1 failed, 2 wrong usage, 3 the rules deny the ID a token.
`

func main() {
	plugin := claims.NewComposer()
	server := composerv1.CredentialComposerPluginServer(plugin)
	// By this variable a SPIRE server tells a plugin that it is one.
	if len(os.Args) == 1 && os.Getenv(server.Type()) == server.Type() {
		pluginmain.Serve(server, configv1.ConfigServiceServer(plugin))
		return
	}
	os.Exit(run(context.Background(), os.Args[1:], os.Stdout, os.Stderr))
}

func run(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	if len(args) == 0 {
		fmt.Fprint(stderr, help)
		return statusUsage
	}
	wrong := func(format string, args ...any) int {
		fmt.Fprintf(stderr, "deputy-claims: "+format+"\n", args...)
		return statusUsage
	}
	switch name, args := args[0], args[1:]; name {
	case "check":
		flags := flag.NewFlagSet("check", flag.ContinueOnError)
		flags.SetOutput(io.Discard)
		domain := flags.String("trust-domain", "", "")
		if err := flags.Parse(args); errors.Is(err, flag.ErrHelp) {
			fmt.Fprint(stdout, help)
			return statusDone
		} else if err != nil {
			return wrong("%s", err)
		}
		var td spiffeid.TrustDomain
		if *domain != "" {
			var err error
			if td, err = spiffeid.TrustDomainFromString(*domain); err != nil {
				return wrong("--trust-domain: %s", err)
			}
		}
		if flags.NArg() != 1 {
			return wrong("check takes one file")
		}
		return check(ctx, flags.Arg(0), td, stdout, stderr)
	case "show":
		if len(args) != 2 {
			return wrong("show takes a file and a SPIFFE ID")
		}
		id, err := spiffeid.FromString(args[1])
		if err != nil {
			return wrong("%q: %s", args[1], err)
		}
		return show(ctx, args[0], id, stdout, stderr)
	case "version", "--version":
		fmt.Fprintf(stdout, "deputy-claims %s\n", version)
		return statusDone
	case "help", "-h", "--help":
		fmt.Fprint(stdout, help)
		return statusDone
	default:
		return wrong("there is no command %q; there are check, show and version", name)
	}
}

func check(ctx context.Context, file string, td spiffeid.TrustDomain, stdout, stderr io.Writer) int {
	rules, err := claims.LoadFile(ctx, file, td)
	if err != nil {
		return failed(stderr, err)
	}
	if w := rules.Warning(); w != "" {
		fmt.Fprintf(stderr, "warning: %s\n", plain(w))
	}
	noun := "rules"
	if rules.Len() == 1 {
		noun = "rule"
	}
	fmt.Fprintf(stdout, "%s: ok, %d %s\n", file, rules.Len(), noun)
	return statusDone
}

func show(ctx context.Context, file string, id spiffeid.ID, stdout, stderr io.Writer) int {
	rules, err := claims.LoadFile(ctx, file, id.TrustDomain())
	if err != nil {
		return failed(stderr, err)
	}
	now := time.Now()
	minted := make(map[string]any)
	c, err := rules.Claims(id, now)
	switch {
	case errors.Is(err, claims.ErrDenied):
		fmt.Fprintf(stderr, "deputy-claims: %s\n", plain(err.Error()))
		return statusDenied
	case err != nil && rules.OmitOnError():
		fmt.Fprintf(stderr, "the token goes without its claim: %s\n", plain(err.Error()))
	case err != nil:
		fmt.Fprintf(stderr, "no token is signed: %s\n", plain(err.Error()))
		return statusDenied
	case c == nil:
		fmt.Fprintf(stderr, "no rule in force for %s: its token has no claim of ours\n", id)
	default:
		minted[rules.ClaimName()] = c
	}
	certificate, err := rules.Certificate(id, now)
	switch {
	case err != nil && rules.OmitOnError():
		fmt.Fprintf(stderr, "the certificate goes without its additions: %s\n", plain(err.Error()))
	case err != nil:
		fmt.Fprintf(stderr, "no certificate is signed: %s\n", plain(err.Error()))
	case certificate != nil:
		minted["x509"] = certificate
	}
	e := json.NewEncoder(stdout)
	e.SetEscapeHTML(false)
	e.SetIndent("", "  ")
	if err := e.Encode(minted); err != nil {
		return failed(stderr, err)
	}
	return statusDone
}

// failed prints the problems of rules as they are, each on a line that an
// editor can jump to.
func failed(stderr io.Writer, err error) int {
	var problems claims.Problems
	if !errors.As(err, &problems) {
		fmt.Fprintf(stderr, "deputy-claims: %s\n", plain(err.Error()))
		return statusFailed
	}
	for _, p := range problems {
		fmt.Fprintln(stderr, plain(p.String()))
	}
	return statusFailed
}

// plain makes text that came from a file safe for a terminal.
func plain(s string) string {
	return strings.Map(func(r rune) rune {
		if r < ' ' && r != '\n' || r >= 0x7f && r < 0xa0 {
			return '\uFFFD'
		}
		return r
	}, s)
}
