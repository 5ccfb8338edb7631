package local

import (
	"bytes"
	"crypto"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/deputy-id/deputy/internal/bounded"
	"github.com/deputy-id/deputy/internal/owned"
)

const (
	stateFile   = "keys.json"
	maxFile     = 16 << 20 // bytes; far more than any that we write
	stateFormat = 1
)

// A state is all that must survive a restart. It is immutable.
type state struct {
	Sequence  uint64 // of the bundle that was published last; 0: none was
	X509, JWT slots
	WIT       slots // none, or none that signs, where WIT-SVIDs are off
}

// next is when the next step is due; ttl is the life of new keys.
func (s *state) next(now time.Time, ttl time.Duration) time.Time {
	at := s.X509.next(now, ttl)
	for _, k := range []*slots{&s.JWT, &s.WIT} {
		if k.Active == nil {
			continue
		}
		if t := k.next(now, ttl); t.Before(at) {
			at = t
		}
	}
	return at
}

func (s *state) equal(o *state) bool {
	return s.Sequence == o.Sequence && s.X509.equal(&o.X509) && s.JWT.equal(&o.JWT) && s.WIT.equal(&o.WIT)
}

// The file, as JSON; keys and certificates are DER in base64. It names WIT keys
// only if there are some, so that daemons that know of none can read it.
type stateJSON struct {
	Format      int        `json:"format"`
	TrustDomain string     `json:"trust_domain"`
	Sequence    uint64     `json:"sequence"`
	X509        slotsJSON  `json:"x509"`
	JWT         slotsJSON  `json:"jwt"`
	WIT         *slotsJSON `json:"wit,omitempty"`
}

type slotsJSON struct {
	Active   *slotJSON  `json:"active"`
	Prepared *slotJSON  `json:"prepared,omitempty"`
	Old      []slotJSON `json:"old,omitempty"`
}

type slotJSON struct {
	Key     []byte    `json:"key,omitempty"`    // PKCS #8
	Public  []byte    `json:"public,omitempty"` // PKIX
	Chain   [][]byte  `json:"chain,omitempty"`
	Roots   [][]byte  `json:"roots,omitempty"`
	Created time.Time `json:"created"`
	Expires time.Time `json:"expires"`
}

// readState returns what the file holds, or an empty state if there is none. A
// file that others may read is closed to them; one that is another user's is
// not believed.
func readState(path string, td spiffeid.TrustDomain) (*state, error) {
	data, err := bounded.File(path, maxFile)
	if errors.Is(err, fs.ErrNotExist) {
		return &state{}, nil
	}
	if err == nil {
		err = owned.File(path)
	}
	if err != nil {
		return nil, fmt.Errorf("read keys: %w", err)
	}
	s, err := decodeState(data, td)
	if err != nil {
		return nil, fmt.Errorf("read keys: %s: %w", path, err)
	}
	info, err := os.Stat(path)
	if err == nil && info.Mode().Perm()&0o077 != 0 {
		err = os.Chmod(path, 0o600)
	}
	if err != nil {
		return nil, fmt.Errorf("read keys: %w", err)
	}
	return s, nil
}

// decodeStrict reads one JSON document that has no unknown key and nothing
// after it.
func decodeStrict(data []byte, v any) error {
	d := json.NewDecoder(bytes.NewReader(data))
	d.DisallowUnknownFields()
	if err := d.Decode(v); err != nil {
		return fmt.Errorf("damaged: %w", err)
	}
	if _, err := d.Token(); err != io.EOF {
		return errors.New("damaged: something follows the document")
	}
	return nil
}

// checkOrigin refuses a file of another format or trust domain.
func checkOrigin(format int, trustDomain string, td spiffeid.TrustDomain) error {
	if format != stateFormat {
		return fmt.Errorf("has format %d, want %d", format, stateFormat)
	}
	if trustDomain != td.Name() {
		return fmt.Errorf("belongs to trust domain %q, not %q", trustDomain, td.Name())
	}
	return nil
}

func decodeState(data []byte, td spiffeid.TrustDomain) (*state, error) {
	var j stateJSON
	if err := decodeStrict(data, &j); err != nil {
		return nil, err
	}
	if err := checkOrigin(j.Format, j.TrustDomain, td); err != nil {
		return nil, err
	}
	if j.Sequence == 0 {
		return nil, errors.New("damaged: no sequence number")
	}
	s := &state{Sequence: j.Sequence}
	for _, k := range []struct {
		name string
		from *slotsJSON
		to   *slots
		ca   bool
	}{{"X.509", &j.X509, &s.X509, true}, {"JWT", &j.JWT, &s.JWT, false}} {
		if err := k.to.decode(k.from, k.ca); err != nil {
			return nil, fmt.Errorf("damaged: %s: %w", k.name, err)
		}
		if k.to.Active == nil {
			return nil, fmt.Errorf("damaged: %s: no active key", k.name)
		}
	}
	if j.WIT != nil {
		if err := s.WIT.decode(j.WIT, false); err != nil {
			return nil, fmt.Errorf("damaged: WIT: %w", err)
		}
		if s.WIT.Active == nil && s.WIT.Prepared != nil {
			return nil, errors.New("damaged: WIT: a prepared key, and none that it follows")
		}
	}
	return s, nil
}

