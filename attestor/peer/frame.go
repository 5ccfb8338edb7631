package peer

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
)

// The little of HTTP/2 (RFC 9113) that is spoken here before gRPC takes over.
const (
	clientPreface = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
	headerLen     = 9
	maxFrameLen   = 1 << 14 // §4.2, as long as our SETTINGS say nothing else
	pingLen       = 8

	frameSettings = 0x4
	framePing     = 0x6
	frameGoAway   = 0x7
	flagAck       = 0x1

	codeNone      = 0x0
	codeProtocol  = 0x1
	codeEnhance   = 0xb       // ENHANCE_YOUR_CALM: over budget
	maxStreamID   = 1<<31 - 1 // in a GOAWAY: no stream is given up yet
	maxReasonLen  = 512       // a GOAWAY is to fit into one write
	greetingLen   = 2*headerLen + pingLen
	maxGoAwaySize = headerLen + 8 + maxReasonLen
)

type frameHeader struct {
	length int
	typ    byte
	flags  byte
	stream uint32
}

// parseHeader reads a frame header from the first nine bytes of b.
func parseHeader(b []byte) frameHeader {
	return frameHeader{
		length: int(b[0])<<16 | int(b[1])<<8 | int(b[2]),
		typ:    b[3],
		flags:  b[4],
		stream: binary.BigEndian.Uint32(b[5:]) & maxStreamID,
	}
}

func appendHeader(b []byte, h frameHeader) []byte {
	b = append(b, byte(h.length>>16), byte(h.length>>8), byte(h.length), h.typ, h.flags)
	return binary.BigEndian.AppendUint32(b, h.stream)
}

// appendGreeting is how a server opens: SETTINGS, empty so that those of gRPC,
// which follow, contradict nothing, and the PING that is the challenge.
func appendGreeting(b []byte, ping [pingLen]byte) []byte {
	b = appendHeader(b, frameHeader{typ: frameSettings})
	b = appendHeader(b, frameHeader{length: pingLen, typ: framePing})
	return append(b, ping[:]...)
}

// appendGoAway ends a connection with the reason as debug data (§6.8).
func appendGoAway(b []byte, code uint32, reason string) []byte {
	if len(reason) > maxReasonLen {
		reason = reason[:maxReasonLen]
	}
	b = appendHeader(b, frameHeader{length: 8 + len(reason), typ: frameGoAway})
	b = binary.BigEndian.AppendUint32(b, maxStreamID)
	b = binary.BigEndian.AppendUint32(b, code)
	return append(b, reason...)
}

// Why an opening is not that of an HTTP/2 client that answers.
var (
	errHTTP1     = errors.New("peer speaks HTTP/1, this socket gRPC (HTTP/2) only")
	errNoHTTP2   = errors.New("peer does not speak HTTP/2")
	errEcho      = errors.New("peer sends back what it is sent")
	errWrongPing = errors.New("peer acknowledged a PING that it was not sent")
	errTooMuch   = errors.New("peer sent more than 128 KiB without answering the PING")
)

// opening finds, in what a client sends first, its answer to the PING. It
// keeps its place, so that each byte is looked at once.
type opening struct {
	ping     [pingLen]byte
	next     int  // where the next frame begins, 0 before the preface
	settings bool // the client's SETTINGS, which come first (§3.4), were seen
}

// scan looks at all bytes received so far and returns where the frame with
// the answer begins, or -1 if it is still to come.
func (o *opening) scan(b []byte) (int, error) {
	if o.next == 0 {
		n := min(len(b), len(clientPreface))
		if string(b[:n]) != clientPreface[:n] {
			return -1, notPreface(b)
		}
		if n < len(clientPreface) {
			return -1, nil
		}
		o.next = n
	}
	for len(b)-o.next >= headerLen {
		h := parseHeader(b[o.next:])
		payload := b[o.next+headerLen:]
		switch {
		case !o.settings && (h.typ != frameSettings || h.flags&flagAck != 0 || h.stream != 0):
			return -1, fmt.Errorf("%w: no SETTINGS after its preface", errNoHTTP2)
		case h.length > maxFrameLen:
			return -1, fmt.Errorf("%w: frame of %d bytes", errNoHTTP2, h.length)
		case h.typ == framePing && (h.length != pingLen || h.stream != 0):
			return -1, fmt.Errorf("%w: ill-formed PING", errNoHTTP2)
		case len(payload) < h.length:
			return -1, nil
		}
		if h.typ == framePing {
			ours := bytes.Equal(payload[:pingLen], o.ping[:])
			switch ack := h.flags&flagAck != 0; {
			case ack && ours:
				return o.next, nil
			case ack:
				return -1, errWrongPing
			case ours:
				return -1, errEcho
			}
		}
		o.settings = true
		o.next += headerLen + h.length
	}
	return -1, nil
}

// notPreface says what else the first bytes look like.
func notPreface(b []byte) error {
	for _, method := range []string{"GET ", "POST ", "HEAD ", "PUT ", "DELETE ", "OPTIONS ", "CONNECT ", "PATCH ", "TRACE "} {
		if bytes.HasPrefix(b, []byte(method)) {
			return errHTTP1
		}
	}
	if bytes.HasPrefix(b, appendHeader(nil, frameHeader{typ: frameSettings})) {
		return errEcho
	}
	return errNoHTTP2
}

// frameTracker follows the frames that are written, so that one can be put in
// between two of them.
type frameTracker struct {
	header [headerLen]byte
	have   int // bytes of header
	left   int // bytes of payload still to come
}

// boundary reports whether a frame may begin here.
func (f *frameTracker) boundary() bool { return f.have == 0 && f.left == 0 }

// advance takes b as written.
func (f *frameTracker) advance(b []byte) {
	for len(b) > 0 {
		b = b[f.step(b):]
	}
}

// toBoundary takes b as written up to where the frame begun before it ends,
// and returns how much that is; a b that is shorter is taken whole.
func (f *frameTracker) toBoundary(b []byte) int {
	n := 0
	for n < len(b) && !f.boundary() {
		n += f.step(b[n:])
	}
	return n
}

// step takes the rest of a header, or of a payload, as far as b reaches.
func (f *frameTracker) step(b []byte) int {
	if f.left > 0 {
		n := min(f.left, len(b))
		f.left -= n
		return n
	}
	n := copy(f.header[f.have:], b)
	if f.have += n; f.have == headerLen {
		f.have, f.left = 0, parseHeader(f.header[:]).length
	}
	return n
}
