package main

import (
	"fmt"
	"runtime"

	"github.com/spf13/cobra"
)

func newVersion(out *output) *cobra.Command {
	return &cobra.Command{
		Use:     "version",
		Short:   "Print the version",
		Example: "  deputy version",
		Args:    cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			if out.json() {
				return out.value(map[string]string{"version": version, "go": runtime.Version(), "platform": runtime.GOOS + "/" + runtime.GOARCH})
			}
			_, err := fmt.Fprintf(out.w, "deputy %s\n", version)
			return err
		},
	}
}
