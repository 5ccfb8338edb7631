package main

import (
	"errors"
	"fmt"

	"github.com/spf13/cobra"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/deputy-id/deputy/conf"
)

func newConf(out *output) *cobra.Command {
	return newGroup("conf", "Work with configuration files", newConfCheck(out))
}

func newConfCheck(out *output) *cobra.Command {
	return &cobra.Command{
		Use:   "check FILE",
		Short: "Check a configuration file",
		Long: `Reports everything that is wrong with a configuration file, and warns of what is
doubtful, as FILE:LINE:COL: reason on standard error. With warnings alone it
succeeds.`,
		Example: "  deputy conf check /etc/deputy/deputy.hcl",
		Args:    cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if args[0] == "" { // no file is what run has defaults for
				return usage(errors.New("conf check: the name of the file is empty"))
			}
			s, err := load(args[0])
			if s != nil {
				// Which bundles were set by hand only the daemon knows.
				s.warnings = append(s.warnings, s.bundleless(func(spiffeid.TrustDomain) bool { return false })...)
				s.warnings.Sort()
				for _, w := range s.warnings {
					fmt.Fprintf(cmd.ErrOrStderr(), "%s:%d:%d: warning: %s\n", w.Range.Filename, w.Range.Start.Line, w.Range.Start.Column, w.Reason)
				}
			}
			if err != nil {
				return located(cmd, err)
			}
			problems := s.checkNamed()
			var upstream conf.Problems
			if err := s.checkUpstream(); errors.As(err, &upstream) {
				problems = append(problems, upstream...)
			} else if err != nil {
				return err
			}
			if len(problems) > 0 {
				problems.Sort()
				return located(cmd, problems)
			}
			if out.json() {
				return out.value(map[string]any{"file": args[0], "entries": len(s.entries), "warnings": len(s.warnings)})
			}
			_, err = fmt.Fprintf(out.w, "%s: ok, %d %s\n", args[0], len(s.entries), plural(len(s.entries), "entry", "entries"))
			return err
		},
	}
}

func plural(n int, one, many string) string {
	if n == 1 {
		return one
	}
	return many
}

// located prints the problems of a configuration as they are, each on a line
// that an editor can jump to. Other errors come back.
func located(cmd *cobra.Command, err error) error {
	var problems conf.Problems
	if !errors.As(err, &problems) {
		return err
	}
	for _, p := range problems {
		fmt.Fprintln(cmd.ErrOrStderr(), plain(p.String()))
	}
	return silentError(statusFailed)
}
