package main

import (
	"bufio"
	"cmp"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/protobuf/proto"
)

type options struct {
	deputy             string
	length             time.Duration
	rounds, workers    int
	processes, streams int
	only               string
}

func (o options) wants(name string) bool { return o.only == "" || o.only == name }

// place is where clients run: in a container, or on this host.
type place struct {
	dir    string // with deputy/public and bare in it, seen under the same path by clients
	client func(args ...string) *exec.Cmd
	config string // an entry for the clients, with the attestors that it needs
	what   string // in words
}

func drive(o options) error {
	var err error
	if o.deputy, err = filepath.Abs(o.deputy); err != nil {
		return err
	}
	self, err := os.Executable()
	if err != nil {
		return err
	}
	dir, err := os.MkdirTemp("", "deputy-bench-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	if err := os.Chmod(dir, 0o755); err != nil {
		return err
	}
	p, done, err := clients(self, dir)
	if err != nil {
		return err
	}
	defer done()
	fmt.Printf("%d processors, %s; clients run %s\n", runtime.NumCPU(), runtime.Version(), p.what)

	deputy, err := startDeputy(o.deputy, filepath.Join(dir, "deputy"), p.config)
	if err != nil {
		return err
	}
	defer deputy.stop()
	saved, err := p.client("save", deputy.socket).Output()
	if err != nil {
		return fmt.Errorf("fetch what the bare server is to repeat: %w\n%s", explain(err), deputy.log)
	}
	response := filepath.Join(dir, "response")
	if err := os.WriteFile(response, saved, 0o600); err != nil {
		return err
	}
	bare, err := start(exec.Command(self, "bare", filepath.Join(dir, "deputy/public/bare.sock"), response), filepath.Join(dir, "deputy/public/bare.sock"))
	if err != nil {
		return err
	}
	defer bare.stop()

	fmt.Printf("\n%-34s %21s %21s %7s\n%-34s %9s %5s %5s %9s %5s %5s %7s\n", "", "deputy", "bare gRPC", "ratio",
		"", "ops/s", "p50", "p99", "ops/s", "p50", "p99", "")
	for _, row := range []struct{ op, title string }{
		{"x509", "X.509 fetch, stream per call"},
		{"connect", "X.509 fetch, connection per call"},
		{"jwt", "JWT mint, audience never seen"},
		{"validate", "JWT validate"},
	} {
		if !o.wants(row.op) {
			continue
		}
		if err := compare(o, p, row.op, row.title, deputy, bare); err != nil {
			return fmt.Errorf("%s: %w\n%s", row.title, err, deputy.log)
		}
	}
	if o.wants("memory") {
		if err := memory(o, p, deputy, bare); err != nil {
			return fmt.Errorf("memory: %w\n%s", err, deputy.log)
		}
	}
	if o.wants("change") {
		if err := change(self, deputy); err != nil {
			return fmt.Errorf("change: %w\n%s", err, deputy.log)
		}
	}
	deputy.stop()
	if o.wants("rotation") {
		return rotation(o, p)
	}
	return nil
}

// save prints the first message of FetchX509SVID, marshalled.
func save(socket string) error {
	conn, err := dial(socket)
	if err != nil {
		return err
	}
	defer conn.Close()
	r, err := fetchX509(context.Background(), workload.NewSpiffeWorkloadAPIClient(conn))
	if err != nil {
		return err
	}
	raw, err := proto.Marshal(r)
	if err != nil {
		return err
	}
	_, err = os.Stdout.Write(raw)
	return err
}

func explain(err error) error {
	var exit *exec.ExitError
	if errors.As(err, &exit) && len(exit.Stderr) > 0 {
		return fmt.Errorf("%w: %s", err, strings.TrimSpace(string(exit.Stderr)))
	}
	return err
}

// compare measures both servers in turn and prints a row.
func compare(o options, p place, op, title string, deputy, bare *server) error {
	var d, b []sample
	for range o.rounds {
		for _, m := range []struct {
			s   *server
			all *[]sample
		}{{deputy, &d}, {bare, &b}} {
			out, err := p.client("measure", op, m.s.socket, fmt.Sprint(o.workers), o.length.String()).Output()
			if err != nil {
				return explain(err)
			}
			var s sample
			if err := json.Unmarshal(out, &s); err != nil {
				return err
			}
			*m.all = append(*m.all, s)
		}
	}
	ratios := make([]float64, len(d))
	for i := range d {
		ratios[i] = d[i].perSecond() / b[i].perSecond()
	}
	md, mb := median(d), median(b)
	fmt.Printf("%-34s %9.0f %5d %5d %9.0f %5d %5d %7.2f\n", title,
		md.perSecond(), md.P50.Microseconds(), md.P99.Microseconds(),
		mb.perSecond(), mb.P50.Microseconds(), mb.P99.Microseconds(), middle(ratios))
	return nil
}

