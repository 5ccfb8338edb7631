package endpoint

import (
	"context"
	"errors"
	"strings"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
)

// workloadDesc is the service of the Workload API, which has no package in its
// name. Its handlers are our own, because what they send is marshalled already.
var workloadDesc = grpc.ServiceDesc{
	ServiceName: "SpiffeWorkloadAPI",
	HandlerType: (*any)(nil),
	Methods: []grpc.MethodDesc{
		unary("FetchJWTSVID", (*Server).fetchJWTSVID),
		unary("ValidateJWTSVID", (*Server).validateJWTSVID),
	},
	Streams: []grpc.StreamDesc{
		stream("FetchX509SVID", (*Server).fetchX509SVID),
		stream("FetchX509Bundles", (*Server).fetchX509Bundles),
		stream("FetchJWTBundles", (*Server).fetchJWTBundles),
		streamOf("FetchWITSVID", (*Server).fetchWITSVID),
		stream("FetchWITBundles", (*Server).fetchWITBundles),
	},
	Metadata: workload.SpiffeWorkloadAPI_ServiceDesc.Metadata,
}

// newWorkload returns the server of the workloads' socket.
func (s *Server) newWorkload() *grpc.Server {
	g := s.newGate(&handshaker{s: s, accept: acceptAny, counted: true}, s.admitPinned, s.denyPinned)
	g.RegisterService(&workloadDesc, s)
	g.RegisterService(&secretDesc, s)
	return g.Server
}

func stream(name string, serve func(*Server, context.Context, *link, grpc.ServerStream) error) grpc.StreamDesc {
	return streamOf(name, func(s *Server, ctx context.Context, l *link, _ *nothing, st grpc.ServerStream) error {
		return serve(s, ctx, l, st)
	})
}

func streamOf[In any](name string, serve func(*Server, context.Context, *link, *In, grpc.ServerStream) error) grpc.StreamDesc {
	return grpc.StreamDesc{
		StreamName:    name,
		ServerStreams: true,
		Handler: func(srv any, st grpc.ServerStream) error {
			s, ctx := srv.(*Server), st.Context()
			l, err := enterWorkload(ctx)
			if err != nil {
				return workloadStatus(err)
			}
			in := new(In)
			if err := st.RecvMsg(in); err != nil {
				return err
			}
			return s.answer(l, name, serve(s, ctx, l, in, st))
		},
	}
}

func unary[In, Out any](name string, serve func(*Server, context.Context, *link, *In) (Out, error)) grpc.MethodDesc {
	return method(name, enterWorkload, serve)
}

func method[In, Out any](name string, enter func(context.Context) (*link, error),
	serve func(*Server, context.Context, *link, *In) (Out, error)) grpc.MethodDesc {
	return grpc.MethodDesc{
		MethodName: name,
		Handler: func(srv any, ctx context.Context, decode func(any) error, _ grpc.UnaryServerInterceptor) (any, error) {
			s := srv.(*Server)
			l, err := enter(ctx)
			if err != nil {
				return nil, workloadStatus(err)
			}
			in := new(In)
			if err := decode(in); err != nil {
				return nil, err
			}
			out, err := serve(s, ctx, l, in)
			if err != nil {
				return nil, s.answer(l, name, err)
			}
			return out, nil
		},
	}
}

// enterWorkload lets a call in that carries the header against requests which
// somebody was tricked into forwarding (SPIFFE Workload Endpoint §3).
func enterWorkload(ctx context.Context) (*link, error) {
	if v := metadata.ValueFromIncomingContext(ctx, "workload.spiffe.io"); len(v) != 1 || v[0] != "true" {
		return nil, errHeader
	}
	return enterPinned(ctx)
}

// enterPinned lets a call in that comes over a listener of ours.
func enterPinned(ctx context.Context) (*link, error) {
	l := linkOf(ctx)
	if l == nil {
		return nil, errForeign // not over a listener of ours: nobody is known behind it
	}
	return l, nil
}

