package endpoint

import (
	"slices"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/encoding/protowire"
)

// delta is the talk of DeltaSecrets. A response holds only what changed.
type delta struct {
	talker
	gone map[string]struct{} // names whose absence is to be said although nobody subscribes to them
}

func (t *delta) take(body encoded) (bool, error) {
	in := new(discoveryv3.DeltaDiscoveryRequest)
	if err := t.account.decode(body, in); err != nil {
		return false, err
	}
	if err := checkType(in.TypeUrl); err != nil {
		return false, err
	}
	first := !t.begun
	if first {
		t.begin(in.Node)
	}
	// A subscription counts whatever the nonce; it only tells which response
	// was refused.
	t.hear(in.ResponseNonce, in.ErrorDetail)
	ask := first
	if first && len(in.ResourceNamesSubscribe)+len(in.ResourceNamesUnsubscribe) == 0 {
		t.sub.all = true
	}
	if err := t.sub.add(in.ResourceNamesSubscribe); err != nil {
		return false, err
	}
	ask = ask || len(in.ResourceNamesSubscribe) > 0
	t.resend(in.ResourceNamesSubscribe)
	for _, name := range in.ResourceNamesUnsubscribe {
		if t.sub.all && name != wildcard && t.sub.has(name) {
			// Whether the wildcard has it still is to be said in any case.
			delete(t.has, name)
			if t.gone == nil {
				t.gone = make(map[string]struct{})
			}
			t.gone[name] = struct{}{}
			ask = true
		}
		t.sub.remove(name)
	}
	if first {
		if err := t.recall(in.InitialResourceVersions); err != nil {
			return false, err
		}
	}
	return ask, t.settle()
}

// recall takes what the client has from an earlier stream.
func (t *delta) recall(versions map[string]string) error {
	n, bytes := 0, 0
	for name, version := range versions {
		if !t.sub.wants(name) {
			continue
		}
		n, bytes = n+1, bytes+len(name)
		switch {
		case n > maxSecretNames:
			return invalid("versions of more than %d resources", maxSecretNames)
		case bytes > maxSecretBytes:
			return invalid("names of versions are longer than %d bytes together", maxSecretBytes)
		case len(version) > 64: // not one of ours
			version = ""
		}
		t.bring(name, version)
	}
	t.brought = bytes + nameCost*n
	return nil
}

func (t *delta) say(now *secrets, doubt bool) (mem.BufferSlice, error) {
	t.miss(now, doubt)
	var changed []*resource
	var removed []string
	wanted := t.wanted(now)
	names := slices.Clip(wanted)
	for name := range t.gone {
		if _, ok := slices.BinarySearch(wanted, name); !ok {
			names = append(names, name)
		}
	}
	for _, name := range names {
		r, err := t.pick(now, name, doubt)
		if err != nil {
			return nil, err
		}
		had, known := t.has[name]
		_, left := t.gone[name]
		switch {
		case r == nil && doubt && had.brought:
			// It goes on with what it has, as far as we know.
		case r == nil && !had.absent && (known || left || t.sub.has(name)):
			removed = append(removed, name)
		case r != nil && t.lacks(r):
			changed = append(changed, r)
		case r != nil:
			t.keep(r) // what the client brought is as good as sent
		}
	}
	t.gone = nil
	if len(changed)+len(removed) == 0 {
		return nil, nil
	}
	for _, r := range changed {
		t.keep(r)
	}
	for _, name := range removed {
		if t.sub.has(name) {
			had := t.has[name]
			t.mark(name, mark{absent: true, kind: had.kind, brought: had.brought})
		} else {
			delete(t.has, name)
		}
	}
	return deltaDiscovery(changed, removed, t.nextNonce()), nil
}

// deltaDiscovery is a DeltaDiscoveryResponse.
func deltaDiscovery(changed []*resource, removed []string, nonce string) mem.BufferSlice {
	var own []byte
	out := make(mem.BufferSlice, 0, 2*len(changed)+1)
	for _, r := range changed {
		from := len(own)
		n := protowire.SizeTag(fieldResourceVersion) + protowire.SizeBytes(len(r.version)) +
			protowire.SizeTag(fieldResourceName) + protowire.SizeBytes(len(r.name)) +
			protowire.SizeTag(fieldResourceAny) + protowire.SizeBytes(len(r.any))
		own = appendLength(own, fieldResources, n)
		own = appendText(own, fieldResourceVersion, r.version)
		own = appendText(own, fieldResourceName, r.name)
		own = appendLength(own, fieldResourceAny, len(r.any))
		out = append(out, mem.SliceBuffer(own[from:]), mem.SliceBuffer(r.any))
	}
	from := len(own)
	own = appendText(own, fieldVersion, versionOf(changed))
	own = appendText(own, fieldType, secretType)
	own = appendText(own, fieldNonce, nonce)
	for _, name := range removed {
		own = appendText(own, fieldRemoved, name)
	}
	return append(out, mem.SliceBuffer(own[from:]))
}
