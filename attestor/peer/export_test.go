package peer

import "github.com/hashicorp/go-hclog"

// warnings tells of each warning.
type warnings struct {
	hclog.Logger
	heard chan struct{}
}

func (w warnings) Warn(string, ...any) { w.heard <- struct{}{} }
