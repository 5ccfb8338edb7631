package endpoint

import (
	"errors"
	"fmt"

	"google.golang.org/grpc/encoding"
	"google.golang.org/grpc/encoding/proto"
	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/encoding/protowire"
)

// encoded is a response that was marshalled before: once for a snapshot, and
// then shared by every stream that sends it. Nobody changes the bytes.
type encoded []byte

// nothing is a request message without fields, checked but not kept.
type nothing struct{}

// codec is gRPC's own for protocol buffers, except that encoded passes through
// as it is in both directions, the pieces of a response that are shared likewise
// do so on their way out, and nothing is not allocated.
type codec struct {
	encoding.CodecV2
}

func newCodec() codec { return codec{encoding.GetCodecV2(proto.Name)} }

func (c codec) Marshal(v any) (mem.BufferSlice, error) {
	switch b := v.(type) {
	case encoded:
		return mem.BufferSlice{mem.SliceBuffer(b)}, nil
	case mem.BufferSlice:
		return b, nil
	}
	return c.CodecV2.Marshal(v)
}

func (c codec) Unmarshal(data mem.BufferSlice, v any) error {
	switch v := v.(type) {
	case *nothing:
		if data.Len() == 0 {
			return nil
		}
		return checkWire(data.Materialize())
	case *encoded:
		*v = data.Materialize() // a copy
		return nil
	}
	return c.CodecV2.Unmarshal(data, v)
}

// checkWire accepts what a message without fields may be: any sequence of
// well-formed fields that it does not know.
func checkWire(b []byte) error {
	for len(b) > 0 {
		num, _, n := protowire.ConsumeField(b)
		switch {
		case n < 0:
			return fmt.Errorf("malformed message: %w", protowire.ParseError(n))
		case num > protowire.MaxValidNumber:
			return errors.New("malformed message: field number is out of range")
		}
		b = b[n:]
	}
	return nil
}
