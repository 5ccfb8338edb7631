package endpoint

import (
	"context"
	"errors"
	"fmt"

	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/deputy-id/deputy/attestor"
	"github.com/deputy-id/deputy/attestor/peer"
	"github.com/deputy-id/deputy/svid"
	"github.com/deputy-id/deputy/svid/federation"
	"github.com/deputy-id/deputy/svid/registry"
)

// Why a call is not served. What a caller reads of them says nothing about
// entries that it does not hold.
var (
	errHeader     = errors.New("header workload.spiffe.io: true is missing")
	errNoIdentity = errors.New("no identity issued")
	errTraced     = errors.New("process is traced")
	errUnknown    = errors.New("evidence is incomplete")
	errStopping   = errors.New("daemon is stopping")
	errBudget     = errors.New("over budget")
	errTooLong    = errors.New("message is too long")
	errForeign    = errors.New("not permitted on this socket")
	errNotFound   = errors.New("not found")
	errExists     = errors.New("already exists")
	errInUse      = errors.New("in use")
	errInvalid    = errors.New("invalid argument")
	errElsewhere  = errors.New("not offered by this authority")
	errDelegate   = errors.New("caller not configured as an authorized delegate")
	errBroker     = errors.New("caller not configured as a broker")
	errReference  = errors.New("invalid reference")
	errExpired    = errors.New("the caller's X.509-SVID holds no more")
)

// A fault is one of the errors above with words of its own.
type fault struct {
	kind error
	text string
}

func (f *fault) Error() string { return f.text }
func (f *fault) Unwrap() error { return f.kind }

func badReference(format string, args ...any) error {
	return &fault{errReference, fmt.Sprintf(format, args...)}
}

var errMalformed = invalid("malformed request")

func invalid(format string, args ...any) error {
	return &fault{errInvalid, fmt.Sprintf(format, args...)}
}

// codes of errors, the first match counts. This is the only place where an
// error of Deputy's packages becomes a gRPC code.
var codeOf = []struct {
	err  error
	code codes.Code
}{
	{errHeader, codes.InvalidArgument},
	{errInvalid, codes.InvalidArgument},
	{errReference, codes.InvalidArgument},
	{registry.ErrInvalid, codes.InvalidArgument},
	{svid.ErrOurs, codes.InvalidArgument},
	{errNoIdentity, codes.PermissionDenied},
	{errTraced, codes.PermissionDenied},
	{errForeign, codes.PermissionDenied},
	{errDelegate, codes.PermissionDenied},
	{errBroker, codes.PermissionDenied},
	{errExpired, codes.Unauthenticated},
	{errUnknown, codes.Unavailable},
	{errStopping, codes.Unavailable},
	{svid.ErrNotReady, codes.Unavailable},
	{svid.ErrDenied, codes.PermissionDenied},
	// The connection has gone, or goes: the program that the process runs now
	// is attested on its next one.
	{peer.ErrProgramChanged, codes.Unavailable},
	{peer.ErrCredentialsChanged, codes.Unavailable},
	{peer.ErrForeignMessage, codes.Unavailable},
	{peer.ErrGone, codes.Unavailable},
	{attestor.ErrGone, codes.Unavailable},
	{svid.ErrGone, codes.Unavailable},
	{errBudget, codes.ResourceExhausted},
	{errTooLong, codes.ResourceExhausted},
	{registry.ErrFromFile, codes.FailedPrecondition},
	{errInUse, codes.FailedPrecondition},
	{registry.ErrNotFound, codes.NotFound},
	{errNotFound, codes.NotFound},
	{federation.ErrNotFollowed, codes.NotFound},
	{registry.ErrExists, codes.AlreadyExists},
	{errExists, codes.AlreadyExists},
	{errElsewhere, codes.Unimplemented},
	{context.Canceled, codes.Canceled},
	{context.DeadlineExceeded, codes.DeadlineExceeded},
}

// code returns the gRPC code of an error.
func code(err error) codes.Code {
	switch err {
	case nil:
		return codes.OK
	case context.Canceled: // the client left, as nearly every stream ends
		return codes.Canceled
	}
	for _, c := range codeOf {
		if errors.Is(err, c.err) {
			return c.code
		}
	}
	if s, ok := status.FromError(err); ok {
		return s.Code()
	}
	return codes.Internal
}

// workloadStatus is what a workload is told: the code and a constant text, or
// what is wrong with its own request.
func workloadStatus(err error) error {
	if err == nil {
		return nil
	}
	c := code(err)
	switch {
	case c == codes.InvalidArgument:
		return status.Error(c, err.Error())
	case c == codes.PermissionDenied:
		return status.Error(c, errNoIdentity.Error())
	case errors.Is(err, errBudget), errors.Is(err, errTooLong), errors.Is(err, errStopping), errors.Is(err, svid.ErrNotReady):
		return status.Error(c, err.Error())
	case c == codes.Unavailable:
		return status.Error(c, "identity is not known for now")
	case c == codes.Internal:
		return status.Error(c, "identity could not be issued")
	case c == codes.Canceled:
		return status.Error(c, err.Error())
	}
	if s, ok := status.FromError(err); ok {
		return s.Err()
	}
	return status.Error(c, err.Error())
}

// delegateStatus is what a delegate is told, in SPIRE's words where it has some.
func delegateStatus(err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, errDelegate):
		return status.Error(code(err), errDelegate.Error())
	}
	return workloadStatus(err)
}

// brokerStatus is what a broker is told: of the workload that it named, the
// reason that the standard has for it (SPIFFE Broker API §4.8).
func brokerStatus(err error) error {
	if err == nil {
		return nil
	}
	st := status.Convert(workloadStatus(err))
	reason := ""
	switch c := st.Code(); {
	case errors.Is(err, errBroker):
		return status.Error(c, err.Error())
	case errors.Is(err, errReference):
		reason = "WORKLOAD_REFERENCE_INVALID"
	case errors.Is(err, errSubject):
		reason = "WORKLOAD_NOT_FOUND"
	case c == codes.PermissionDenied:
		reason = "WORKLOAD_NOT_ENTITLED"
	default:
		return st.Err()
	}
	with, detailErr := st.WithDetails(&errdetails.ErrorInfo{Domain: "spiffe.io", Reason: reason})
	if detailErr != nil {
		return st.Err()
	}
	return with.Err()
}

// adminStatus is what an administrator is told: everything.
func adminStatus(err error) error {
	if err == nil {
		return nil
	}
	return status.Error(code(err), err.Error())
}

// itemStatus is the status of one item of a batch.
func itemStatus(err error) *types.Status {
	if err == nil {
		return &types.Status{Code: int32(codes.OK), Message: codes.OK.String()}
	}
	return &types.Status{Code: int32(code(err)), Message: err.Error()}
}

// passing reports whether the cause of an error may go away by itself while
// the client keeps what it has.
func passing(err error) bool {
	switch code(err) {
	case codes.Unavailable:
		return !moved(err) && !errors.Is(err, errStopping)
	case codes.Internal, codes.ResourceExhausted:
		return true
	}
	return errors.Is(err, errTraced)
}

// moved reports whether the connection no longer belongs to the program, or
// the credentials, that opened it.
func moved(err error) bool {
	for _, target := range []error{
		peer.ErrProgramChanged, peer.ErrCredentialsChanged, peer.ErrForeignMessage, peer.ErrGone, attestor.ErrGone, svid.ErrGone,
	} {
		if errors.Is(err, target) {
			return true
		}
	}
	return false
}
