package main

import (
	"errors"
	"fmt"
	"os"
	"os/signal"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
)

func newRun() *cobra.Command {
	var file string
	cmd := &cobra.Command{
		Use:   "run",
		Short: "Run the daemon",
		Long: `Runs the daemon in the foreground; it logs to standard error and stops with SIGTERM
or SIGINT. Without a configuration file it runs with safe defaults: for root in
/run/deputy and /var/lib/deputy, for another user in that user's own runtime and
state directories, which is for development only.

SIGHUP, or a change of the file, reloads entries, claims, federates_with, the
clients of broker, authorized_delegates and the log level; the log names what else
was changed and needs a restart. A file with a mistake changes nothing.`,
		Example: `  sudo deputy run
  sudo deputy run --config /etc/deputy/deputy.hcl`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if cmd.Flags().Changed("config") && file == "" {
				return usage(errors.New("--config names no file"))
			}
			if err := harden(); err != nil {
				return err
			}
			// A log that nobody reads any more must not end every agent's identity.
			signal.Ignore(unix.SIGPIPE)
			// Watched before it is read: no change is missed in between.
			r := newReloads(file)
			defer r.Close()
			s, err := load(file)
			if err != nil {
				return located(cmd, err)
			}
			if problems := s.checkNamed(); len(problems) > 0 {
				return located(cmd, problems)
			}
			ctx, stop := untilStopped(cmd.Context())
			defer stop()
			defer reserve()()
			d := &daemon{file: file, settings: s, reloads: r, log: newLog(os.Stderr, s.Config)}
			return located(cmd, d.run(ctx))
		},
	}
	cmd.Flags().StringVar(&file, "config", "", "configuration `file`")
	return cmd
}

// harden makes this process safe to hold keys: no core dump, no tracer but
// root, and no file that others may read by accident. (The limit of open files
// is at its maximum already: Go's runtime sees to that.)
func harden() error {
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
		return fmt.Errorf("forbid core dumps: %w", err)
	}
	unix.Umask(0o077)
	return nil
}
