package endpoint

import (
	"bytes"
	"io"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"golang.org/x/net/http2"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	"github.com/deputy-id/deputy/attestor"
	"github.com/deputy-id/deputy/attestor/peer"
)

// Each announces a MiB and does not send the last byte of it.
func TestUnfinishedMessagesAreBounded(t *testing.T) {
	const calls, fit, length = 12, 4, 1 << 20
	w := startLending(t, limits(func(l *Limits) { l.OwnerMessages = fit*length + length/2 }))
	b := startBrokering(t, limits(func(l *Limits) { l.OwnerMessages = fit*length + length/2 }))
	for name, c := range map[string]struct {
		w      *world
		wire   func() *wire
		method string
	}{
		"workload, unary":  {w.world, func() *wire { return w.wire(w.world.socket) }, "/SpiffeWorkloadAPI/ValidateJWTSVID"},
		"workload, stream": {w.world, func() *wire { return w.wire(w.world.socket) }, "/SpiffeWorkloadAPI/FetchX509SVID"},
		"secrets, unary":   {w.world, func() *wire { return w.wire(w.world.socket) }, "/envoy.service.secret.v3.SecretDiscoveryService/FetchSecrets"},
		"secrets, stream":  {w.world, func() *wire { return w.wire(w.world.socket) }, "/envoy.service.secret.v3.SecretDiscoveryService/StreamSecrets"},
		"health":           {w.world, func() *wire { return w.wire(w.world.socket) }, "/grpc.health.v1.Health/Check"},
		"reflection":       {w.world, func() *wire { return w.wire(w.world.socket) }, "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo"},
		"delegate, unary":  {w.world, func() *wire { return w.wire(w.socket) }, "/spire.api.agent.delegatedidentity.v1.DelegatedIdentity/FetchJWTSVIDs"},
		"delegate, stream": {w.world, func() *wire { return w.wire(w.socket) }, "/spire.api.agent.delegatedidentity.v1.DelegatedIdentity/SubscribeToX509SVIDs"},
		"broker, unary":    {b.world, func() *wire { return b.wire(runtimeID) }, "/spiffe.broker.API/FetchJWTSVID"},
		"broker, stream":   {b.world, func() *wire { return b.wire(runtimeID) }, "/spiffe.broker.API/SubscribeToX509SVID"},
	} {
		t.Run(name, func(t *testing.T) {
			flood := c.wire()
			flood.t = t
			held := 0
			for range calls {
				id := flood.open(c.method)
				if flood.say(id, announce(length, make([]byte, length-1)...), 16<<10, false) {
					held++
				} else if st := flood.status(id); st.Code() != codes.ResourceExhausted || !strings.Contains(st.Message(), "over budget") {
					t.Errorf("got %v, want ResourceExhausted and the reason", st)
				}
			}
			if held != fit {
				t.Errorf("%d messages are held, want %d", held, fit)
			}
			flood.conn.Close()
			eventually(t, "what they held is given back", func() bool {
				return c.w.budget.messages.Load() == 0 && c.w.budget.streams.Load() == 0
			})
		})
	}
}

// In pieces of one byte each, a message could take many times what it is long.
func TestMessageInManyPiecesTakesWhatItIsLong(t *testing.T) {
	const length, sent = 1 << 20, 1 << 18
	w := start(t)
	slow := w.wire(w.socket)
	id := slow.open("/SpiffeWorkloadAPI/ValidateJWTSVID")
	before := heap()
	slow.say(id, announce(length, make([]byte, sent)...), 1, false)
	// What came before this has arrived.
	if st := slow.ask("/SpiffeWorkloadAPI/FetchJWTSVID", announce(0)); st.Code() != codes.InvalidArgument {
		t.Fatalf("got %v, want InvalidArgument", st)
	}
	eventually(t, "it takes that", func() bool { return int64(heap())-int64(before) < 2*length })
}

