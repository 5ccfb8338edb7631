package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
)

// The agents of the demonstration. They know go-spiffe and the address of the
// socket, and hold no secret.

const audience = "https://tools.example.org"

// agent runs as the agent that a role names.
func agent(role, socket string, args []string) error {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	at := workloadapi.WithAddr("unix://" + socket)
	switch role {
	case "serve":
		return serve(ctx, at, args[0], args[1])
	case "call":
		return call(ctx, at, args[0], args[1])
	case "whoami":
		return whoami(ctx, at)
	case "stay":
		if err := whoami(ctx, at); err != nil {
			return err
		}
		<-ctx.Done()
		return nil
	}
	return fmt.Errorf("no role %q", role)
}

// whoami prints the IDs that the socket gives to this process.
func whoami(ctx context.Context, at workloadapi.ClientOption) error {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	c, err := workloadapi.New(ctx, at)
	if err != nil {
		return err
	}
	defer c.Close()
	svids, err := c.FetchX509SVIDs(ctx)
	if err != nil {
		return err
	}
	for _, s := range svids {
		fmt.Printf("%s, valid until %s\n", s.ID, s.Certificates[0].NotAfter.Local().Format(time.TimeOnly))
	}
	return nil
}

// serve answers one kind of caller over mTLS, and prints its own SVID each time
// that it is renewed.
func serve(ctx context.Context, at workloadapi.ClientOption, address, peer string) error {
	allowed, err := spiffeid.FromString(peer)
	if err != nil {
		return err
	}
	source, err := workloadapi.NewX509Source(ctx, workloadapi.WithClientOptions(at))
	if err != nil {
		return err
	}
	defer source.Close()
	l, err := spiffetls.ListenWithMode(ctx, "unix", address, spiffetls.MTLSServerWithSource(tlsconfig.AuthorizeID(allowed), source))
	if err != nil {
		return err
	}
	defer l.Close()
	context.AfterFunc(ctx, func() { l.Close() })
	if err := os.Chmod(address, 0o666); err != nil {
		return err
	}
	go renewals(ctx, source)
	for {
		conn, err := l.Accept()
		if errors.Is(err, net.ErrClosed) {
			return nil
		}
		if err != nil {
			return err
		}
		caller, err := spiffetls.PeerIDFromConn(conn)
		if err == nil {
			fmt.Fprintf(conn, "hello %s\n", caller)
		}
		conn.Close()
	}
}

// renewals prints a line for each SVID of the source.
func renewals(ctx context.Context, source *workloadapi.X509Source) {
	for {
		if s, err := source.GetX509SVID(); err == nil {
			c := s.Certificates[0]
			fmt.Printf("SVID %s until %s\n", short(c.SerialNumber.Text(16)), c.NotAfter.Local().Format(time.TimeOnly))
		}
		select {
		case <-source.Updated():
		case <-ctx.Done():
			return
		}
	}
}

// call speaks to the server, and then gets a token for a tool and validates it
// as that tool would.
func call(ctx context.Context, at workloadapi.ClientOption, address, peer string) error {
	server, err := spiffeid.FromString(peer)
	if err != nil {
		return err
	}
	conn, err := spiffetls.DialWithMode(ctx, "unix", address, spiffetls.MTLSClientWithSourceOptions(tlsconfig.AuthorizeID(server), workloadapi.WithClientOptions(at)))
	if err != nil {
		return err
	}
	defer conn.Close()
	reply, err := bufio.NewReader(conn).ReadString('\n')
	if err != nil {
		return err
	}
	fmt.Printf("mTLS with %s; it says: %s", server, reply)

	c, err := workloadapi.New(ctx, at)
	if err != nil {
		return err
	}
	defer c.Close()
	token, err := c.FetchJWTSVID(ctx, jwtsvid.Params{Audience: audience})
	if err != nil {
		return err
	}
	fmt.Printf("JWT-SVID for %s: %s…, %d bytes\n", audience, token.Marshal()[:24], len(token.Marshal()))
	valid, err := c.ValidateJWTSVID(ctx, token.Marshal(), audience)
	if err != nil {
		return err
	}
	fmt.Printf("validated: it is %s until %s\n", valid.ID, valid.Expiry.Local().Format(time.TimeOnly))
	if _, err := c.ValidateJWTSVID(ctx, token.Marshal(), "https://elsewhere.example.org"); err == nil {
		return errors.New("a token for one audience was valid for another")
	}
	fmt.Println("for another audience it is refused")
	return nil
}

func short(s string) string { return s[:min(12, len(s))] }