func median(s []sample) sample {
	slices.SortFunc(s, func(a, b sample) int { return cmp.Compare(a.perSecond(), b.perSecond()) })
	return s[len(s)/2]
}

func middle[T cmp.Ordered](s []T) T {
	s = slices.Sorted(slices.Values(s))
	return s[len(s)/2]
}

// holder is a process that holds streams.
type holder struct {
	cmd   *exec.Cmd
	in    io.WriteCloser
	lines chan string
}

func startHolders(o options, p place, socket string) ([]*holder, func(), error) {
	var hs []*holder
	stop := func() {
		for _, h := range hs {
			h.in.Close()
		}
		for _, h := range hs {
			for range h.lines {
			}
			h.cmd.Wait()
		}
	}
	for range o.processes {
		h := &holder{cmd: p.client("hold", socket, fmt.Sprint(o.streams)), lines: make(chan string, o.streams)}
		h.cmd.Stderr = os.Stderr
		in, err := h.cmd.StdinPipe()
		if err != nil {
			stop()
			return nil, nil, err
		}
		out, err := h.cmd.StdoutPipe()
		if err != nil {
			stop()
			return nil, nil, err
		}
		if err := h.cmd.Start(); err != nil {
			stop()
			return nil, nil, err
		}
		h.in = in
		go func() {
			defer close(h.lines)
			for s := bufio.NewScanner(out); s.Scan(); {
				h.lines <- s.Text()
			}
		}()
		hs = append(hs, h)
		if line := <-h.lines; line != "ready" {
			stop()
			return nil, nil, fmt.Errorf("a holder of streams said %q", line)
		}
	}
	return hs, stop, nil
}

// memory opens many streams on each server and prints what each costs.
func memory(o options, p place, deputy, bare *server) error {
	var per [2]float64
	for i, s := range []*server{deputy, bare} {
		before, err := s.resident()
		if err != nil {
			return err
		}
		_, stop, err := startHolders(o, p, s.socket)
		if err != nil {
			return err
		}
		after, err := s.resident()
		stop()
		if err != nil {
			return err
		}
		per[i] = float64(after-before) / float64(o.processes*o.streams)
	}
	fmt.Printf("%-34s %17.1f KiB %17.1f KiB %7.2f\n", fmt.Sprintf("memory per stream, %d of them", o.processes*o.streams), per[0], per[1], per[0]/per[1])
	return nil
}

// signature is what one X.509-SVID costs in processor time: a key and a certificate.
func signature() (time.Duration, error) {
	ca, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return 0, err
	}
	uri := &url.URL{Scheme: "spiffe", Host: "bench.example", Path: "/agent/bench"}
	const n = 500
	start := time.Now()
	for i := range n {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			return 0, err
		}
		t := &x509.Certificate{SerialNumber: big.NewInt(int64(i + 1)), NotBefore: start, NotAfter: start.Add(time.Hour), URIs: []*url.URL{uri}}
		if _, err := x509.CreateCertificate(rand.Reader, t, t, key.Public(), ca); err != nil {
			return 0, err
		}
	}
	return time.Since(start) / n, nil
}