// A message may be many times as large when it is read as it was.
func TestLongMessagesAreReadOneAfterAnother(t *testing.T) {
	const calls = 12
	extensions := bytes.Repeat([]byte{0x4a, 0}, maxMessage/8)
	body := protowire.AppendBytes(protowire.AppendTag(nil, 2, protowire.BytesType), extensions) // of a node
	before := heap()
	in := new(discoveryv3.DiscoveryRequest)
	if err := proto.Unmarshal(body, in); err != nil {
		t.Fatal(err)
	}
	one := heap() - before
	runtime.KeepAlive(in)

	w := start(t)
	c := w.wire(w.socket)
	var asked []uint32
	said := announce(len(body), body...)
	for range calls {
		id := c.open("/envoy.service.secret.v3.SecretDiscoveryService/FetchSecrets")
		c.say(id, said[:len(said)-1], 16<<10, false)
		asked = append(asked, id)
	}
	peak, stop := make(chan uint64), make(chan struct{})
	go func() {
		var most uint64
		for {
			var m runtime.MemStats
			runtime.ReadMemStats(&m)
			most = max(most, m.HeapAlloc)
			select {
			case <-stop:
				peak <- most
				return
			case <-time.After(time.Millisecond):
			}
		}
	}()
	for _, id := range asked {
		c.say(id, said[len(said)-1:], 1, true)
	}
	for _, id := range asked {
		if st := c.status(id); st.Code() != codes.PermissionDenied {
			t.Errorf("got %v, want PermissionDenied", st)
		}
	}
	close(stop)
	if got := <-peak - before; got > calls/3*one {
		t.Errorf("%d messages took %d MiB, one takes %d", calls, got>>20, one>>20)
	}
}

func heap() uint64 {
	var m runtime.MemStats
	runtime.GC()
	runtime.GC() // for what pools kept
	runtime.ReadMemStats(&m)
	return m.HeapAlloc
}

func TestUnfinishedMessagesOfOneAreNotInTheWayOfOthers(t *testing.T) {
	const length = 1 << 20
	w := start(t, limits(func(l *Limits) { l.OwnerMessages, l.Messages = 2*length, 4*length }))
	w.entry("/a", nil, mine)
	flood := w.wire(w.socket)
	for range 10 {
		id := flood.open("/SpiffeWorkloadAPI/ValidateJWTSVID")
		flood.say(id, announce(length, make([]byte, length-1)...), 16<<10, false)
	}
	api := w.workloadAPI()
	recv(t, x509Stream(t, api), "/a") // short requests are heard, whoever comes with them
	long := &workload.JWTSVIDRequest{Audience: []string{strings.Repeat("a", length-8)}}
	w.evidence.set(func(ev *attestor.Evidence) { ev.Owner = "another" })
	other := w.workloadAPI()
	recv(t, x509Stream(t, other), "/a") // from here on the owner is known
	for range 10 {
		_, err := other.FetchJWTSVID(call(t), long)
		wantCode(t, err, codes.InvalidArgument)
	}
}

// A client that does not read what it is told, and goes on talking, takes what
// its stream lets in.
func TestWhatIsSaidToWhoIsBusyCounts(t *testing.T) {
	w := start(t, limits(func(l *Limits) { l.OwnerMessages = streamWindow + streamWindow/2 }))
	w.entry("/a", nil, mine)
	c := w.wire(w.socket)
	if st := c.ask("/SpiffeWorkloadAPI/FetchJWTSVID", announce(4, 0x0a, 2, 'd', 'b')); st.Code() != codes.OK { // from here on the owner is known
		t.Fatal(st)
	}
	c.write(func() error { return c.fr.WriteSettings(http2.Setting{ID: http2.SettingInitialWindowSize, Val: 0}) })
	talk := func() uint32 {
		id := c.open("/envoy.service.secret.v3.SecretDiscoveryService/DeltaSecrets")
		ask := &discoveryv3.DeltaDiscoveryRequest{ResourceNamesSubscribe: []string{"default"}} // each is answered
		for range 200 {
			body, err := proto.Marshal(ask)
			if err != nil {
				t.Fatal(err)
			}
			if !c.say(id, announce(len(body), body...), 16<<10, false) {
				break
			}
		}
		return id
	}
	talk()
	eventually(t, "the daemon waits for its answers to be read", func() bool { return w.budget.messages.Load() == streamWindow })
	if st := c.status(talk()); st.Code() != codes.ResourceExhausted {
		t.Errorf("got %v, want ResourceExhausted", st)
	}
}

