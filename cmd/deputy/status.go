package main

import (
	"errors"
	"io/fs"
	"strings"
	"syscall"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// Exit statuses that scripts rely on.
const (
	statusFailed      = 1
	statusUsage       = 2
	statusDenied      = 3
	statusUnreachable = 4
)

// A usageError is a mistake in how the command was written.
type usageError struct{ error }

func (e usageError) Unwrap() error { return e.error }

func usage(err error) error { return usageError{err} }

// An unreachableError says that there is no daemon behind the socket.
type unreachableError struct {
	path string
	err  error
}

func (e *unreachableError) Error() string {
	switch {
	case errors.Is(e.err, fs.ErrNotExist):
		return "no daemon at " + e.path + ": there is no such socket; is deputy running?"
	case errors.Is(e.err, syscall.ECONNREFUSED):
		return "no daemon at " + e.path + ": nobody listens there; is deputy running?"
	case errors.Is(e.err, fs.ErrPermission):
		return "no permission to connect to " + e.path
	}
	return "connect to " + e.path + ": " + e.err.Error()
}

func (e *unreachableError) Unwrap() error { return e.err }

// A silentError ends the command with a status of its own; what there was to
// say has been said.
type silentError int

func (e silentError) Error() string { return "exit status" }

func isSilent(err error) bool {
	var silent silentError
	return errors.As(err, &silent)
}

// exitStatus is the exit status for an error of a command.
func exitStatus(err error) int {
	var silent silentError
	var usage usageError
	var unreachable *unreachableError
	switch {
	case err == nil:
		return 0
	case errors.As(err, &silent):
		return int(silent)
	case errors.As(err, new(deniedError)):
		return statusDenied
	case errors.As(err, &usage):
		return statusUsage
	case errors.As(err, &unreachable):
		if errors.Is(unreachable.err, fs.ErrPermission) {
			return statusDenied
		}
		return statusUnreachable
	}
	switch code(err) {
	case codes.PermissionDenied, codes.Unauthenticated:
		return statusDenied
	case codes.Unavailable:
		if code, _, refused := goAway(err); refused && code == "PROTOCOL_ERROR" {
			return statusDenied // what we are; over budget is ENHANCE_YOUR_CALM
		}
	}
	return statusFailed
}

// message words an error for a person: of one that came over gRPC, what the
// daemon said.
func message(err error) string {
	if _, reason, refused := goAway(err); refused {
		return "the daemon refused the connection: " + reason
	}
	var g interface{ GRPCStatus() *status.Status }
	if !errors.As(err, &g) {
		return err.Error()
	}
	s := g.GRPCStatus()
	var lead string
	if inner, ok := g.(error); ok {
		lead, _ = strings.CutSuffix(err.Error(), inner.Error())
	}
	switch s.Code() {
	case codes.Unknown:
		return lead + s.Message()
	case codes.Canceled, codes.DeadlineExceeded:
		return lead + "the daemon did not answer in time"
	}
	return lead + s.Message() + " (" + s.Code().String() + ")"
}

// denied is the error of a command that found out by itself that it is not
// entitled to what it was asked for.
func denied(reason string) error { return deniedError{reason} }

type deniedError struct{ reason string }

func (e deniedError) Error() string { return e.reason }

func code(err error) codes.Code {
	var g interface{ GRPCStatus() *status.Status }
	if errors.As(err, &g) {
		return g.GRPCStatus().Code()
	}
	return codes.Unknown
}

// goAway finds the code and the reason with which the daemon refused a
// connection before any call: grpc-go words them into the error of the call.
func goAway(err error) (name, reason string, refused bool) {
	if code(err) != codes.Unavailable {
		return "", "", false
	}
	_, rest, found := strings.Cut(err.Error(), "received prior goaway: code: ")
	if !found {
		return "", "", false
	}
	name, quoted, found := strings.Cut(rest, `, debug data: "`)
	if !found {
		return "", "", false
	}
	reason, _, _ = strings.Cut(quoted, `"`)
	return name, reason, reason != ""
}
