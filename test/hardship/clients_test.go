package hardship

import (
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protowire"

	adminv1 "github.com/deputy-id/deputy/proto/deputy/admin/v1"
	"github.com/deputy-id/deputy/test/need"
	"github.com/deputy-id/deputy/test/process"
	"github.com/deputy-id/deputy/test/wait"
)

// Users of the tests: numbers that no distribution gives away.
const otherUID, crowdUID = 61011, 61012

const others = "entry \"/agent/other\" {\n  selectors = [\"unix:uid:61011\"]\n}\n"

// othersAreServed wants another user to get its identity, and soon.
func (d *host) othersAreServed(t *testing.T) {
	t.Helper()
	begin := time.Now()
	out, err := process.As(otherUID, d.Command("fetch", "x509")).CombinedOutput()
	if err != nil || !strings.Contains(string(out), "/agent/other") {
		t.Fatalf("another user: %v\n%s", err, out)
	}
	// Less than it takes to send one silent client away.
	if took := time.Since(begin); took > 4*time.Second {
		t.Errorf("another user waited %s", took)
	}
}

// descriptors are those that the daemon has open.
func (d *host) descriptors(t *testing.T) int {
	t.Helper()
	all, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", d.PID()))
	if err != nil {
		t.Fatal(err)
	}
	return len(all)
}

// rss is the daemon's resident memory in KiB, after a collection.
func (d *host) rss(t *testing.T) int {
	t.Helper()
	d.profile(t, adminv1.ProfileRequest_KIND_HEAP) // collects, and gives memory back
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", d.PID()))
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(text), "VmRSS:")
	kib, err := strconv.Atoi(strings.Fields(rest)[0])
	if err != nil {
		t.Fatal(err)
	}
	return kib
}

// goroutines are the daemon's.
func (d *host) goroutines(t *testing.T) (n int) {
	t.Helper()
	z, err := gzip.NewReader(bytes.NewReader(d.profile(t, adminv1.ProfileRequest_KIND_GOROUTINE)))
	if err != nil {
		t.Fatal(err)
	}
	raw, err := io.ReadAll(z)
	if err != nil {
		t.Fatal(err)
	}
	// pprof's Profile has samples as field 2, and these have values as field 2:
	// one each, and so not packed.
	each(t, raw, func(number protowire.Number, _ uint64, sample []byte) {
		if number != 2 {
			return
		}
		each(t, sample, func(number protowire.Number, v uint64, _ []byte) {
			if number == 2 {
				n += int(v)
			}
		})
	})
	return n
}

// each calls f with each field of a message that is a number or has a length.
func each(t *testing.T, msg []byte, f func(protowire.Number, uint64, []byte)) {
	t.Helper()
	for len(msg) > 0 {
		number, typ, n := protowire.ConsumeTag(msg)
		if n < 0 {
			t.Fatal(protowire.ParseError(n))
		}
		msg = msg[n:]
		switch typ {
		case protowire.VarintType:
			v, n := protowire.ConsumeVarint(msg)
			if n < 0 {
				t.Fatal(protowire.ParseError(n))
			}
			f(number, v, nil)
			msg = msg[n:]
		case protowire.BytesType:
			v, n := protowire.ConsumeBytes(msg)
			if n < 0 {
				t.Fatal(protowire.ParseError(n))
			}
			f(number, 0, v)
			msg = msg[n:]
		default:
			t.Fatalf("got a field of type %d, which pprof does not have", typ)
		}
	}
}

func (d *host) profile(t *testing.T, kind adminv1.ProfileRequest_Kind) []byte {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), wait.Patience)
	defer cancel()
	conn := dial(t, d.Admin)
	defer conn.Close()
	st, err := adminv1.NewAdminClient(conn).Profile(ctx, &adminv1.ProfileRequest{Kind: kind})
	if err != nil {
		t.Fatal(err)
	}
	var all []byte
	for {
		m, err := st.Recv()
		if errors.Is(err, io.EOF) {
			return all
		}
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, m.Chunk...)
	}
}

