package endpoint

import (
	"bytes"
	"testing"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"google.golang.org/protobuf/proto"
)

func TestEncodedPassesThroughUncopied(t *testing.T) {
	c := newCodec()
	body := encoded("the bytes")
	out, err := c.Marshal(body)
	if err != nil || len(out) != 1 || &out[0].ReadOnlyData()[0] != &body[0] {
		t.Fatalf("got %v, %v, want the very same bytes", out, err)
	}
	out.Free()
	if string(body) != "the bytes" {
		t.Errorf("got %q after gRPC was done with it, want it untouched", body)
	}
}

func TestOtherMessagesAreMarshalledAsEver(t *testing.T) {
	c := newCodec()
	in := &workload.JWTSVIDRequest{Audience: []string{"db"}, SpiffeId: "spiffe://test.example/a"}
	want, err := proto.Marshal(in)
	if err != nil {
		t.Fatal(err)
	}
	out, err := c.Marshal(in)
	if err != nil || !bytes.Equal(out.Materialize(), want) {
		t.Fatalf("got %v, %v, want %v", out, err, want)
	}
	var back workload.JWTSVIDRequest
	if err := decode(out.Materialize(), &back); err != nil || !proto.Equal(in, &back) {
		t.Errorf("got %v, %v, want %v", &back, err, in)
	}
}

// FuzzRequestWithoutFields holds what is accepted in the place of an empty
// message against what protocol buffers accept.
func FuzzRequestWithoutFields(f *testing.F) {
	for _, seed := range []string{"", "\x00", "\x0a\x02hi", "\x0a\x05hi", "\x08\x96\x01", "\x0b\x0c", "\x0b", "\x0d\x01\x02\x03\x04", "\x07", "\xa0\xa0\xa0\xa0\x30\xa0\xa0\xbe0", "\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff"} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		var in nothing
		got := decode(b, &in)
		want := proto.Unmarshal(b, &workload.X509SVIDRequest{})
		if (got == nil) != (want == nil) {
			t.Errorf("got %v for %x, protocol buffers say %v", got, b, want)
		}
	})
}
