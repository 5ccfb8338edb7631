package main

import (
	"fmt"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
)

// A choice is which of the X.509-SVIDs a command takes: all, if nothing is
// chosen.
type choice struct{ id, hint string }

func (c *choice) flags(cmd *cobra.Command) {
	cmd.Flags().StringVar(&c.id, "spiffe-id", "", "only the SVID with this `ID`")
	cmd.Flags().StringVar(&c.hint, "hint", "", "only the SVID with this `hint`")
}

func (c *choice) check() error { return checkID(c.id) }

// of takes all others out of an answer. None left is no identity.
func (c *choice) of(resp *workload.X509SVIDResponse) error {
	resp.Svids = slices.DeleteFunc(resp.Svids, func(s *workload.X509SVID) bool {
		return c.id != "" && s.SpiffeId != c.id || c.hint != "" && s.Hint != c.hint
	})
	if len(resp.Svids) > 0 {
		return nil
	}
	reason := "no X.509-SVID"
	if c.id != "" {
		reason += " for " + c.id
	}
	if c.hint != "" {
		reason += fmt.Sprintf(" with hint %q", strings.ToValidUTF8(c.hint, "?"))
	}
	return denied(reason)
}