// hold is a role: so many connections to a socket that say nothing. It prints
// a line when they stand and, when the last was cut, after how long.
func hold(args []string) error {
	n, err := strconv.Atoi(args[1])
	if err != nil {
		return err
	}
	var wait sync.WaitGroup
	begin := time.Now()
	for range n {
		c, err := net.Dial("unix", args[0])
		if err != nil {
			return err
		}
		wait.Go(func() { io.Copy(io.Discard, c); c.Close() })
	}
	fmt.Println("held")
	wait.Wait()
	fmt.Println(time.Since(begin).Milliseconds())
	return nil
}

// crowd starts that role as a user of its own, and returns what it will say.
func (d *host) crowd(t *testing.T, n int) (lines func() string) {
	t.Helper()
	cmd := process.As(crowdUID, as("hold", d.Workload, strconv.Itoa(n)))
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	var errs bytes.Buffer
	cmd.Stderr = &errs
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
	return func() string {
		var line string
		if _, err := fmt.Fscanln(out, &line); err != nil {
			t.Fatalf("the crowd ended: %v %s", err, &errs)
		}
		return line
	}
}

func TestFiveHundredClientsThatSayNothing(t *testing.T) {
	need.Root(t, "processes of other users")
	t.Parallel()
	d := start(t, mine()+others)
	d.fetches(t, "/agent/me")
	d.othersAreServed(t)
	descriptors, goroutines := d.descriptors(t), d.goroutines(t)

	lines := d.crowd(t, 500)
	if l := lines(); l != "held" {
		t.Fatalf("got %q, want the connections to stand", l)
	}
	for range 5 {
		d.othersAreServed(t)
	}
	took, err := strconv.Atoi(lines())
	if err != nil {
		t.Fatal(err)
	}
	// Five seconds from its turn, and the last turns come a little later.
	if took < 4000 || took > 15000 {
		t.Errorf("they were cut after %d ms, want some 5 s, at most twice that", took)
	}
	d.returnsTo(t, descriptors, goroutines)
}

// returnsTo waits until the daemon has no more open than it had before.
func (d *host) returnsTo(t *testing.T, descriptors, goroutines int) {
	t.Helper()
	wait.UntilNil(t, func() error {
		if n := d.descriptors(t); n > descriptors+8 {
			return fmt.Errorf("got %d descriptors, want those %d of before", n, descriptors)
		}
		if n := d.goroutines(t); n > goroutines+16 {
			return fmt.Errorf("got %d goroutines, want those %d of before", n, goroutines)
		}
		return nil
	})
}

func TestTenThousandStreams(t *testing.T) {
	need.Root(t, "processes of other users")
	t.Parallel()
	d := start(t, mine()+others)
	d.fetches(t, "/agent/me")
	d.othersAreServed(t)
	memory, descriptors, goroutines := d.rss(t), d.descriptors(t), d.goroutines(t)

	const conns, streams = 10, 1000
	ctx, cancel := context.WithCancel(withHeader(t.Context()))
	defer cancel()
	var opened sync.WaitGroup
	failures := make(chan error, conns*streams)
	for range conns {
		api := workload.NewSpiffeWorkloadAPIClient(dial(t, d.Workload))
		for range streams {
			opened.Go(func() {
				st, err := api.FetchX509SVID(ctx, &workload.X509SVIDRequest{})
				if err == nil {
					_, err = st.Recv()
				}
				if err != nil {
					failures <- err
				}
			})
		}
	}
	d.othersAreServed(t) // while they open
	opened.Wait()
	select {
	case err := <-failures:
		t.Fatalf("%d streams failed, one with %v", len(failures)+1, err)
	default:
	}
	if n := d.goroutines(t); n < conns*streams {
		t.Fatalf("got %d goroutines, want the streams to be there", n)
	}
	d.othersAreServed(t) // while they stand
	cancel()
	d.othersAreServed(t)
	d.returnsTo(t, descriptors+2*conns, goroutines+8*conns) // the connections stay
	wait.UntilNil(t, func() error {
		if now := d.rss(t); now > memory+64<<10 {
			return fmt.Errorf("got %d KiB resident, want about the %d of before", now, memory)
		}
		return nil
	})
}

func withHeader(ctx context.Context) context.Context {
	return metadata.AppendToOutgoingContext(ctx, "workload.spiffe.io", "true")
}

