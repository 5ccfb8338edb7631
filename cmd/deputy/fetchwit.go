package main

import (
	"context"
	"fmt"

	"github.com/spf13/cobra"
	"github.com/spiffe/go-spiffe/v2/exp/svid/witsvid"
	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
)

func newFetchWIT(out *output, e *endpoints) *cobra.Command {
	var dir, id string
	cmd := &cobra.Command{
		Use:   "wit",
		Short: "Fetch WIT-SVIDs with their keys, where they are switched on",
		Long: `Fetches a WIT-SVID for each identity of this process: a token that is bound to a
key, and worth nothing without a proof by it. The daemon gives them out if its
configuration says experimental { wit_svid = true }.`,
		Example: `  deputy fetch wit
  deputy fetch wit --write /run/agent    # wit_svid.0.jwk, wit_svid.0.token`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := named(cmd, "write", "spiffe-id"); err != nil {
				return err
			}
			if err := checkID(id); err != nil {
				return err
			}
			resp, err := first(cmd.Context(), e, func(ctx context.Context, c workload.SpiffeWorkloadAPIClient) (receiver[*workload.WITSVIDResponse], error) {
				return c.FetchWITSVID(ctx, &workload.WITSVIDRequest{SpiffeId: id})
			})
			if err != nil {
				return err
			}
			if dir != "" {
				names, err := writeWIT(dir, resp)
				if err != nil {
					return err
				}
				return printWritten(out, names)
			}
			return printWIT(out, resp)
		},
	}
	cmd.Flags().StringVar(&dir, "write", "", "write the files to this `directory`, with mode 0600")
	cmd.Flags().StringVar(&id, "spiffe-id", "", "only the SVID with this `ID`")
	return cmd
}

func writeWIT(dir string, resp *workload.WITSVIDResponse) ([]string, error) {
	var files []file
	for i, s := range resp.Svids {
		// The token comes after its key: who waits for it finds both.
		files = append(files,
			file{fmt.Sprintf("wit_svid.%d.jwk", i), []byte(s.WitSvidKey), secretFile},
			file{fmt.Sprintf("wit_svid.%d.token", i), []byte(s.WitSvid), secretFile},
		)
	}
	return write(dir, files)
}

func printWIT(out *output, resp *workload.WITSVIDResponse) error {
	if out.json() {
		return out.message(resp)
	}
	for i, s := range resp.Svids {
		if i > 0 {
			fmt.Fprintln(out.w)
		}
		wit, err := witsvid.ParseInsecure(s.WitSvid) // it comes from the daemon
		if err != nil {
			return fmt.Errorf("parse WIT-SVID of %s: %w", s.SpiffeId, err)
		}
		if err := out.fields(
			field{"spiffe_id", s.SpiffeId},
			field{"hint", plain(s.Hint)},
			field{"expires", expiry(wit.Expiry)},
			field{"token", s.WitSvid},
		); err != nil {
			return err
		}
	}
	return nil
}
