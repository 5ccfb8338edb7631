package endpoint

import (
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/grpc/mem"
)

// sotw is the talk of StreamSecrets. A response holds all secrets that the
// client asked for, and comes when one of them changed; the protocol would
// allow it to hold only the changed, which some clients take for a withdrawal
// of the rest.
type sotw struct {
	talker
	owed bool // the first request is answered, were it with nothing
}

func (t *sotw) take(body encoded) (bool, error) {
	in := new(discoveryv3.DiscoveryRequest)
	if err := t.account.decode(body, in); err != nil {
		return false, err
	}
	return t.heed(in)
}

func (t *sotw) heed(in *discoveryv3.DiscoveryRequest) (bool, error) {
	if err := checkType(in.TypeUrl); err != nil {
		return false, err
	}
	first := !t.begun
	switch n := in.ResponseNonce; {
	case first:
		t.begin(in.Node)
		t.owed = true
	case n != "" && !t.answers(n):
		return false, nil // said before it had our last response
	}
	t.hear(in.ResponseNonce, in.ErrorDetail)
	grown, err := t.sub.replace(in.ResourceNames)
	if err != nil {
		return false, err
	}
	if first && in.VersionInfo != "" && in.VersionInfo != versionOf(nil) {
		// What it has is all or some of this.
		for _, name := range in.ResourceNames {
			t.bring(name, "")
		}
	}
	t.resend(grown)
	return len(grown) > 0 || t.owed, t.settle()
}

func (t *sotw) say(now *secrets, doubt bool) (mem.BufferSlice, error) {
	t.miss(now, doubt)
	all, changed, err := t.pickAll(now, doubt)
	if err != nil || !changed && !t.owed {
		return nil, err
	}
	t.owed = false
	for _, r := range all {
		t.keep(r)
	}
	return discovery(all, t.nextNonce()), nil
}

// discovery is a DiscoveryResponse.
func discovery(all []*resource, nonce string) mem.BufferSlice {
	own := make([]byte, 0, 256)
	out := make(mem.BufferSlice, 0, 2*len(all)+1)
	for _, r := range all {
		from := len(own)
		own = appendLength(own, fieldResources, len(r.any))
		out = append(out, mem.SliceBuffer(own[from:]), mem.SliceBuffer(r.any))
	}
	from := len(own)
	own = appendText(own, fieldVersion, versionOf(all))
	own = appendText(own, fieldType, secretType)
	own = appendText(own, fieldNonce, nonce)
	return append(out, mem.SliceBuffer(own[from:]))
}
