package main

import (
	"context"
	"fmt"

	"github.com/spf13/cobra"
	healthv1 "google.golang.org/grpc/health/grpc_health_v1"
)

func newHealth(out *output) *cobra.Command {
	var e endpoints
	cmd := &cobra.Command{
		Use:     "health",
		Short:   "Say whether the daemon is there and ready",
		Example: "  deputy health",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			var resp *healthv1.HealthCheckResponse
			err := e.within(cmd.Context(), e.workload, func(ctx context.Context, c *client) (err error) {
				resp, err = healthv1.NewHealthClient(c).Check(ctx, &healthv1.HealthCheckRequest{})
				return err
			})
			if err != nil {
				return err
			}
			if out.json() {
				err = out.message(resp)
			} else {
				_, err = fmt.Fprintln(out.w, resp.Status)
			}
			if err == nil && resp.Status != healthv1.HealthCheckResponse_SERVING {
				err = silentError(statusFailed)
			}
			return err
		},
	}
	e.flags(cmd)
	return cmd
}