// Each of these ends in an error that says what is wrong, and the one after it
// on the same connection is served.
func TestRequestsThatAreWrong(t *testing.T) {
	t.Parallel()
	d := start(t, mine())
	api := workload.NewSpiffeWorkloadAPIClient(dial(t, d.Workload))
	token := func(ctx context.Context, id string, audience ...string) error {
		_, err := api.FetchJWTSVID(ctx, &workload.JWTSVIDRequest{SpiffeId: id, Audience: audience})
		return err
	}
	validate := func(ctx context.Context, token string) error {
		_, err := api.ValidateJWTSVID(ctx, &workload.ValidateJWTSVIDRequest{Audience: "a", Svid: token})
		return err
	}
	for name, test := range map[string]struct {
		ask  func(context.Context) error
		bare bool // without the header
		want codes.Code
	}{
		"no header":              {ask: func(ctx context.Context) error { return token(ctx, "", "a") }, bare: true, want: codes.InvalidArgument},
		"no audience":            {ask: func(ctx context.Context) error { return token(ctx, "") }, want: codes.InvalidArgument},
		"empty audience":         {ask: func(ctx context.Context) error { return token(ctx, "", "") }, want: codes.InvalidArgument},
		"audience of half a MiB": {ask: func(ctx context.Context) error { return token(ctx, "", strings.Repeat("a", 1<<19)) }, want: codes.InvalidArgument},
		"audience of a MiB":      {ask: func(ctx context.Context) error { return token(ctx, "", strings.Repeat("a", 1<<20)) }, want: codes.InvalidArgument},
		"ID that is not held":    {ask: func(ctx context.Context) error { return token(ctx, "spiffe://hard.example/agent/other", "a") }, want: codes.PermissionDenied},
		"ID that is none":        {ask: func(ctx context.Context) error { return token(ctx, "spiffe://", "a") }, want: codes.InvalidArgument},
		"token that is none":     {ask: func(ctx context.Context) error { return validate(ctx, "x.y.z") }, want: codes.InvalidArgument},
		"token of half a MiB":    {ask: func(ctx context.Context) error { return validate(ctx, strings.Repeat("a.", 1<<18)) }, want: codes.InvalidArgument},
	} {
		t.Run(name, func(t *testing.T) {
			ctx, cancel := context.WithTimeout(t.Context(), wait.Patience)
			defer cancel()
			with := withHeader(ctx)
			if !test.bare {
				ctx = with
			}
			err := test.ask(ctx)
			if got := status.Code(err); got != test.want {
				t.Errorf("got %v, want %s", err, test.want)
			}
			if len(err.Error()) > 1000 {
				t.Errorf("got an error of %d bytes, want one that can be read", len(err.Error()))
			}
			if err := token(with, "", "a"); err != nil {
				t.Errorf("after it: %v", err)
			}
		})
	}
	d.Alive(t)
}

// What is no HTTP/2 at all is sent away, whatever it is.
func TestNoise(t *testing.T) {
	t.Parallel()
	d := start(t, mine())
	for name, noise := range map[string]string{
		"HTTP/1.1":           "GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
		"TLS":                "\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
		"a preface cut off":  "PRI * HTTP/2.0\r\n",
		"frames of rubbish":  "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + strings.Repeat("\xff", 1<<18),
		"zeroes without end": strings.Repeat("\x00", 1<<20),
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c := connect(t, d.Workload)
			c.SetDeadline(time.Now().Add(wait.Patience))
			io.WriteString(c, noise) // it may be cut before the end
			if _, err := io.Copy(io.Discard, c); errors.Is(err, os.ErrDeadlineExceeded) {
				t.Error("the connection was left open")
			}
		})
	}
	t.Cleanup(func() { d.fetches(t, "/agent/me") })
}

// touch is a role: it connects, and ends before it has answered.
func touch(args []string) error {
	_, err := net.Dial("unix", args[0])
	return err
}

func TestProcessesThatComeAndGo(t *testing.T) {
	t.Parallel()
	d := start(t, mine()+others)
	d.fetches(t, "/agent/me")
	descriptors, goroutines := d.descriptors(t), d.goroutines(t)
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for i := range 50 {
				var err error
				if i%5 == 0 {
					err = d.Try("fetch", "x509")
				} else {
					err = as("touch", d.Workload).Run()
				}
				if err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	d.returnsTo(t, descriptors, goroutines)
}
