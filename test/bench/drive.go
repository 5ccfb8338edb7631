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
	"syscall"
	"time"

	secretv3 "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
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
	alone              int
	only               string
	profile            string
}

func (o options) wants(name string) bool { return o.only == "" || o.only == name }

// place is where clients run: in a container, or on this host.
type place struct {
	dir    string // with deputy/public and bare in it, seen under the same path by clients
	client func(args ...string) *exec.Cmd
	config string   // an entry for the clients, with the attestors that it needs
	spire  []string // the selectors of that entry for SPIRE
	docker string   // socket of the engine, empty if there is none
	what   string   // in words
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
	fmt.Printf("%d callers, two on a connection; p50, p99 and the server's processor time for a call in µs;\nrates are medians of %d measurements, ratios medians of pairs\n", o.workers, o.rounds)

	deputy, err := startDeputy(o.deputy, filepath.Join(dir, "deputy"), p.config)
	if err != nil {
		return err
	}
	defer deputy.stop()
	response := filepath.Join(dir, "response")
	for what, file := range map[string]string{"x509": response, "sds": response + ".sds"} {
		saved, err := p.client("save", deputy.socket, what).Output()
		if err != nil {
			return fmt.Errorf("fetch what the bare server is to repeat: %w\n%s", explain(err), deputy.log)
		}
		if err := os.WriteFile(file, saved, 0o600); err != nil {
			return err
		}
	}
	bare, err := start(exec.Command(self, "bare", filepath.Join(dir, "deputy/public/bare.sock"), response), filepath.Join(dir, "deputy/public/bare.sock"))
	if err != nil {
		return err
	}
	defer bare.stop()

	rows := []row{
		{"x509", "X.509 fetch, stream per call", 0.8},
		{"connect", "X.509 fetch, connection per call", 0.7},
		{"jwt", "JWT mint, audience never seen", 0.8},
		{"validate", "JWT validate", 0.8},
		{"sds", "SDS fetch, stream per call", 0.8},
		{"secrets", "SDS fetch, FetchSecrets", 0.8},
	}
	if err := table(o, p, "bare gRPC", rows, deputy, bare); err != nil {
		return fmt.Errorf("%w\n%s", err, deputy.log)
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
	if o.wants("push") {
		if err := push(o, p, deputy); err != nil {
			return fmt.Errorf("push: %w\n%s", err, deputy.log)
		}
	}
	if o.wants("spire") {
		if err := besideSPIRE(o, p, deputy); err != nil {
			return fmt.Errorf("%w\n%s", err, deputy.log)
		}
	}
	deputy.stop()
	if o.wants("rotation") {
		return rotation(o, p)
	}
	return nil
}

// A row is an operation in words, with the ratio that is the target.
type row struct {
	op, title string
	target    float64
}

// table measures the rows that are wanted.
func table(o options, p place, name string, rows []row, deputy, other *server) error {
	rows = slices.DeleteFunc(rows, func(r row) bool { return !o.wants(r.op) })
	if len(rows) == 0 {
		return nil
	}
	fmt.Printf("\n%-34s %25s %25s %6s %7s\n%-34s", "", "deputy", name, "ratio", "target", "")
	for range 2 {
		fmt.Printf(" %7s %5s %5s %5s", "ops/s", "p50", "p99", "cpu")
	}
	fmt.Println()
	for _, r := range rows {
		if err := compare(o, p, r, deputy, other); err != nil {
			return fmt.Errorf("%s: %w", r.title, err)
		}
	}
	return nil
}

// besideSPIRE compares with SPIRE's agent what that serves from memory: for a
// new JWT-SVID it asks its server, which is another thing.
func besideSPIRE(o options, p place, deputy *server) error {
	if _, _, err := spireBinaries(); err != nil {
		fmt.Println("\nbeside spire-agent: not measured, `make bench-peers` builds it first:", err)
		return nil
	}
	agent, stop, err := startSPIRE(p)
	if err != nil {
		return err
	}
	defer stop()
	o.only = ""
	fmt.Println("\nspire-agent gathers evidence at each call, and reads the whole executable for its digest")
	return table(o, p, "spire-agent "+spireVersion, []row{
		{"x509", "X.509 fetch, stream per call", 4},
		{"connect", "X.509 fetch, connection per call", 0},
		{"validate", "JWT validate", 0},
	}, deputy, agent)
}

// save prints the first message of FetchX509SVID, or the answer to
// FetchSecrets, marshalled.
func save(socket, what string) error {
	conn, err := dial(socket)
	if err != nil {
		return err
	}
	defer conn.Close()
	var r proto.Message
	if what == "sds" {
		r, err = secretv3.NewSecretDiscoveryServiceClient(conn).FetchSecrets(context.Background(), twoSecrets())
	} else {
		r, err = fetchX509(context.Background(), workload.NewSpiffeWorkloadAPIClient(conn))
	}
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

// compare measures both servers in turn and prints a row. Who comes first
// changes from round to round.
func compare(o options, p place, r row, deputy, other *server) error {
	both := [2]*server{deputy, other}
	var samples [2][]sample
	for round := range o.rounds {
		for turn := range both {
			i := (round + turn) % 2
			s, err := sampleOf(o, p, r.op, both[i])
			if err != nil {
				return err
			}
			samples[i] = append(samples[i], s)
		}
	}
	if o.profile != "" {
		if err := o.profiled(deputy, r.op, func() error {
			_, err := sampleOf(o, p, r.op, deputy)
			return err
		}); err != nil {
			return err
		}
	}
	ratios := make([]float64, o.rounds)
	for i := range ratios {
		ratios[i] = samples[0][i].perSecond() / samples[1][i].perSecond()
	}
	fmt.Printf("%-34s", r.title)
	for _, all := range samples {
		s := median(all)
		fmt.Printf(" %7.0f %5d %5d %5d", s.perSecond(), s.P50.Microseconds(), s.P99.Microseconds(), s.cpuEach().Microseconds())
	}
	fmt.Printf(" %6.2f", middle(ratios))
	if r.target > 0 {
		fmt.Printf(" %7s", fmt.Sprintf("≥ %g", r.target))
	}
	fmt.Println()
	return nil
}

// sampleOf has a client measure the server.
func sampleOf(o options, p place, op string, of *server) (sample, error) {
	var s sample
	before, err := of.cpu()
	if err != nil {
		return s, err
	}
	out, err := p.client("measure", op, of.socket, fmt.Sprint(o.workers), o.length.String()).Output()
	if err != nil {
		return s, explain(err)
	}
	if err := json.Unmarshal(out, &s); err != nil {
		return s, err
	}
	after, err := of.cpu()
	s.cpu = after - before
	return s, err
}

func median(s []sample) sample {
	slices.SortFunc(s, func(a, b sample) int { return cmp.Compare(a.perSecond(), b.perSecond()) })
	return s[len(s)/2]
}

func middle[T cmp.Ordered](s []T) T {
	s = slices.Sorted(slices.Values(s))
	return s[len(s)/2]
}

// holders are processes that hold streams.
type holders struct {
	cmd   *exec.Cmd
	in    io.WriteCloser
	lines chan string // what they print of each message after the first
}

// hold returns when each process has had the first message of all its streams.
func (p place) hold(socket string, processes, streams int, what string) (*holders, error) {
	h := &holders{cmd: p.client("hold", socket, fmt.Sprint(processes), fmt.Sprint(streams), what), lines: make(chan string, processes*streams)}
	h.cmd.Stderr = os.Stderr
	var err error
	if h.in, err = h.cmd.StdinPipe(); err != nil {
		return nil, err
	}
	out, err := h.cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := h.cmd.Start(); err != nil {
		return nil, err
	}
	go func() {
		defer close(h.lines)
		for s := bufio.NewScanner(out); s.Scan(); {
			h.lines <- s.Text()
		}
	}()
	for ready := 0; ready < processes; {
		line, ok := <-h.lines
		if !ok {
			h.stop()
			return nil, errors.New("a holder of streams ended")
		}
		if line == "ready" {
			ready++
		}
	}
	return h, nil
}

func (h *holders) stop() {
	h.in.Close()
	for range h.lines {
	}
	h.cmd.Wait()
}

// memory opens many streams on each server and prints what each costs.
func memory(o options, p place, deputy, bare *server) error {
	var per [2]float64
	for i, s := range []*server{deputy, bare} {
		before, err := s.resident()
		if err != nil {
			return err
		}
		h, err := p.hold(s.socket, o.processes, o.streams, "x509")
		if err != nil {
			return err
		}
		after, err := s.resident()
		h.stop()
		if err != nil {
			return err
		}
		per[i] = float64(after-before) / float64(o.processes*o.streams)
	}
	fmt.Printf("\n%-34s %8.1f KiB, of bare gRPC %.1f KiB, ratio %.2f, target ≤ 30 KiB\n", fmt.Sprintf("memory per stream, %d of them", o.processes*o.streams), per[0], per[1], per[0]/per[1])
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
	start, spent := time.Now(), ownCPU()
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
	return (ownCPU() - spent) / n, nil
}

// ownCPU is the processor time that this process has used.
func ownCPU() time.Duration {
	var r syscall.Rusage
	syscall.Getrusage(syscall.RUSAGE_SELF, &r)
	return time.Duration(r.Utime.Nano() + r.Stime.Nano())
}

// rotation has processes hold streams of short SVIDs through several
// rotations, in two shapes: what is signed is one SVID per process, what is sent
// one message per stream.
func rotation(o options, p place) error {
	const ttl = 6 * time.Second // short, to see many rotations
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
	fmt.Printf("\nrotation of SVIDs of %s; a key and a certificate cost %s of processor time, target ≤ 2 ×;\nwhat comes on top is attesting each process anew, and a message for each stream\n%-34s %9s %9s %6s %6s %12s %10s\n", ttl, each.Round(time.Microsecond),
		"", "rotations", "cpu/SVID", "ratio", "target", "cpu/message", "late, none")
	for _, shape := range [][2]int{{o.alone, 1}, {o.processes, o.streams}} {
		if err := rotate(s, p, shape[0], shape[1], ttl, each); err != nil {
			return fmt.Errorf("%w\n%s", err, s.log)
		}
	}
	return nil
}

func rotate(s *server, p place, processes, streams int, ttl, each time.Duration) error {
	h, err := p.hold(s.socket, processes, streams, "x509")
	if err != nil {
		return err
	}
	defer h.stop()
	before, err := s.cpu()
	if err != nil {
		return err
	}
	start := time.Now()
	last := make(map[[2]int]time.Duration) // since start, per process and stream
	late, messages := 0, 0
	for end := time.After(4 * ttl); ; {
		var line string
		select {
		case <-end:
		case line = <-h.lines:
		}
		if line == "" {
			break
		}
		var stream [2]int
		var at int64
		if _, err := fmt.Sscan(line, &stream[0], &stream[1], &at); err != nil {
			return err
		}
		since := time.Unix(0, at).Sub(start)
		if since-last[stream] > ttl {
			late++
		}
		last[stream] = since
		messages++
	}
	after, err := s.cpu()
	if err != nil {
		return err
	}
	if messages == 0 {
		return errors.New("no SVID was rotated")
	}
	spent := after - before
	issued := time.Duration(messages / streams)
	perSVID := spent / issued
	ratio := float64(perSVID) / float64(each)
	target := "met"
	if ratio > 2 {
		target = "missed"
	}
	fmt.Printf("%-34s %9.1f %9d %6.2f %6s %12d %5d %4d\n", fmt.Sprintf("%d processes, %d streams each", processes, streams),
		float64(messages)/float64(processes*streams), perSVID.Microseconds(), ratio, target,
		(spent / time.Duration(messages)).Microseconds(), late, processes*streams-len(last))
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
	for _, row := range []struct {
		title string
		took  []time.Duration
	}{{"entry added, SVID in hand", added}, {"entry deleted, stream ended", ended}} {
		fmt.Printf("%-34s %8.1f ms, at most %.1f ms of %d times, target ≤ 50 ms\n", row.title,
			middle(row.took).Seconds()*1000, slices.Max(row.took).Seconds()*1000, len(row.took))
	}
	return nil
}

func create(c entryv1.EntryClient, path string, selectors ...string) (string, error) {
	var all []*types.Selector
	for _, s := range selectors {
		typ, value, _ := strings.Cut(s, ":")
		all = append(all, &types.Selector{Type: typ, Value: value})
	}
	r, err := c.BatchCreateEntry(context.Background(), &entryv1.BatchCreateEntryRequest{Entries: []*types.Entry{{
		SpiffeId:  &types.SPIFFEID{TrustDomain: "bench.example", Path: path},
		ParentId:  &types.SPIFFEID{TrustDomain: "bench.example", Path: "/spire/server"},
		Selectors: all,
	}}})
	if err != nil {
		return "", err
	}
	if st := r.Results[0].Status; st.Code != 0 {
		return "", fmt.Errorf("create %s: %s", path, st.Message)
	}
	return r.Results[0].Entry.Id, nil
}
