// Package attest is the WorkloadAttestor plugin for SPIRE's own agent: the
// attestors of Deputy's daemon, asked about a PID.
//
// The process is pinned as soon as its PID arrives, and everything after that is
// read through the pin, as in the daemon. What comes before is SPIRE's: there is
// no connection here, so nothing says that the program which is attested is the
// one that asked, or the one that will read the answer, and the PID may have
// passed to another process on its way here. SPIRE's agent looks afterwards
// whether its peer still lives, which closes the last of these gaps for its own
// Workload API, and for that alone.
//
// The plugin never ends the agent's attestation: what fails is an error of the
// one call, and every call has an end. A caller owes New a decoder of its
// configuration, and serves the Plugin with pluginmain.Serve.
package attest

import (
	"context"
	"errors"
	"fmt"
	"runtime/debug"
	"strings"
	"sync"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/spiffe/go-spiffe/v2/exp/proto/spiffe/broker"
	workloadattestorv1 "github.com/spiffe/spire-plugin-sdk/proto/spire/plugin/agent/workloadattestor/v1"
	configv1 "github.com/spiffe/spire-plugin-sdk/proto/spire/service/common/config/v1"
	"golang.org/x/time/rate"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/deputy-id/deputy/attestor"
	"github.com/deputy-id/deputy/attestor/peer"
)

// patience is how long an attestation may take. Attestors that do not answer
// are given up sooner; this ends what is left.
const patience = 10 * time.Second

// Plugin serves SPIRE's WorkloadAttestor and Config services. It is safe for
// concurrent use.
type Plugin struct {
	workloadattestorv1.UnimplementedWorkloadAttestorServer
	configv1.UnimplementedConfigServer

	decode func(string) (Settings, error)
	log    hclog.Logger
	loud   *rate.Limiter // of warnings about what is unknown

	configuring sync.Mutex  // one at a time
	table       *peer.Table // nil until the first configuration; configuring guards it

	mu      sync.RWMutex
	current *sources // nil until then, too
}

// New returns a plugin that is yet to be configured. decode turns the text of
// its configuration into settings; its errors are shown to the operator.
func New(decode func(text string) (Settings, error)) *Plugin {
	return &Plugin{decode: decode, log: hclog.NewNullLogger(), loud: rate.NewLimiter(1, 10)}
}

// SetLogger is called by the SDK before anything else.
func (p *Plugin) SetLogger(log hclog.Logger) { p.log = log }

// Attest implements the WorkloadAttestor service.
func (p *Plugin) Attest(ctx context.Context, req *workloadattestorv1.AttestRequest) (*workloadattestorv1.AttestResponse, error) {
	values, err := p.attest(ctx, req.GetPid())
	if err != nil {
		return nil, err
	}
	return &workloadattestorv1.AttestResponse{SelectorValues: values}, nil
}

// AttestReference implements the WorkloadAttestor service for references that
// are PIDs. Others are InvalidArgument, as the service's contract has it.
func (p *Plugin) AttestReference(ctx context.Context, req *workloadattestorv1.AttestReferenceRequest) (*workloadattestorv1.AttestReferenceResponse, error) {
	reference := req.GetReference()
	var pid broker.WorkloadPIDReference
	if !reference.MessageIs(&pid) {
		return nil, status.Errorf(codes.InvalidArgument, "reference is a %q, not a PID", reference.MessageName())
	}
	if err := (proto.UnmarshalOptions{}).Unmarshal(reference.GetValue(), &pid); err != nil {
		return nil, status.Error(codes.InvalidArgument, "reference is not a well-formed PID reference")
	}
	values, err := p.attest(ctx, pid.GetPid())
	if err != nil {
		return nil, err
	}
	return &workloadattestorv1.AttestReferenceResponse{SelectorValues: values}, nil
}

func (p *Plugin) attest(ctx context.Context, pid int32) (values []string, err error) {
	defer p.survive(&err)
	if pid <= 0 {
		// 0 is what the kernel says of a process outside our PID namespace.
		return nil, status.Errorf(codes.InvalidArgument, "%d is no PID: the agent and this plugin must run in the host's PID namespace", pid)
	}
	s, release, err := p.use()
	if err != nil {
		return nil, err
	}
	defer release()
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()

	process, err := s.table.Open(pid)
	if err != nil {
		return nil, failed(err)
	}
	defer process.Close()
	e, err := s.set.Attest(ctx, process)
	if err != nil {
		return nil, failed(fmt.Errorf("attest process %d: %w", pid, err))
	}
	if e.Traced && !s.settings.AllowTraced {
		// Whoever holds the tracer could read what it is given.
		return nil, status.Errorf(codes.Unavailable, "process %d is traced", pid)
	}
	values = s.settings.values(e.Selectors)
	unknown := p.unknown(&s.settings, pid, e)
	if unknown != "" && (s.settings.DenyUnknown || len(values) == 0) {
		return nil, status.Errorf(codes.Unavailable, "process %d: unknown: %s", pid, unknown)
	}
	return values, nil
}

// unknown says what of the selectors to give could not be determined, "" if
// all was, and logs why.
func (p *Plugin) unknown(s *Settings, pid int32, e *attestor.Evidence) string {
	var what []string
	for _, u := range e.Unknown {
		var wanted []string
		for _, prefix := range u.Prefixes {
			if s.wants(prefix) {
				wanted = append(wanted, strings.TrimSuffix(prefix, ":"))
			}
		}
		if len(wanted) == 0 {
			continue
		}
		what = append(what, wanted...)
		level := hclog.Warn
		if !p.loud.Allow() {
			level = hclog.Debug
		}
		p.log.Log(level, "selectors are unknown for now", "pid", pid, "kinds", strings.Join(wanted, " "), "error", u.Err)
	}
	return strings.Join(what, " ")
}

// use returns the sources that are in force, and what to call after their use.
func (p *Plugin) use() (*sources, func(), error) {
	p.mu.RLock()
	defer p.mu.RUnlock()
	if p.current == nil {
		return nil, nil, status.Error(codes.FailedPrecondition, "not configured")
	}
	p.current.users.Add(1)
	return p.current, p.current.users.Done, nil
}

// survive turns a panic into an error: a crash would take every selector from
// every workload.
func (p *Plugin) survive(err *error) {
	if r := recover(); r != nil {
		p.log.Error("bug in the plugin", "panic", fmt.Sprint(r), "stack", string(debug.Stack()))
		*err = status.Error(codes.Internal, "bug in the plugin, see its log")
	}
}

// failed is the error of an attestation that gave nothing.
func failed(err error) error {
	switch {
	case errors.Is(err, attestor.ErrGone), errors.Is(err, peer.ErrGone):
		return status.Error(codes.NotFound, err.Error())
	case errors.Is(err, context.Canceled):
		return status.Error(codes.Canceled, err.Error())
	case errors.Is(err, context.DeadlineExceeded):
		return status.Error(codes.DeadlineExceeded, err.Error())
	}
	return status.Error(codes.Unavailable, err.Error())
}
