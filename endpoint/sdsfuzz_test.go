package endpoint

import (
	"crypto/x509"
	"encoding/binary"
	"maps"
	"testing"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/deputy-id/deputy/svid"
	"github.com/deputy-id/deputy/svid/registry"
)

// A conversation is messages of a client, each behind its length.
func conversation(all ...proto.Message) (out []byte) {
	for _, m := range all {
		b, err := proto.Marshal(m)
		if err != nil {
			panic(err)
		}
		out = append(binary.AppendUvarint(out, uint64(len(b))), b...)
	}
	return out
}

// FuzzSecretRequests has a client say anything while its process gains and
// loses identities. What it gets is what it asked for, or a tombstone of that,
// and what is kept of it is bounded.
func FuzzSecretRequests(f *testing.F) {
	node := nodeOf(17, map[string]any{"disable_spiffe_cert_validation": "true"})
	f.Add(false, conversation(
		&discoveryv3.DiscoveryRequest{Node: node, TypeUrl: secretType, ResourceNames: []string{"default", "ALL", "*", ""}},
		&discoveryv3.DiscoveryRequest{ResponseNonce: "1", ErrorDetail: &status.Status{Message: "no\n"}, ResourceNames: []string{"ROOTCA"}},
		&discoveryv3.DiscoveryRequest{ResponseNonce: "1"},
		&discoveryv3.DiscoveryRequest{Node: nodeOf(40, nil), ResourceNames: []string{"default", "spiffe://test.example/a", "file-root:/x"}},
	))
	f.Add(true, conversation(
		&discoveryv3.DeltaDiscoveryRequest{InitialResourceVersions: map[string]string{"default": "1", "x": "2"}},
		&discoveryv3.DeltaDiscoveryRequest{ResourceNamesSubscribe: []string{"default", "x"}, ResourceNamesUnsubscribe: []string{"*"}},
		&discoveryv3.DeltaDiscoveryRequest{ResourceNamesSubscribe: []string{"*"}, ResourceNamesUnsubscribe: []string{"x", "default", "y"}},
	))
	f.Add(true, []byte("\x02\xff\xff\x05hello"))

	w := start(f)
	w.federate(foreign)
	made := func(paths ...string) *state {
		st := &state{}
		for i, path := range paths {
			e := registry.Entry{ID: path, SPIFFEID: spiffeid.RequireFromPath(domain, path)}
			key, err := svid.ECP256.Generate()
			if err != nil {
				f.Fatal(err)
			}
			chain, err := w.authority.X509(f.Context(), e, key)
			if err != nil {
				f.Fatal(err)
			}
			st.svids = append(st.svids, svid.X509{Entry: e, Chain: chain, Signer: key})
			if i > 0 {
				st.kept = append(st.kept, st.svids[i])
			}
		}
		if len(paths) > 0 {
			st.bundles, _ = w.authority.Bundles()
		}
		return st
	}
	var states []*secrets
	for _, st := range []*state{made("/a", "/b"), made(), made("/b")} {
		states = append(states, newSecrets(st, w.SecretNames, w.graves))
	}

	f.Fuzz(func(t *testing.T, incremental bool, said []byte) {
		base := talker{s: w.Server, account: &account{}, log: func(_ string, args ...any) {
			for _, a := range args {
				if s, ok := a.(string); ok && (len(s) > 400 || s != legible(s)) {
					t.Errorf("%q goes into the log", s)
				}
			}
		}}
		var it talk
		var of *talker
		if incremental {
			d := &delta{talker: base}
			it, of = d, &d.talker
		} else {
			s := &sotw{talker: base}
			it, of = s, &s.talker
		}
		for turn := 0; len(said) > 0 && turn < 20; turn++ {
			n, used := binary.Uvarint(said)
			if used <= 0 {
				return
			}
			said = said[used:]
			n = min(n, uint64(len(said)))
			ask, err := it.take(encoded(said[:n]))
			said = said[n:]
			if err != nil {
				if got := code(err).String(); got != "InvalidArgument" {
					t.Fatalf("got %s (%v), want InvalidArgument", got, err)
				}
				return
			}
			if len(of.sub.names) > maxSecretNames || of.sub.bytes > maxSecretBytes || len(of.has) > 2*maxSecretNames {
				t.Fatalf("kept %d names of %d bytes and %d marks", len(of.sub.names), of.sub.bytes, len(of.has))
			}
			if !ask {
				continue
			}
			now := states[turn%len(states)]
			out, err := it.say(now, turn%3 == 0)
			if err != nil {
				t.Fatal(err)
			}
			if out != nil {
				checkSecrets(t, incremental, out.Materialize(), now, of)
			}
			if again, err := it.say(now, turn%3 == 0); again != nil || err != nil {
				t.Fatalf("there was more to say: %v", err)
			}
		}
	})
}

func checkSecrets(t *testing.T, incremental bool, body []byte, now *secrets, of *talker) {
	t.Helper()
	var got secretsByName
	if incremental {
		var r discoveryv3.DeltaDiscoveryResponse
		if err := proto.Unmarshal(body, &r); err != nil {
			t.Fatal(err)
		}
		got = make(secretsByName)
		for _, one := range r.Resources {
			maps.Copy(got, secretsIn(t, one.Resource))
		}
		if len(got) != len(r.Resources) {
			t.Errorf("got %d resources under %d names", len(r.Resources), len(got))
		}
		for _, name := range r.RemovedResources {
			if got[name] != nil {
				t.Errorf("%q is there and removed", name)
			}
		}
	} else {
		var r discoveryv3.DiscoveryResponse
		if err := proto.Unmarshal(body, &r); err != nil {
			t.Fatal(err)
		}
		got = secretsIn(t, r.Resources...)
	}
	for name, s := range got {
		if !of.sub.wants(name) && !incremental { // a delta may answer for what it leaves
			t.Errorf("got %q, which was not asked for", name)
		}
		var certs []*x509.Certificate
		if s.GetTlsCertificate() != nil {
			certs = append(certs, certificateOf(t, s))
		} else {
			for _, roots := range rootsIn(t, s) {
				certs = append(certs, roots...)
			}
		}
		tomb := certs[0].Subject.CommonName == "withdrawn"
		r, err := now.get(name, of.plain)
		if err != nil || r == nil && !tomb {
			t.Errorf("got a secret %q that the process is not entitled to (%v)", name, err)
		}
		if r != nil && r.kept && !tomb {
			t.Errorf("got the key of %q, which the evidence does not confirm", name)
		}
	}
}
