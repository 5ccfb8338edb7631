package endpoint

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"encoding/pem"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/deputy-id/deputy/svid"
)

// secretType is the type of the only resources that SDS has.
const secretType = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret"

// spiffeValidator is the extension by which Envoy verifies a peer with the
// bundle of the trust domain that is in the peer's own ID, and no other.
const spiffeValidator = "envoy.tls.cert_validator.spiffe"

// SecretNames are the names under which Envoy finds what it need not know the
// SPIFFE ID of. They differ from each other and are no SPIFFE IDs.
type SecretNames struct {
	SVID       string // the first X.509-SVID
	Bundle     string // our own trust domain's bundle
	AllBundles string // that and those of the trust domains that the entries federate with
}

// DefaultSecretNames are SPIRE's.
var DefaultSecretNames = SecretNames{SVID: "default", Bundle: "ROOTCA", AllBundles: "ALL"}

// A resource is one secret under one name, marshalled once for all streams
// that send it. It is immutable.
type resource struct {
	name    string
	version string // of the content; nothing of a key goes into it
	kind    kind
	any     []byte // google.protobuf.Any
	kept    bool   // of an SVID that the evidence does not confirm for now
}

// A kind is what a secret is, as far as its tombstone must be the same.
type kind struct {
	context bool   // a validation context, not a certificate
	domain  string // of the context
}

// secrets are what one process is entitled to by one state, by name. What is
// asked for of them is made when it is asked for the first time.
type secrets struct {
	snapshot *svid.X509Context // that they are of, if it is exactly one
	svids    map[string]*svid.X509
	kept     map[string]bool // those of the SVIDs that are in doubt
	contexts map[string][]*svid.Bundle
	all      string // the name of all bundles
	graves   *graves

	mu   sync.Mutex // guards what follows
	made map[resourceKey]*resource
}

type resourceKey struct {
	name  string
	plain bool
}

// newSecrets indexes a state. The same name never stands for two secrets: of
// SVIDs with the same ID the first counts.
func newSecrets(st *state, names SecretNames, g *graves) *secrets {
	s := &secrets{
		snapshot: st.snapshot,
		svids:    make(map[string]*svid.X509),
		kept:     make(map[string]bool),
		contexts: make(map[string][]*svid.Bundle),
		all:      names.AllBundles,
		graves:   g,
		made:     make(map[resourceKey]*resource),
	}
	add := func(name string, x *svid.X509) {
		if _, taken := s.svids[name]; taken {
			return
		}
		s.svids[name] = x
		s.kept[name] = slices.ContainsFunc(st.kept, func(k svid.X509) bool { return k.Entry.ID == x.Entry.ID })
	}
	for i := range st.svids {
		x := &st.svids[i]
		add(names.SVID, x)
		add(x.Entry.SPIFFEID.String(), x)
	}
	if b := st.bundles; b != nil && b.Own != nil {
		all := []*svid.Bundle{b.Own}
		s.contexts[names.Bundle] = all
		for _, td := range slices.SortedFunc(maps.Keys(b.Federated), spiffeid.TrustDomain.Compare) {
			all = append(all, b.Federated[td])
		}
		for i, one := range all {
			s.contexts[one.TrustDomain.IDString()] = all[i : i+1]
		}
		s.contexts[names.AllBundles] = all
	}
	return s
}

// names returns the name of every secret, in no order.
func (s *secrets) names(plain bool) []string {
	all := slices.AppendSeq(make([]string, 0, len(s.svids)+len(s.contexts)), maps.Keys(s.svids))
	for name := range s.contexts {
		if !s.unfit(name, plain) {
			all = append(all, name)
		}
	}
	return all
}

// unfit is a secret that cannot be said in the plain format: it has one pool
// of roots for all, so that each trust domain could speak for every other.
func (s *secrets) unfit(name string, plain bool) bool { return plain && name == s.all }

// get returns the secret of this name, nil if there is none.
func (s *secrets) get(name string, plain bool) (*resource, error) {
	x, isSVID := s.svids[name]
	bundles, isContext := s.contexts[name]
	if !isSVID && !isContext || s.unfit(name, plain) {
		return nil, nil
	}
	key := resourceKey{name, plain && !isSVID}
	s.mu.Lock()
	defer s.mu.Unlock()
	if r, ok := s.made[key]; ok {
		return r, nil
	}
	var r *resource
	var err error
	if isSVID {
		r, err = certificate(name, x)
	} else {
		r, err = s.context(name, bundles, plain)
	}
	if err != nil {
		return nil, fmt.Errorf("make secret %q: %w", name, err)
	}
	r.kept = s.kept[name]
	s.made[key] = r
	return r, nil
}

func certificate(name string, x *svid.X509) (*resource, error) {
	key, err := x.KeyDER()
	if err != nil {
		return nil, err
	}
	return tlsCertificate(name, encodePEM("CERTIFICATE", x.Chain...), encodeKey(key))
}

func tlsCertificate(name string, chain, key []byte) (*resource, error) {
	return newResource(&tlsv3.Secret{
		Name: name,
		Type: &tlsv3.Secret_TlsCertificate{TlsCertificate: &tlsv3.TlsCertificate{
			CertificateChain: inline(chain),
			PrivateKey:       inline(key),
		}},
	}, kind{}, chain)
}

