package main

import (
	"context"
	"fmt"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	adminv1 "github.com/deputy-id/deputy/proto/deputy/admin/v1"
)

type attested struct {
	PID       int32     `json:"pid"`
	Selectors []string  `json:"selectors"`
	Unknown   []unknown `json:"unknown"`
	Traced    bool      `json:"traced"`
	SPIFFEIDs []string  `json:"spiffe_ids"`

	Unfilled []unfilled `json:"unfilled"`
}

type unfilled struct {
	Entry  string `json:"entry"`
	Path   string `json:"path"`
	Reason string `json:"reason"`
}

type unknown struct {
	Prefixes []string `json:"prefixes"`
	Reason   string   `json:"reason"`
}

func newAttest(out *output) *cobra.Command {
	var e endpoints
	cmd := &cobra.Command{
		Use:   "attest PID",
		Short: "Print the selectors that a process has",
		Long: `Attests a process as if it had connected and prints its selectors, one a line,
sorted. What could not be determined, the SPIFFE IDs that the process is entitled
to, and entries whose path lacks a value go to standard error.`,
		Example: "  sudo deputy attest $$",
		Args:    cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			pid, err := strconv.ParseInt(args[0], 10, 32)
			if err != nil || pid <= 0 {
				return usage(fmt.Errorf("%q is no PID", args[0]))
			}
			var resp *adminv1.AttestProcessResponse
			err = e.within(cmd.Context(), e.operator, func(ctx context.Context, c *client) (err error) {
				resp, err = adminv1.NewAdminClient(c).AttestProcess(ctx, &adminv1.AttestProcessRequest{Pid: int32(pid)})
				return err
			})
			if err != nil {
				return err
			}
			a := attested{PID: int32(pid), Selectors: []string{}, Unknown: []unknown{}, Traced: resp.Traced, SPIFFEIDs: resp.SpiffeIds, Unfilled: []unfilled{}}
			for _, s := range resp.Selectors {
				a.Selectors = append(a.Selectors, s.Type+":"+s.Value)
			}
			for _, u := range resp.Unknown {
				a.Unknown = append(a.Unknown, unknown{u.Prefixes, u.Reason})
			}
			for _, u := range resp.Unfilled {
				a.Unfilled = append(a.Unfilled, unfilled{u.EntryId, u.Path, u.Reason})
			}
			if a.SPIFFEIDs == nil {
				a.SPIFFEIDs = []string{}
			}
			if out.json() {
				return out.value(a)
			}
			notes := cmd.ErrOrStderr()
			for _, s := range a.Selectors {
				if _, err := fmt.Fprintln(out.w, plain(s)); err != nil {
					return err
				}
			}
			for _, u := range a.Unknown {
				fmt.Fprintf(notes, "unknown: %s: %s\n", strings.Join(u.Prefixes, " "), plain(u.Reason))
			}
			if a.Traced {
				fmt.Fprintln(notes, "traced: a tracer is attached")
			}
			for _, id := range a.SPIFFEIDs {
				fmt.Fprintf(notes, "entitled to: %s\n", id)
			}
			for _, u := range a.Unfilled {
				fmt.Fprintf(notes, "not by entry %s, %s: it has all of the selectors, but %s\n", u.Entry, plain(u.Path), plain(u.Reason))
			}
			return nil
		},
	}
	e.flags(cmd)
	return cmd
}