func (s *slots) decode(j *slotsJSON, ca bool) (err error) {
	if j.Active != nil {
		if s.Active, err = decodeSlot(j.Active, ca, true); err != nil {
			return fmt.Errorf("active key: %w", err)
		}
	}
	if j.Prepared != nil {
		if s.Prepared, err = decodeSlot(j.Prepared, ca, true); err != nil {
			return fmt.Errorf("prepared key: %w", err)
		}
	}
	for i := range j.Old {
		o, err := decodeSlot(&j.Old[i], ca, false)
		if err != nil {
			return fmt.Errorf("old key %d: %w", i+1, err)
		}
		s.Old = append(s.Old, o)
	}
	return nil
}

// decodeSlot checks that all parts of a slot belong together. Errors quote no
// key.
func decodeSlot(j *slotJSON, ca, signs bool) (*slot, error) {
	s := &slot{Created: j.Created, Expires: j.Expires}
	if !s.Expires.After(s.Created) {
		return nil, errors.New("ends before it begins")
	}
	pub, err := x509.ParsePKIXPublicKey(j.Public)
	if err != nil {
		return nil, errors.New("public key cannot be read")
	}
	s.pub = pub
	if s.ID, err = keyID(pub); err != nil {
		return nil, errors.New("public key cannot be read")
	}
	if signs || len(j.Key) > 0 {
		key, err := x509.ParsePKCS8PrivateKey(j.Key)
		if err != nil {
			return nil, errors.New("private key cannot be read")
		}
		signer, ok := key.(crypto.Signer)
		if !ok || !equalPublic(signer.Public(), pub) {
			return nil, errors.New("private and public key are not a pair")
		}
		s.key = signer
	}
	if s.chain, err = parseCertificates(j.Chain); err != nil {
		return nil, err
	}
	if s.roots, err = parseCertificates(j.Roots); err != nil {
		return nil, err
	}
	if !ca {
		if len(s.chain)+len(s.roots) > 0 {
			return nil, errors.New("has certificates although it is no CA")
		}
		return s, nil
	}
	switch {
	case len(s.chain) == 0 || len(s.roots) == 0:
		return nil, errors.New("has no certificate")
	case !s.chain[0].IsCA || s.chain[0].KeyUsage&x509.KeyUsageCertSign == 0:
		return nil, errors.New("certificate is no CA's")
	case !equalPublic(s.chain[0].PublicKey, pub):
		return nil, errors.New("certificate is of another key")
	case !s.chain[0].NotAfter.Equal(s.Expires):
		return nil, errors.New("certificate ends at another time")
	}
	return s, nil
}

func parseCertificates(ders [][]byte) ([]*x509.Certificate, error) {
	var certs []*x509.Certificate
	for _, der := range ders {
		c, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, errors.New("certificate cannot be read")
		}
		certs = append(certs, c)
	}
	return certs, nil
}

func equalPublic(a, b crypto.PublicKey) bool {
	k, ok := a.(interface{ Equal(crypto.PublicKey) bool })
	return ok && k.Equal(b)
}

func (s *state) encode(td spiffeid.TrustDomain) ([]byte, error) {
	j := stateJSON{Format: stateFormat, TrustDomain: td.Name(), Sequence: s.Sequence}
	for _, k := range []struct {
		from *slots
		to   *slotsJSON
	}{{&s.X509, &j.X509}, {&s.JWT, &j.JWT}} {
		if err := k.from.encode(k.to); err != nil {
			return nil, fmt.Errorf("encode keys: %w", err)
		}
	}
	if len(s.WIT.all()) > 0 {
		j.WIT = new(slotsJSON)
		if err := s.WIT.encode(j.WIT); err != nil {
			return nil, fmt.Errorf("encode keys: %w", err)
		}
	}
	return json.MarshalIndent(j, "", "  ")
}

func (s *slots) encode(j *slotsJSON) (err error) {
	if s.Active != nil {
		if j.Active, err = s.Active.encode(); err != nil {
			return err
		}
	}
	if s.Prepared != nil {
		if j.Prepared, err = s.Prepared.encode(); err != nil {
			return err
		}
	}
	for _, o := range s.Old {
		e, err := o.encode()
		if err != nil {
			return err
		}
		j.Old = append(j.Old, *e)
	}
	return nil
}

func (s *slot) encode() (*slotJSON, error) {
	j := &slotJSON{Created: s.Created, Expires: s.Expires}
	var err error
	if j.Public, err = x509.MarshalPKIXPublicKey(s.pub); err != nil {
		return nil, err
	}
	if s.key != nil {
		if j.Key, err = x509.MarshalPKCS8PrivateKey(s.key); err != nil {
			return nil, err
		}
	}
	for _, c := range s.chain {
		j.Chain = append(j.Chain, c.Raw)
	}
	for _, c := range s.roots {
		j.Roots = append(j.Roots, c.Raw)
	}
	return j, nil
}