func (s *secrets) context(name string, bundles []*svid.Bundle, plain bool) (*resource, error) {
	roots := make([]root, len(bundles))
	for i, b := range bundles {
		roots[i] = root{b.TrustDomain.Name(), encodePEM("CERTIFICATE", b.X509Authorities...)}
		if len(b.X509Authorities) > 0 {
			continue
		}
		// A bundle that trusts nobody. Envoy would refuse an empty one, and go
		// on with what it has.
		g, err := s.graves.dig()
		if err != nil {
			return nil, err
		}
		roots[i].pem = g.root
	}
	return validation(name, roots, plain)
}

// A root is what certificates of one trust domain are verified with.
type root struct {
	domain string
	pem    []byte
}

// validation makes a validation context; a plain one is of the first root.
func validation(name string, roots []root, plain bool) (*resource, error) {
	k := kind{context: true, domain: roots[0].domain}
	var public []byte
	for _, r := range roots {
		public = append(append(append(public, r.domain...), 0), r.pem...)
	}
	v := &tlsv3.CertificateValidationContext{}
	if plain {
		v.TrustedCa = inline(roots[0].pem)
		public = append(public, "plain"...)
	} else {
		c := &tlsv3.SPIFFECertValidatorConfig{}
		for _, r := range roots {
			c.TrustDomains = append(c.TrustDomains, &tlsv3.SPIFFECertValidatorConfig_TrustDomain{Name: r.domain, TrustBundle: inline(r.pem)})
		}
		typed, err := anypb.New(c)
		if err != nil {
			return nil, err
		}
		v.CustomValidatorConfig = &corev3.TypedExtensionConfig{Name: spiffeValidator, TypedConfig: typed}
	}
	return newResource(&tlsv3.Secret{
		Name: name,
		Type: &tlsv3.Secret_ValidationContext{ValidationContext: v},
	}, k, public)
}

func inline(b []byte) *corev3.DataSource {
	return &corev3.DataSource{Specifier: &corev3.DataSource_InlineBytes{InlineBytes: b}}
}

// newResource marshals a secret. Its version is made of what is public of it.
func newResource(s *tlsv3.Secret, k kind, public []byte) (*resource, error) {
	value, err := deterministic.Marshal(s)
	if err != nil {
		return nil, err
	}
	any, err := proto.Marshal(&anypb.Any{TypeUrl: secretType, Value: value})
	if err != nil {
		return nil, err
	}
	return &resource{name: s.Name, version: hash(public), kind: k, any: any}, nil
}

func encodePEM(kind string, certs ...*x509.Certificate) []byte {
	var out []byte
	for _, c := range certs {
		out = append(out, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: c.Raw})...)
	}
	return out
}

func encodeKey(der []byte) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})
}

// graves make tombstones: what Envoy is sent in the place of a secret that is
// withdrawn. It goes on with what it has when a secret is removed, is empty or
// its stream ends, but takes an expired certificate for it.
type graves struct {
	dig func() (*grave, error)
}

// A grave holds an expired certificate with its key, and an expired root of
// which nobody has the key.
type grave struct{ cert, key, root []byte } // PEM

func newGraves() *graves { return &graves{sync.OnceValues(dig)} }

func dig() (*grave, error) {
	one := func(t *x509.Certificate) (cert, key []byte, err error) {
		signer, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			return nil, nil, err
		}
		t.Subject = pkix.Name{Organization: []string{"Deputy"}, CommonName: "withdrawn"}
		t.NotBefore, t.NotAfter = time.Unix(0, 0), time.Unix(1, 0)
		t.BasicConstraintsValid = true
		der, err := x509.CreateCertificate(rand.Reader, t, t, signer.Public(), signer)
		if err != nil {
			return nil, nil, err
		}
		keyDER, err := x509.MarshalPKCS8PrivateKey(signer)
		if err != nil {
			return nil, nil, err
		}
		return encodePEM("CERTIFICATE", &x509.Certificate{Raw: der}), encodeKey(keyDER), nil
	}
	var g grave
	var err error
	if g.cert, g.key, err = one(&x509.Certificate{KeyUsage: x509.KeyUsageDigitalSignature}); err != nil {
		return nil, fmt.Errorf("make tombstone: %w", err)
	}
	// Another key: who holds the certificate's must not sign for the root.
	if g.root, _, err = one(&x509.Certificate{IsCA: true, KeyUsage: x509.KeyUsageCertSign}); err != nil {
		return nil, fmt.Errorf("make tombstone: %w", err)
	}
	return &g, nil
}

// tombstone returns what stands in for a secret that was withdrawn.
func (g *graves) tombstone(name string, k kind, plain bool) (*resource, error) {
	at, err := g.dig()
	if err != nil {
		return nil, err
	}
	if k.context {
		return validation(name, []root{{k.domain, at.root}}, plain)
	}
	return tlsCertificate(name, at.cert, at.key)
}

// digest is the version of several secrets together.
func digest(all []*resource) string {
	var of []byte
	for _, r := range all {
		of = append(append(append(append(of, r.name...), 0), r.version...), 0)
	}
	return hash(of)
}

func hash(b []byte) string {
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:16])
}

// What of a response is there before it is sent: its resources, which are
// shared. The rest is of one stream.
const (
	fieldVersion   = 1
	fieldResources = 2
	fieldType      = 4
	fieldNonce     = 5
	fieldRemoved   = 6 // of the delta protocol

	fieldResourceVersion = 1
	fieldResourceAny     = 2
	fieldResourceName    = 3
)

func appendText(b []byte, field protowire.Number, s string) []byte {
	return protowire.AppendString(protowire.AppendTag(b, field, protowire.BytesType), s)
}

func appendLength(b []byte, field protowire.Number, n int) []byte {
	return protowire.AppendVarint(protowire.AppendTag(b, field, protowire.BytesType), uint64(n))
}
