package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os/exec"
	"syscall"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

func TestExitStatusAndMessage(t *testing.T) {
	refused := func(code string) error {
		return status.Error(codes.Unavailable, `connection error: desc = "error reading server preface: EOF", received prior goaway: code: `+code+`, debug data: "because of you"`)
	}
	tests := map[string]struct {
		err     error
		status  int
		message string
	}{
		"of our own":             {errors.New("x"), 1, "x"},
		"usage":                  {fmt.Errorf("y: %w", usage(errors.New("x"))), 2, "y: x"},
		"no identity":            {status.Error(codes.PermissionDenied, "none"), 3, "none (PermissionDenied)"},
		"wrapped":                {fmt.Errorf("register n: %w", status.Error(codes.InvalidArgument, "bad")), 1, "register n: bad (InvalidArgument)"},
		"too late":               {status.Error(codes.DeadlineExceeded, "x"), 1, "the daemon did not answer in time"},
		"daemon says not now":    {status.Error(codes.Unavailable, "not ready"), 1, "not ready (Unavailable)"},
		"refused for what it is": {refused("PROTOCOL_ERROR"), 3, "the daemon refused the connection: because of you"},
		"refused for its number": {refused("ENHANCE_YOUR_CALM"), 1, "the daemon refused the connection: because of you"},
		"no socket":              {&unreachableError{"/s", fs.ErrNotExist}, 4, "no daemon at /s: there is no such socket; is deputy running?"},
		"nobody listens":         {&unreachableError{"/s", syscall.ECONNREFUSED}, 4, "no daemon at /s: nobody listens there; is deputy running?"},
		"may not connect":        {&unreachableError{"/s", syscall.EACCES}, 3, "no permission to connect to /s"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			if got := exitStatus(tt.err); got != tt.status {
				t.Errorf("got status %d, want %d", got, tt.status)
			}
			if got := message(tt.err); got != tt.message {
				t.Errorf("got %q, want %q", got, tt.message)
			}
		})
	}
}

func TestExecStatusLeavesTheCommandItsOwn(t *testing.T) {
	for want, err := range map[int]error{
		7:   silentError(7),
		125: usage(errors.New("x")),
		126: cannotStart("x", &exec.Error{Name: "x", Err: fs.ErrPermission}),
		127: cannotStart("x", &exec.Error{Name: "x", Err: exec.ErrNotFound}),
	} {
		if got := execStatus(err); got != want {
			t.Errorf("%v: got %d, want %d", err, got, want)
		}
	}
}
