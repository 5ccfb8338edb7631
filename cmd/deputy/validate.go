package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"

	"github.com/deputy-id/deputy/internal/bounded"
)

// maxToken bounds what is read from standard input.
const maxToken = 1 << 20

func newValidate(out *output) *cobra.Command {
	var e endpoints
	var audience string
	cmd := &cobra.Command{
		Use:   "validate --audience A TOKEN",
		Short: "Validate a JWT-SVID for an audience",
		Long: `Asks the daemon whether a JWT-SVID is valid now, for this audience, and prints its
SPIFFE ID and claims. TOKEN "-" reads it from standard input, where other users
cannot see it.`,
		Example: `  deputy fetch jwt --audience me | deputy validate --audience me -`,
		Args:    cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if audience == "" {
				return usage(errors.New("validate needs an --audience"))
			}
			token := args[0]
			if token == "-" {
				b, err := bounded.Read(cmd.InOrStdin(), maxToken)
				if err != nil {
					return fmt.Errorf("read token: %w", err)
				}
				token = strings.TrimSpace(string(b))
			}
			var resp *workload.ValidateJWTSVIDResponse
			err := e.within(cmd.Context(), e.workload, func(ctx context.Context, c *client) (err error) {
				resp, err = workload.NewSpiffeWorkloadAPIClient(c).ValidateJWTSVID(ctx,
					&workload.ValidateJWTSVIDRequest{Audience: audience, Svid: token})
				return err
			})
			if err != nil {
				return err
			}
			if out.json() {
				return out.message(resp)
			}
			claims, err := resp.Claims.MarshalJSON()
			if err != nil {
				return err
			}
			var text bytes.Buffer
			if err := json.Indent(&text, claims, "", "  "); err != nil {
				return err
			}
			_, err = fmt.Fprintf(out.w, "%s\n%s\n", resp.SpiffeId, &text)
			return err
		},
	}
	e.flags(cmd)
	cmd.Flags().StringVar(&audience, "audience", "", "the `audience` that the token must have")
	return cmd
}
