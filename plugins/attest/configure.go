package attest

import (
	"context"
	"strings"

	configv1 "github.com/spiffe/spire-plugin-sdk/proto/spire/service/common/config/v1"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/deputy-id/deputy/attestor/peer"
)

// Configure implements SPIRE's Config service. It may be called again, and
// while attestations are under way: those finish under what they began with. A
// configuration with an error in it changes nothing.
func (p *Plugin) Configure(_ context.Context, req *configv1.ConfigureRequest) (_ *configv1.ConfigureResponse, err error) {
	defer p.survive(&err)
	settings, err := p.check(req.GetHclConfiguration())
	if err != nil {
		return nil, status.Error(codes.InvalidArgument, err.Error())
	}
	p.configuring.Lock()
	defer p.configuring.Unlock()
	if err := p.open(); err != nil {
		return nil, status.Error(codes.Internal, err.Error())
	}
	next, err := newSources(settings, p.table, p.log)
	if err != nil {
		return nil, status.Error(codes.Internal, err.Error())
	}
	p.mu.Lock()
	last := p.current
	p.current = next
	p.mu.Unlock()
	if last != nil {
		go last.end(p.log)
	}
	p.log.Info("configured", "attestors", next)
	return &configv1.ConfigureResponse{}, nil
}

// Validate implements SPIRE's Config service: it says what Configure would.
func (p *Plugin) Validate(_ context.Context, req *configv1.ValidateRequest) (_ *configv1.ValidateResponse, err error) {
	defer p.survive(&err)
	if _, err := p.check(req.GetHclConfiguration()); err != nil {
		return &configv1.ValidateResponse{Notes: strings.Split(err.Error(), "\n")}, nil
	}
	return &configv1.ValidateResponse{Valid: true}, nil
}

func (p *Plugin) check(text string) (Settings, error) {
	s, err := p.decode(text)
	if err != nil {
		return Settings{}, err
	}
	return s, s.Check()
}

// open makes the table of processes, which outlives each configuration.
func (p *Plugin) open() error {
	if p.table != nil {
		return nil
	}
	table, legacy, err := peer.NewTable()
	if err != nil {
		return err
	}
	for _, l := range legacy {
		p.log.Warn("older kernel", "missing", l)
	}
	p.table = table
	return nil
}

// Close is called by the SDK when SPIRE unloads the plugin.
func (p *Plugin) Close() error {
	p.configuring.Lock()
	defer p.configuring.Unlock()
	p.mu.Lock()
	last := p.current
	p.current = nil
	p.mu.Unlock()
	if last != nil {
		last.end(p.log)
	}
	return nil // the table has no end of its own: earlier configurations may still close
}
