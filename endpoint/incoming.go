package endpoint

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"slices"
	"sync"

	"google.golang.org/grpc"
	"google.golang.org/grpc/status"
)

// A gate is a server whose calls are let in before anything that they say is
// read, and whose messages count before they are there. gRPC by itself holds
// what anybody announces, in as many pieces as it comes in, shows a unary call
// to interceptors when its message is complete, and calls what is malformed
// Internal.
type gate struct {
	*grpc.Server
	budget *budget
	most   int // bytes of a message

	admit admission
	still func(context.Context) error // whether who was let in still is, when a message is there; nil where handlers ask
	deny  denial
}

// An admission says for whom a call counts, if it is let in: for nobody where
// there is no account.
type admission func(ctx context.Context, method string) (*account, error)

// A denial makes the status of an error that no handler answered with, and
// logs what is to be logged.
type denial func(ctx context.Context, method string, err error) error

// RegisterService puts the gate before every method, whoever wrote its handler.
func (g *gate) RegisterService(desc *grpc.ServiceDesc, impl any) {
	d := *desc
	d.Methods, d.Streams = slices.Clone(d.Methods), slices.Clone(d.Streams)
	for i, m := range d.Methods {
		d.Methods[i].Handler = g.unary("/"+d.ServiceName+"/"+m.MethodName, m.Handler)
	}
	for i, st := range d.Streams {
		d.Streams[i].Handler = g.stream("/"+d.ServiceName+"/"+st.StreamName, st.ClientStreams, st.Handler)
	}
	g.Server.RegisterService(&d, impl)
}

func (g *gate) unary(method string, handle grpc.MethodHandler) grpc.MethodHandler {
	return func(srv any, ctx context.Context, _ func(any) error, _ grpc.UnaryServerInterceptor) (any, error) {
		in, err := g.open(ctx, method)
		if err != nil {
			return nil, g.status(ctx, method, err)
		}
		defer in.close()
		out, err := handle(srv, ctx, in.RecvMsg, nil)
		return out, g.status(ctx, method, err)
	}
}

func (g *gate) stream(method string, more bool, handle grpc.StreamHandler) grpc.StreamHandler {
	return func(srv any, st grpc.ServerStream) error {
		in, err := g.open(st.Context(), method)
		if err != nil {
			return g.status(st.Context(), method, err)
		}
		defer in.close()
		in.ServerStream, in.more = st, more
		return g.status(st.Context(), method, handle(srv, in))
	}
}

// status turns what no handler has answered with into a status.
func (g *gate) status(ctx context.Context, method string, err error) error {
	if _, ok := status.FromError(err); ok {
		return err
	}
	return g.deny(ctx, method, err)
}

func (g *gate) open(ctx context.Context, method string) (*incoming, error) {
	from, ok := grpc.ServerTransportStreamFromContext(ctx).(source)
	if !ok {
		return nil, errors.New("gRPC's streams have no ReadMessageHeader")
	}
	a, err := g.admit(ctx, method)
	if err == nil && a != nil {
		err = g.budget.stream(a)
	}
	if err != nil {
		return nil, err
	}
	in := &incoming{from: from, most: g.most, budget: g.budget, account: a}
	if g.still != nil {
		in.still = func() error { return g.still(ctx) }
	}
	return in, nil
}

// A source is where a call's bytes are read. gRPC's streams are that, without
// a promise that they will be: what it promises reads whole messages alone.
type source interface {
	// ReadMessageHeader fills the slice, be it with a header or not. The error
	// is io.EOF if the client has said all before.
	ReadMessageHeader([]byte) error
}

// An incoming is what the client of one call says. A message counts from when
// it is announced until the call ends or the next one is waited for.
type incoming struct {
	grpc.ServerStream      // nil for a unary call
	more              bool // the client may say any number of messages
	still             func() error
	from              source
	most              int
	budget            *budget
	account           *account // nil: nothing is counted
	head              [5]byte  // of a message: a flag, and the length

	mu     sync.Mutex // guards what follows: a stream may be read still when its handler has returned
	held   int        // bytes that count
	closed bool
}

const (
	// freeMessage is the length up to which a message does not count: the
	// stream that it comes on takes more, and does. So nobody's honest request is
	// refused for what others of the same origin announce.
	freeMessage = 2 << 10
	// streamWindow is what a client may send on a stream that nobody reads.
	streamWindow = 64 << 10
)

// RecvMsg takes the client's next message; the error is io.EOF if there is
// none on a stream that may have many.
func (in *incoming) RecvMsg(v any) error {
	body, err := in.next()
	if err == nil && in.still != nil {
		err = in.still()
	}
	if err != nil {
		return err
	}
	return in.account.decode(body, v)
}

func (in *incoming) next() ([]byte, error) {
	in.hold(0)
	switch err := in.from.ReadMessageHeader(in.head[:]); {
	case err == io.EOF && in.more:
		return nil, err
	case err != nil:
		return nil, cut(err)
	}
	n := binary.BigEndian.Uint32(in.head[1:])
	switch {
	case in.head[0] != 0:
		return nil, invalid("malformed request: it is compressed")
	case int64(n) > int64(in.most):
		return nil, &fault{errTooLong, fmt.Sprintf("message of %d bytes is longer than %d", n, in.most)}
	}
	counts := int(n)
	if in.more {
		// Nobody reads between this message and the next, but the client may
		// send.
		counts = max(counts, streamWindow)
	}
	if err := in.hold(counts); err != nil {
		return nil, err
	}
	body := make([]byte, n)
	if err := in.from.ReadMessageHeader(body); err != nil {
		return nil, cut(err)
	}
	if in.more {
		return body, nil
	}
	switch err := in.from.ReadMessageHeader(in.head[:1]); err {
	case io.EOF:
		return body, nil
	case nil:
		return nil, invalid("malformed request: more than one message")
	default:
		return nil, cut(err)
	}
}

// cut is the error of a message that ends before its end.
func cut(err error) error {
	if err == io.EOF || err == io.ErrUnexpectedEOF {
		return invalid("malformed request: the message is not complete")
	}
	return err
}

// hold counts so many bytes instead of those that were counted before.
func (in *incoming) hold(bytes int) error {
	if in.account == nil {
		return nil
	}
	in.mu.Lock()
	defer in.mu.Unlock()
	in.forget()
	switch {
	case bytes <= freeMessage:
		return nil
	case in.closed:
		return context.Canceled
	}
	if err := in.budget.expect(in.account, bytes); err != nil {
		return err
	}
	in.held = bytes
	return nil
}

// forget is for who holds in.mu.
func (in *incoming) forget() {
	if in.held > 0 {
		in.budget.forget(in.account, in.held)
		in.held = 0
	}
}

func (in *incoming) close() {
	if in.account == nil {
		return
	}
	in.mu.Lock()
	defer in.mu.Unlock()
	in.forget()
	in.closed = true
	in.budget.end(in.account)
}