// rotation holds many streams of short SVIDs through several rotations.
func rotation(o options, p place) error {
	const ttl = 20 * time.Second
	dir := filepath.Join(p.dir, "deputy")
	if err := os.RemoveAll(dir); err != nil {
		return err
	}
	config := strings.Replace(p.config, "entry \"/agent/bench\" {", fmt.Sprintf("entry \"/agent/bench\" {\n  x509_ttl = %q", ttl), 1)
	s, err := startDeputy(o.deputy, dir, config)
	if err != nil {
		return err
	}
	defer s.stop()
	each, err := signature()
	if err != nil {
		return err
	}
	hs, stop, err := startHolders(o, p, s.socket)
	if err != nil {
		return fmt.Errorf("%w\n%s", err, s.log)
	}
	before, err := s.cpu()
	if err != nil {
		return err
	}
	start := time.Now()
	updates := 0
	last := make(map[[2]int]time.Duration) // since start, per process and stream
	var late int
	for deadline := time.After(2 * ttl); ; {
		select {
		case <-deadline:
		default:
			idle := true
			for i, h := range hs {
				select {
				case line, ok := <-h.lines:
					if !ok {
						return errors.New("a holder of streams ended")
					}
					idle = false
					var n int
					var at int64
					if _, err := fmt.Sscan(line, &n, &at); err != nil {
						return err
					}
					since := time.Unix(0, at).Sub(start)
					if since-last[[2]int{i, n}] > ttl {
						late++
					}
					last[[2]int{i, n}] = since
					updates++
				default:
				}
			}
			if idle {
				time.Sleep(time.Millisecond)
			}
			continue
		}
		break
	}
	after, err := s.cpu()
	stop()
	if err != nil {
		return err
	}
	missed := o.processes*o.streams - len(last)
	rounds := float64(updates) / float64(o.processes*o.streams)
	signatures := time.Duration(rounds * float64(o.processes) * float64(each))
	fmt.Printf("\nrotation: %d streams of %d processes, SVIDs of %s, %.1f rotations in %s\n", o.processes*o.streams, o.processes, ttl, rounds, time.Since(start).Round(time.Second))
	fmt.Printf("  streams without a new SVID %d, later than their SVID %d\n", missed, late)
	fmt.Printf("  processor time %s: %s a message, of which keys and certificates are %s in all (%s each)\n",
		after-before, ((after - before) / time.Duration(max(updates, 1))).Round(time.Microsecond), signatures.Round(time.Millisecond), each.Round(time.Microsecond))
	return nil
}

// change measures how soon a created entry gives an SVID on a waiting caller's
// next try, and how soon a deleted one ends the stream.
func change(self string, s *server) error {
	conn, err := dial(s.admin)
	if err != nil {
		return err
	}
	defer conn.Close()
	entries := entryv1.NewEntryClient(conn)
	sum, err := exec.Command("sha256sum", self).Output()
	if err != nil {
		return err
	}
	wc, err := dial(s.socket)
	if err != nil {
		return err
	}
	defer wc.Close()
	api := workload.NewSpiffeWorkloadAPIClient(wc)
	var added, ended []time.Duration
	for i := range 30 {
		// A stream that is open for another reason hears of the new entry; the
		// first entry keeps it open.
		keep, err := create(entries, fmt.Sprintf("/keep/%d", i), "unix:sha256:"+string(sum[:64]))
		if err != nil {
			return err
		}
		ctx, cancel := context.WithCancel(withHeader(context.Background()))
		stream, err := api.FetchX509SVID(ctx, &workload.X509SVIDRequest{})
		if err != nil {
			cancel()
			return err
		}
		if _, err := stream.Recv(); err != nil {
			cancel()
			return err
		}
		t := time.Now()
		more, err := create(entries, fmt.Sprintf("/more/%d", i), "unix:sha256:"+string(sum[:64]))
		if err != nil {
			cancel()
			return err
		}
		if r, err := stream.Recv(); err != nil || len(r.Svids) != 2 {
			cancel()
			return fmt.Errorf("after an entry was added: %v, %w", r, err)
		}
		added = append(added, time.Since(t))
		t = time.Now()
		if _, err := entries.BatchDeleteEntry(context.Background(), &entryv1.BatchDeleteEntryRequest{Ids: []string{keep, more}}); err != nil {
			cancel()
			return err
		}
		for err == nil {
			_, err = stream.Recv()
		}
		ended = append(ended, time.Since(t))
		cancel()
	}
	fmt.Printf("%-34s %17.1f ms (p50 of %d)\n", "entry added, SVID in hand", middle(added).Seconds()*1000, len(added))
	fmt.Printf("%-34s %17.1f ms (p50 of %d)\n", "entry deleted, stream ended", middle(ended).Seconds()*1000, len(ended))
	return nil
}

func create(c entryv1.EntryClient, path, selector string) (string, error) {
	typ, value, _ := strings.Cut(selector, ":")
	r, err := c.BatchCreateEntry(context.Background(), &entryv1.BatchCreateEntryRequest{Entries: []*types.Entry{{
		SpiffeId:  &types.SPIFFEID{TrustDomain: "bench.example", Path: path},
		ParentId:  &types.SPIFFEID{TrustDomain: "bench.example", Path: "/spire/server"},
		Selectors: []*types.Selector{{Type: typ, Value: value}},
	}}})
	if err != nil {
		return "", err
	}
	if st := r.Results[0].Status; st.Code != 0 {
		return "", fmt.Errorf("create %s: %s", path, st.Message)
	}
	return r.Results[0].Entry.Id, nil
}