// answer turns the end of a call into a status.
func (s *Server) answer(l *link, method string, err error) error {
	if err == nil {
		return nil
	}
	s.note(l, method, err)
	return workloadStatus(err)
}

// note logs why a call was denied.
func (s *Server) note(l *link, method string, err error) {
	switch code(err) {
	case codes.PermissionDenied, codes.ResourceExhausted:
		s.logDenial(l, method, err)
	case codes.Unavailable:
		if !moved(err) && !errors.Is(err, errStopping) {
			s.logDenial(l, method, err)
		}
	case codes.Internal:
		s.Log.Error("workload could not be served", "method", method, "pid", l.Process().PID(), "uid", l.uid, "error", err)
	}
}

// noteDelegate is note for a caller that asks for somebody else's SVID.
func (s *Server) noteDelegate(l *link, method string, subject int32, err error) {
	args := []any{"method", method, "pid", l.Process().PID(), "uid", l.uid}
	if subject != 0 {
		args = append(args, "subject_pid", subject)
	}
	switch code(err) {
	case codes.PermissionDenied, codes.ResourceExhausted:
	case codes.NotFound:
		if errors.Is(err, errEnded) {
			return
		}
	case codes.Unavailable:
		if moved(err) || errors.Is(err, errStopping) {
			return
		}
	case codes.Internal:
		s.Log.Error("delegate could not be served", append(args, "error", err)...)
		return
	default:
		return
	}
	s.logRarely(l, hclog.Info, "delegate denied", append(args, "reason", err)...)
}

// logDenial writes one line, rarely enough that a client that asks in a loop
// does not fill the log.
func (s *Server) logDenial(l *link, method string, err error) {
	said := s.logRarely(l, hclog.Info, "workload denied", "method", method, "pid", l.Process().PID(), "uid", l.uid, "reason", err)
	if v := l.session.view.Load(); said && v != nil && errors.Is(err, errNoIdentity) {
		s.logUnfilled(v, "pid", l.Process().PID())
	}
}

// logUnfilled names entries that the process has all selectors of: which of its
// values are missing is what a denial is about then.
func (s *Server) logUnfilled(v *view, args ...any) {
	const most = 3
	for _, u := range v.Unfilled[:min(len(v.Unfilled), most)] {
		s.Log.Debug("entry lacks a value for its path", append(args, "entry", u.ID, "path", u.Path, "reason", u.Reason)...)
	}
}

// logRarely reports whether it logged.
func (s *Server) logRarely(l *link, level hclog.Level, message string, args ...any) bool {
	a := l.seat.account()
	if !a.denials.Allow() {
		a.unsaid.Add(1)
		return false
	}
	if n := a.unsaid.Swap(0); n > 0 {
		args = append(args, "unsaid", n)
	}
	s.Log.Log(level, message, args...)
	return true
}

// short is a method without its service, as every line of the log names it.
func short(method string) string { return method[strings.LastIndexByte(method, '/')+1:] }

// logCall is for who looks for what a client does, or whether it comes at all.
func (s *Server) logCall(l *link, method string) {
	if s.Log.IsDebug() {
		s.Log.Debug("workload calls", "method", short(method), "pid", l.Process().PID(), "uid", l.uid)
	}
}

// admitPinned lets every process in.
func (s *Server) admitPinned(ctx context.Context, method string) (*account, error) {
	l, err := enterPinned(ctx)
	if err != nil {
		return nil, err
	}
	s.logCall(l, method)
	return l.seat.account(), nil
}

func (s *Server) denyPinned(ctx context.Context, method string, err error) error {
	if l := linkOf(ctx); l != nil {
		return s.answer(l, short(method), err)
	}
	return workloadStatus(err)
}

// A pause grows from try to try, with jitter, so that what a runtime could not
// say once is not asked for by everybody at the same moment.
type pause struct{ last time.Duration }

const (
	shortestPause = 500 * time.Millisecond
	longestPause  = 30 * time.Second
)

func (p *pause) next() time.Duration {
	p.last = min(max(2*p.last, shortestPause), longestPause)
	return jitter(p.last)
}

func (p *pause) reset() { p.last = 0 }
