package main

import (
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
			c, err := e.workload()
			if err != nil {
				return err
			}
			defer c.Close()
			ctx, cancel := e.deadline(cmd.Context())
			defer cancel()
			resp, err := healthv1.NewHealthClient(c).Check(ctx, &healthv1.HealthCheckRequest{})
			if err != nil {
				return c.fail(err)
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
