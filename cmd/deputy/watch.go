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
	var c choice
	w := setWriter{out: out}
	var dir, group, target string
	cmd := &cobra.Command{
		Use:   "watch [--write DIR [--signal PID] [--exec CMD]]",
		Short: "Print, or write to files, each update of this process's X.509-SVIDs as it comes",
		Long: `Prints the X.509-SVIDs and bundles of this process, and prints them again whenever
the daemon sends an update, until it is interrupted. It waits for a daemon that
restarts, and says so on standard error; where there is no identity it ends with
status 3. With --output json each update is one line, with the private keys.

With --write DIR it keeps the files of fetch --write in a directory, for programs
that know only files. It is the deputy command that is attested, not the program
that reads: start it as a unit of its own, or by deputy exec --name. All files are
replaced at once: each is a link to DIR/..data/NAME, and ..data is switched. DIR,
which nobody else may write to, is made if it is missing; what else is in it stays.
Keys have mode 0600, with --group 0640 and that group. When the identity ends
(status 3) the files stay; their certificates expire.

After each change of the files, --signal sends SIGHUP, or the signal that is named
behind a colon, to a process: by its PID, and then the command ends with that
process, or by the path of its PID file, which is read each time and may be
missing. A PID file of another user's only names processes of that user. --exec
runs a command by /bin/sh, with DIR in $DEPUTY_DIR and its output on standard
error; the next change waits for it, and --timeout kills it. What fails of the
two is said on standard error, and nothing ends. Under a service manager of type
notify the command is ready when the files are there.`,
		Example: `  deputy watch
  deputy watch --write /run/web --signal /run/nginx.pid
  deputy watch --write /run/db --group postgres --exec 'pg_ctlcluster 15 main reload'`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := named(cmd, "write", "group", "signal", "exec", "spiffe-id", "hint"); err != nil {
				return err
			}
			if err := c.check(); err != nil {
				return err
			}
			if dir == "" && (group != "" || target != "" || w.command != "") {
				return usage(errors.New("--group, --signal and --exec need --write"))
			}
			ctx, stop := untilStopped(cmd.Context())
			defer stop()
			if dir == "" {
				updates := 0
				return watch(ctx, cmd.ErrOrStderr(), &e, &c, func(resp *workload.X509SVIDResponse) error {
					updates++
					return printUpdate(out, updates, resp)
				})
			}
			w.notes, w.timeout = cmd.ErrOrStderr(), e.timeout
			if err := w.open(dir, group, target); err != nil {
				return err
			}
			defer w.close()
			return w.watch(ctx, &e, &c)
		},
	}
	e.flags(cmd)
	c.flags(cmd)
	f := cmd.Flags()
	f.StringVar(&dir, "write", "", "keep the files in this `directory`, keys with mode 0600")
	f.StringVar(&group, "group", "", "let this `group` read the keys, too")
	f.StringVar(&target, "signal", "", "after a change, signal this `PID` or the one in this file; :NAME for another than HUP")
	f.StringVar(&w.command, "exec", "", "after a change, run this `command`")
	return cmd
}

// watch hands each update on, until there is no identity (any more), take
// fails, or the context ends.
func watch(ctx context.Context, notes io.Writer, e *endpoints, want *choice, take func(*workload.X509SVIDResponse) error) error {
	c, err := e.workload()
	if err != nil {
		return err
	}
	defer c.Close()
	pause, updates, noted := firstPause, 0, 0
	for {
		before := updates
		err := follow(ctx, c, func(resp *workload.X509SVIDResponse) error {
			updates++
			if err := want.of(resp); err != nil {
				return err
			}
			return take(resp)
		})
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

// follow hands on what one stream brings.
func follow(ctx context.Context, c *client, take func(*workload.X509SVIDResponse) error) error {
	ctx, cancel := context.WithCancel(withHeader(ctx))
	defer cancel()
	stream, err := fetchX509(ctx, workload.NewSpiffeWorkloadAPIClient(c))
	if err != nil {
		return c.fail(err)
	}
	for {
		resp, err := stream.Recv()
		if err != nil {
			return c.fail(err)
		}
		if err := take(resp); err != nil {
			return err
		}
	}
}

func printUpdate(out *output, n int, resp *workload.X509SVIDResponse) error {
	if out.json() {
		return out.line(resp)
	}
	if _, err := fmt.Fprintf(out.w, "update %d at %s\n", n, stamp(time.Now())); err != nil {
		return err
	}
	if err := printX509(out, resp); err != nil {
		return err
	}
	_, err := fmt.Fprintln(out.w)
	return err
}
