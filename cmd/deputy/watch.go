package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/spf13/cobra"
	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"google.golang.org/grpc/codes"
)

// How long watch waits before it connects anew.
const (
	firstPause = 500 * time.Millisecond
	lastPause  = 30 * time.Second
)

func newWatch(out *output) *cobra.Command {
	var e endpoints
	cmd := &cobra.Command{
		Use:   "watch",
		Short: "Print each update of this process's X.509-SVIDs as it comes",
		Long: `Prints the X.509-SVIDs and bundles of this process, and prints them again whenever
the daemon sends an update, until it is interrupted. It waits for a daemon that
restarts, and says so on standard error; where there is no identity it ends with
status 3. With --output json each update is one line, with the private keys.`,
		Example: "  deputy watch",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			ctx, stop := untilStopped(cmd.Context())
			defer stop()
			return watch(ctx, out, cmd.ErrOrStderr(), &e)
		},
	}
	e.flags(cmd)
	return cmd
}

func watch(ctx context.Context, out *output, notes io.Writer, e *endpoints) error {
	c, err := e.workload()
	if err != nil {
		return err
	}
	defer c.Close()
	pause, updates, noted := firstPause, 0, 0
	for {
		before := updates
		err := follow(ctx, out, c, &updates)
		switch {
		case ctx.Err() != nil:
			return nil
		case updates == 0 || !transient(err):
			return err
		case updates > before:
			pause = firstPause
		}
		if noted < updates { // once for each time that it was there
			fmt.Fprintf(notes, "deputy: %s; waiting for it to come back\n", message(err))
			noted = updates
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(pause):
		}
		pause = min(2*pause, lastPause)
	}
}

// transient reports whether the end of a stream is worth connecting again for.
func transient(err error) bool {
	var unreachable *unreachableError
	return errors.Is(err, io.EOF) || errors.As(err, &unreachable) || code(err) == codes.Unavailable
}

// follow prints what one stream brings, and counts it.
func follow(ctx context.Context, out *output, c *client, updates *int) error {
	stream, err := fetchX509(withHeader(ctx), workload.NewSpiffeWorkloadAPIClient(c))
	if err != nil {
		return c.fail(err)
	}
	for {
		resp, err := stream.Recv()
		if err != nil {
			return c.fail(err)
		}
		*updates++
		if out.json() {
			err = out.line(resp)
		} else {
			if _, err = fmt.Fprintf(out.w, "update %d at %s\n", *updates, stamp(time.Now())); err == nil {
				err = printX509(out, resp)
			}
			fmt.Fprintln(out.w)
		}
		if err != nil {
			return err
		}
	}
}
