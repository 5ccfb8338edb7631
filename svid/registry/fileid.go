package registry

import (
	"crypto/sha256"
	"encoding/base32"
	"encoding/binary"
	"hash"
	"strings"
)

// fileIDPrefix begins the ID of every entry of the configuration file.
const fileIDPrefix = "file-"

// fileID names an entry of the configuration file by its content, so that a
// reload which leaves an entry alone leaves its SVIDs alone.
func fileID(e *Entry) string {
	h := sha256.New()
	text(h, "deputy entry 1", e.Path, e.ParentID.String(), e.Hint)
	number(h, int64(e.X509TTL), int64(e.JWTTTL), flags(e))
	number(h, int64(len(e.Selectors)))
	for _, s := range e.Selectors {
		text(h, s.String())
	}
	number(h, int64(len(e.DNSNames)))
	text(h, e.DNSNames...)
	number(h, int64(len(e.FederatesWith)))
	for _, td := range e.FederatesWith {
		text(h, td.Name())
	}
	number(h, int64(len(e.Audiences)))
	text(h, e.Audiences...)
	return fileIDPrefix + strings.ToLower(base32.StdEncoding.EncodeToString(h.Sum(nil)[:16])[:26])
}

// A kinship is what two similar entries share, and the Store refuses: SPIFFE
// ID, parent and selectors.
type kinship [sha256.Size]byte

func kin(e *Entry) (k kinship) {
	h := sha256.New()
	text(h, e.Path, e.ParentID.String())
	number(h, flags(e)&instanceFlag)
	for _, s := range e.Selectors {
		text(h, s.String())
	}
	h.Sum(k[:0])
	return k
}

const (
	instanceFlag int64 = 1 << iota
	tracedFlag
	freshFlag
)

func flags(e *Entry) (bits int64) {
	if e.Instance {
		bits |= instanceFlag
	}
	if e.AllowTraced {
		bits |= tracedFlag
	}
	if e.JWTFresh {
		bits |= freshFlag
	}
	return bits
}

// text and number write with their length before them, so that no two
// different entries are hashed as the same bytes.

func text(h hash.Hash, values ...string) {
	for _, v := range values {
		number(h, int64(len(v)))
		h.Write([]byte(v))
	}
}

func number(h hash.Hash, values ...int64) {
	for _, v := range values {
		h.Write(binary.BigEndian.AppendUint64(nil, uint64(v)))
	}
}
