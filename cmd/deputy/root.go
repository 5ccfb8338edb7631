package main

import (
	"fmt"
	"strings"

	"github.com/spf13/cobra"
)

func newRoot() *cobra.Command {
	var out output
	root := &cobra.Command{
		Use:   "deputy",
		Short: "Give each agent process on this host an identity that the kernel vouches for",
		Long: `Deputy attests a process by what the kernel and the container runtime say of it
and gives it SPIFFE identities over the Workload API.

Exit status: 0 done, 1 failed, 2 wrong usage, 3 no identity or not permitted,
4 daemon not reachable.`,
		Example: `  sudo deputy run &
  sudo deputy entry create /agent/hello --selector unix:uid:1000
  deputy fetch x509`,
		SilenceUsage:  true,
		SilenceErrors: true,
		Args:          cobra.NoArgs,
		RunE:          func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
		PersistentPreRunE: func(cmd *cobra.Command, _ []string) error {
			out.w = cmd.OutOrStdout()
			return out.check()
		},
	}
	root.PersistentFlags().StringVar(&out.format, "output", "text", "print in this `format`, text or json")
	root.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return usage(err) })
	root.AddCommand(
		newRun(), newConf(&out), newEntry(&out), newBundle(&out), newFederation(&out), newAttest(&out),
		newFetch(&out), newValidate(&out), newWatch(&out), newHealth(&out), newExec(), newVersion(&out),
	)
	completion(root)
	markUsage(root)
	return root
}

// markUsage makes what is wrong with a command's arguments a mistake of usage.
func markUsage(cmd *cobra.Command) {
	if check := cmd.Args; check != nil {
		cmd.Args = func(cmd *cobra.Command, args []string) error {
			if err := check(cmd, args); err != nil {
				return usage(err)
			}
			return nil
		}
	}
	for _, sub := range cmd.Commands() {
		markUsage(sub)
	}
}

// newGroup is a command that only holds others.
func newGroup(use, short string, commands ...*cobra.Command) *cobra.Command {
	group := &cobra.Command{Use: use, Short: short, RunE: needsOneOf(commands)}
	group.AddCommand(commands...)
	return group
}

// needsOneOf is what a command that only holds others says by itself.
func needsOneOf(commands []*cobra.Command) func(*cobra.Command, []string) error {
	var names []string
	for _, c := range commands {
		names = append(names, c.Name())
	}
	return func(cmd *cobra.Command, args []string) error {
		if len(args) > 0 {
			return usage(fmt.Errorf("%s has no command %q; it has %s", cmd.CommandPath(), args[0], strings.Join(names, ", ")))
		}
		return usage(fmt.Errorf("%s needs one of %s", cmd.CommandPath(), strings.Join(names, ", ")))
	}
}

// completion makes cobra's command for shells one of ours: by itself it would
// answer a shell that it does not know with its help, and status 0.
func completion(root *cobra.Command) {
	root.InitDefaultCompletionCmd()
	for _, cmd := range root.Commands() {
		if cmd.Name() == "completion" {
			cmd.Args, cmd.RunE = nil, needsOneOf(cmd.Commands())
		}
	}
}
