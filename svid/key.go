package svid

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"fmt"
	"sync/atomic"
)

// A KeyType names a kind of private key.
type KeyType string

// The kinds of private keys.
const (
	ECP256  KeyType = "ec-p256"
	ECP384  KeyType = "ec-p384"
	RSA2048 KeyType = "rsa-2048"
)

// ParseKeyType reads the name of a key type; the empty name is ECP256.
func ParseKeyType(s string) (KeyType, error) {
	switch t := KeyType(s); t {
	case "":
		return ECP256, nil
	case ECP256, ECP384, RSA2048:
		return t, nil
	}
	return "", fmt.Errorf("key type %q is none of %s, %s, %s", s, ECP256, ECP384, RSA2048)
}

// Generate makes a new key.
func (t KeyType) Generate() (crypto.Signer, error) {
	switch t {
	case "", ECP256:
		return ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	case ECP384:
		return ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	case RSA2048:
		return rsa.GenerateKey(rand.Reader, 2048)
	}
	return nil, fmt.Errorf("generate key: unknown key type %q", string(t))
}

// KeyDER returns the private key as unencrypted PKCS #8.
func (x X509) KeyDER() ([]byte, error) { return x509.MarshalPKCS8PrivateKey(x.Signer) }

// ChainDER returns the certificates as concatenated DER, the leaf first.
func (x X509) ChainDER() []byte { return concat(x.Chain) }

// rsaPool is how many RSA keys lie ready: as many processes may start at once
// without each waiting for the 70 ms that a key takes.
const rsaPool = 32

// keySource makes the workloads' keys. RSA keys come from a pool that a
// goroutine fills up and then ends.
type keySource struct {
	kind    KeyType
	pool    chan crypto.Signer // nil unless RSA
	filling atomic.Bool
}

func newKeySource(kind KeyType) *keySource {
	s := &keySource{kind: kind}
	if kind == RSA2048 {
		s.pool = make(chan crypto.Signer, rsaPool)
		s.refill()
	}
	return s
}

func (s *keySource) take() (crypto.Signer, error) {
	select {
	case k := <-s.pool:
		s.refill()
		return k, nil
	default:
		return s.kind.Generate()
	}
}

// refill starts the filling unless it runs already.
func (s *keySource) refill() {
	if !s.filling.CompareAndSwap(false, true) {
		return
	}
	go func() {
		defer s.filling.Store(false)
		for len(s.pool) < cap(s.pool) {
			k, err := s.kind.Generate()
			if err != nil {
				return // take meets the same error and returns it
			}
			s.pool <- k // only this goroutine sends, so there is room
		}
	}()
}