func TestMessagesThatWaitToBeReadCount(t *testing.T) {
	const length = 1 << 20
	w := start(t, limits(func(l *Limits) { l.OwnerMessages = length + length/2 }))
	w.entry("/a", nil, mine)
	c := w.wire(w.socket)
	if st := c.ask("/SpiffeWorkloadAPI/FetchJWTSVID", announce(4, 0x0a, 2, 'd', 'b')); st.Code() != codes.OK { // from here on the owner is known
		t.Fatal(st)
	}
	reading := &w.onlyLink().seat.account().decoding
	reading.Lock()
	defer reading.Unlock()
	said := announce(length, make([]byte, length)...)
	const method = "/envoy.service.secret.v3.SecretDiscoveryService/StreamSecrets"
	c.say(c.open(method), said, 16<<10, false)
	eventually(t, "it counts", func() bool { return w.budget.messages.Load() == length })
	for range 20 {
		id := c.open(method)
		c.say(id, said, 16<<10, false)
		if st := c.status(id); st.Code() != codes.ResourceExhausted {
			t.Fatalf("got %v, want ResourceExhausted", st)
		}
	}
}

func TestCallsThatWaitForTheirMessageCountAsStreams(t *testing.T) {
	w := start(t, limits(func(l *Limits) { l.OwnerStreams = 3 }))
	c := w.wire(w.socket)
	var waiting []uint32
	for range 3 {
		waiting = append(waiting, c.open("/SpiffeWorkloadAPI/ValidateJWTSVID"))
	}
	eventually(t, "they count", func() bool { return w.budget.streams.Load() == 3 })
	if st := c.ask("/SpiffeWorkloadAPI/ValidateJWTSVID", nil); st.Code() != codes.ResourceExhausted {
		t.Errorf("got %v, want ResourceExhausted", st)
	}
	c.say(waiting[0], announce(0), 5, true)
	if st := c.status(waiting[0]); st.Code() != codes.InvalidArgument {
		t.Errorf("got %v, want InvalidArgument", st)
	}
	eventually(t, "its place is given back", func() bool { return w.budget.streams.Load() == 2 })
}

// Who may not call is told so before it has said anything.
func TestCallersAreCheckedBeforeTheyAreHeard(t *testing.T) {
	b := startBrokering(t)
	stranger := b.wire(spiffeid.RequireFromPath(domain, "/stranger"))
	for _, method := range []string{"FetchJWTSVID", "SubscribeToX509SVID"} {
		if st := stranger.status(stranger.open("/spiffe.broker.API/" + method)); st.Code() != codes.PermissionDenied {
			t.Errorf("got %v for a broker that is on no list, want PermissionDenied", st)
		}
	}

	refuse := func(l *link) error { l.refused = errForeign; return nil }
	g := b.newGate(&handshaker{s: b.Server, accept: refuse}, b.admitAdmin, denyAdmin)
	path := filepath.Join(t.TempDir(), "admin.sock")
	l, err := peer.Listen(path, b.Processes, peer.Options{Mode: 0o666, Group: -1})
	if err != nil {
		t.Fatal(err)
	}
	go g.Serve(l)
	t.Cleanup(g.Stop)
	other := b.world.wire(path)
	if st := other.status(other.open("/grpc.health.v1.Health/Check")); st.Code() != codes.PermissionDenied {
		t.Errorf("got %v for who is no administrator, want PermissionDenied", st)
	}
}

