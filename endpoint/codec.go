package endpoint

import (
	"fmt"

	"google.golang.org/grpc/encoding"
	grpcproto "google.golang.org/grpc/encoding/proto"
	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
)

// encoded is a response that was marshalled before: once for a snapshot, and
// then shared by every stream that sends it. Nobody changes the bytes.
type encoded []byte

// nothing is a request message without fields, checked but not kept.
type nothing struct{}

// codec is gRPC's own for protocol buffers, except that encoded passes through
// as it is, and the pieces of a response that are shared likewise. It is for
// what we say; what is said to us, decode reads.
type codec struct {
	encoding.CodecV2
}

func newCodec() codec { return codec{encoding.GetCodecV2(grpcproto.Name)} }

func (c codec) Marshal(v any) (mem.BufferSlice, error) {
	switch b := v.(type) {
	case encoded:
		return mem.BufferSlice{mem.SliceBuffer(b)}, nil
	case mem.BufferSlice:
		return b, nil
	}
	return c.CodecV2.Marshal(v)
}

// decode reads a request of this owner. In memory it may take many times
// what it is long, so an owner's long ones are read one after another.
func (a *account) decode(body []byte, v any) error {
	if _, ok := v.(proto.Message); ok && a != nil && len(body) > freeMessage {
		a.decoding.Lock()
		defer a.decoding.Unlock()
	}
	return decode(body, v)
}

// decode reads a request, whose bytes are encoded's from then on.
func decode(body []byte, v any) error {
	switch v := v.(type) {
	case *nothing:
		return checkWire(body)
	case *encoded:
		*v = body
		return nil
	case proto.Message:
		if proto.Unmarshal(body, v) == nil {
			return nil
		}
		return errMalformed
	}
	return fmt.Errorf("a request cannot be a %T", v)
}

// checkWire accepts what a message without fields may be: any sequence of
// well-formed fields that it does not know.
func checkWire(b []byte) error {
	for len(b) > 0 {
		num, _, n := protowire.ConsumeField(b)
		if n < 0 || num > protowire.MaxValidNumber {
			return errMalformed
		}
		b = b[n:]
	}
	return nil
}
