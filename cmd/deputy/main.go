// Command deputy is the node daemon (deputy run) and the command line of
// operators and agents.
//
// It is the one place that knows the configuration and the stages of the
// pipeline alike: it turns the former into the latter and joins them. It
// defends against a directory or a key that another user could write, and
// against a reload that would take identities away because of a typing
// mistake.
package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"strings"
	"syscall"
)

// version is set by the linker.
var version = "unknown"

func main() {
	if len(os.Args) > 1 && os.Args[1] == childCommand {
		os.Exit(becomeCommand())
	}
	ctx := context.Background()
	root := newRoot()
	cmd, err := root.ExecuteContextC(ctx)
	if err == nil {
		return
	}
	status := exitStatus(err)
	if cmd.Name() == "exec" && cmd.HasParent() && status != 0 {
		status = execStatus(err)
	}
	if !isSilent(err) {
		for line := range strings.Lines(message(err)) { // of several errors, a line each
			fmt.Fprintf(os.Stderr, "deputy: %s\n", strings.TrimSuffix(line, "\n"))
		}
	}
	os.Exit(status)
}

// untilStopped returns a context that ends with SIGINT or SIGTERM. After the
// first of them a second one kills as usual.
func untilStopped(ctx context.Context) (context.Context, context.CancelFunc) {
	ctx, stop := signal.NotifyContext(ctx, os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop)
	return ctx, stop
}
