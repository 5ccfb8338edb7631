package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"slices"
	"sync"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
)

// maxMessage is the largest answer that is taken: a list of a hundred thousand
// entries fits.
const maxMessage = 256 << 20

// endpoints are the flags of a command that talks to the daemon.
type endpoints struct {
	socket, admin string
	timeout       time.Duration
}

func (e *endpoints) flags(cmd *cobra.Command) {
	f := cmd.PersistentFlags()
	f.StringVar(&e.socket, "socket", "", "`path` of the Workload API socket (else $SPIFFE_ENDPOINT_SOCKET)")
	f.StringVar(&e.admin, "admin-socket", "", "`path` of the admin socket (else $DEPUTY_ADMIN_SOCKET)")
	e.timeout = 30 * time.Second
	f.Var((*limit)(&e.timeout), "timeout", "give up after this `time`")
}

// A limit is a time that something may take. None at all would be no time to
// answer in.
type limit time.Duration

func (l *limit) String() string { return time.Duration(*l).String() }
func (l *limit) Type() string   { return "duration" }

func (l *limit) Set(text string) error {
	d, err := time.ParseDuration(text)
	switch {
	case err != nil:
		return errors.New("it is not a time such as 30s")
	case d <= 0:
		return errors.New("that is no time to answer in")
	}
	*l = limit(d)
	return nil
}

// named refuses flags that are there with nothing in them: a script's variable
// was empty.
func named(cmd *cobra.Command, flags ...string) error {
	for _, name := range flags {
		f := cmd.Flags().Lookup(name)
		empty := f.Value.String() == ""
		if list, ok := f.Value.(pflag.SliceValue); ok {
			empty = slices.Contains(list.GetSlice(), "")
		}
		if f.Changed && empty {
			return usage(fmt.Errorf("--%s is empty", name))
		}
	}
	return nil
}

// workload connects to the Workload API.
func (e *endpoints) workload() (*client, error) {
	path, err := workloadPlace.find(e.socket)
	if err != nil {
		return nil, err
	}
	return dial(path)
}

// operator connects to the admin socket.
func (e *endpoints) operator() (*client, error) {
	path, err := adminPlace.find(e.admin)
	if err != nil {
		return nil, err
	}
	return dial(path)
}

// within runs calls on a connection of their own, in the time that the flags
// give them.
func (e *endpoints) within(ctx context.Context, connect func() (*client, error), calls func(context.Context, *client) error) error {
	c, err := connect()
	if err != nil {
		return err
	}
	defer c.Close()
	ctx, cancel := context.WithTimeout(withHeader(ctx), e.timeout)
	defer cancel()
	return c.fail(calls(ctx, c))
}

// withHeader adds what the Workload API asks of each call (Workload Endpoint §6).
func withHeader(ctx context.Context) context.Context {
	return metadata.AppendToOutgoingContext(ctx, "workload.spiffe.io", "true")
}

// A client is a connection to one of the daemon's sockets.
type client struct {
	*grpc.ClientConn
	path string

	mu     sync.Mutex
	failed error // of the last attempt to connect, nil when it succeeded
}

func dial(path string) (*client, error) {
	c := &client{path: path}
	conn, err := grpc.NewClient("passthrough:///deputy",
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(c.connect),
		grpc.WithAuthority("localhost"),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxMessage)),
	)
	if err != nil {
		return nil, err
	}
	c.ClientConn = conn
	return c, nil
}

func (c *client) connect(ctx context.Context, _ string) (net.Conn, error) {
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", c.path)
	c.mu.Lock()
	c.failed = err
	c.mu.Unlock()
	return conn, err
}

// fail turns the error of a call into an unreachableError where the daemon
// could not be reached at all.
func (c *client) fail(err error) error {
	if err == nil || code(err) != codes.Unavailable {
		return err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.failed == nil {
		return err
	}
	failed := c.failed
	var op *net.OpError
	if errors.As(failed, &op) {
		failed = op.Err
	}
	return &unreachableError{c.path, failed}
}