// Every method of every server says with the same codes what is wrong with
// bytes, whoever wrote its handler.
func TestMalformedRequests(t *testing.T) {
	w := startLending(t)
	b := startBrokering(t)
	for name, server := range map[string]struct {
		*grpc.Server
		wire *wire
		most int
	}{
		"workload":  {w.workload, w.wire(w.world.socket), maxMessage},
		"delegated": {w.delegated, w.wire(w.socket), maxMessage},
		"admin":     {w.Server.admin, w.wire(w.world.admin), maxBatch},
		"broker":    {b.broker, b.wire(runtimeID), maxMessage},
	} {
		for service, info := range server.GetServiceInfo() {
			for _, m := range info.Methods {
				if m.Name == "SyncAuthorizedEntries" {
					continue // a stream that nobody listens to: not implemented
				}
				silence := codes.InvalidArgument
				if m.IsClientStream {
					silence = codes.OK // there may be any number of messages
				}
				for what, c := range map[string]struct {
					body   []byte
					header []string
					want   codes.Code
				}{
					"nothing":                    {want: silence},
					"half a header":              {body: []byte{0, 0}, want: codes.InvalidArgument},
					"half a message":             {body: announce(10, 1, 2, 3), want: codes.InvalidArgument},
					"no message but its length":  {body: announce(10), want: codes.InvalidArgument},
					"no protocol buffers":        {body: announce(1, 0x0f), want: codes.InvalidArgument},
					"field that is cut off":      {body: announce(2, 0x0a, 0x05), want: codes.InvalidArgument},
					"too long":                   {body: announce(server.most + 1), want: codes.ResourceExhausted},
					"as long as can be said":     {body: announce(1<<32 - 1), want: codes.ResourceExhausted},
					"compressed, not said how":   {body: []byte{1, 0, 0, 0, 0}, want: codes.InvalidArgument},
					"flag that there is not":     {body: []byte{2, 0, 0, 0, 0}, want: codes.InvalidArgument},
					"compression nobody knows":   {body: []byte{1, 0, 0, 0, 0}, header: []string{"grpc-encoding", "x"}, want: codes.Unimplemented},
					"two messages where one may": {body: append(announce(0), announce(0)...), want: codes.InvalidArgument},
				} {
					if m.IsClientStream && strings.HasPrefix(what, "two") {
						continue
					}
					t.Run(name+" "+service+"/"+m.Name+" "+what, func(t *testing.T) {
						st := server.wire.ask("/"+service+"/"+m.Name, c.body, c.header...)
						if st.Code() != c.want {
							t.Errorf("got %v, want %v", st, c.want)
						}
					})
				}
			}
		}
	}
}

// FuzzIncoming has a client say anything, on a call that may have one message
// and on one that may have many.
func FuzzIncoming(f *testing.F) {
	for _, seed := range [][]byte{nil, {0}, announce(0), announce(3, 1, 2, 3), announce(3, 1), {1, 0, 0, 0, 0}, {0, 255, 255, 255, 255},
		append(announce(1, 1), announce(2, 2)...), append(announce(freeMessage+1, make([]byte, freeMessage+1)...), announce(0)...)} {
		f.Add(false, seed)
		f.Add(true, seed)
	}
	const most = 4 * freeMessage
	f.Fuzz(func(t *testing.T, more bool, said []byte) {
		b := newBudget(Limits{Streams: 1, OwnerStreams: 1, Messages: streamWindow + most, OwnerMessages: streamWindow + most})
		a := &account{}
		if err := b.stream(a); err != nil {
			t.Fatal(err)
		}
		in := &incoming{from: script{bytes.NewReader(said)}, most: most, budget: b, account: a, more: more}
		var heard []byte
		var err error
		for {
			var body encoded
			if err = in.RecvMsg(&body); err != nil {
				break
			}
			if counts := int(a.messages.Load()); len(body) > freeMessage && counts < len(body) || more && counts < streamWindow {
				t.Errorf("a message of %d bytes counts for %d", len(body), counts)
			}
			heard = append(heard, announce(len(body), body...)...)
			if !more {
				break
			}
		}
		switch c := code(err); {
		case err == nil, err == io.EOF:
			if !bytes.Equal(heard, said) {
				t.Errorf("heard %x of %x", heard, said)
			}
		case c != codes.InvalidArgument && c != codes.ResourceExhausted:
			t.Errorf("got %v", err)
		}
		in.close()
		if a.messages.Load() != 0 || b.messages.Load() != 0 || b.streams.Load() != 0 {
			t.Errorf("not all is given back")
		}
	})
}

// A script is a source that has all that is said.
type script struct{ *bytes.Reader }

func (s script) ReadMessageHeader(b []byte) error {
	_, err := io.ReadFull(s, b)
	return err
}
