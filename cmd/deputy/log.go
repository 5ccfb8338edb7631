package main

import (
	"io"

	"github.com/hashicorp/go-hclog"

	"github.com/deputy-id/deputy/conf"
)

func newLog(w io.Writer, c *conf.Config) hclog.Logger {
	return hclog.New(&hclog.LoggerOptions{
		Level:      c.LogLevel.Value,
		Output:     w,
		JSONFormat: c.LogFormat.Value == conf.JSON,
	})
}
