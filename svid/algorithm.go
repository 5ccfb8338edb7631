package svid

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rsa"
	_ "crypto/sha256" // the hashes that the algorithms name
	_ "crypto/sha512"
	"errors"
	"fmt"
	"math/big"

	"github.com/go-jose/go-jose/v4"
)

// A jwtAlgorithm is one that a JWT-SVID may be signed with.
type jwtAlgorithm struct {
	name  string
	hash  crypto.Hash
	curve elliptic.Curve // of ES*
	half  int            // bytes of each half of an ES* signature (RFC 7518 §3.4)
	pss   bool
}

// algorithms by name; the names are those of SignatureAlgorithms.
var algorithms = map[string]jwtAlgorithm{
	"RS256": {name: "RS256", hash: crypto.SHA256},
	"RS384": {name: "RS384", hash: crypto.SHA384},
	"RS512": {name: "RS512", hash: crypto.SHA512},
	"PS256": {name: "PS256", hash: crypto.SHA256, pss: true},
	"PS384": {name: "PS384", hash: crypto.SHA384, pss: true},
	"PS512": {name: "PS512", hash: crypto.SHA512, pss: true},
	"ES256": {name: "ES256", hash: crypto.SHA256, curve: elliptic.P256(), half: 32},
	"ES384": {name: "ES384", hash: crypto.SHA384, curve: elliptic.P384(), half: 48},
	"ES512": {name: "ES512", hash: crypto.SHA512, curve: elliptic.P521(), half: 66},
}

// SigningAlgorithms are those that a key of ours may sign with.
var SigningAlgorithms = []jose.SignatureAlgorithm{jose.RS256, jose.ES256, jose.ES384}

// Algorithm returns the one that such a key of ours signs with.
func Algorithm(pub crypto.PublicKey) (jose.SignatureAlgorithm, error) {
	a, err := algorithmFor(pub)
	return jose.SignatureAlgorithm(a.name), err
}

// algorithmFor returns the algorithm that we sign with by such a key.
func algorithmFor(pub crypto.PublicKey) (jwtAlgorithm, error) {
	switch k := pub.(type) {
	case *rsa.PublicKey:
		return algorithms["RS256"], nil
	case *ecdsa.PublicKey:
		for _, name := range []string{"ES256", "ES384"} {
			if algorithms[name].curve == k.Curve {
				return algorithms[name], nil
			}
		}
	}
	return jwtAlgorithm{}, fmt.Errorf("no algorithm for a key of type %T", pub)
}

func (a jwtAlgorithm) digest(signed []byte) []byte {
	h := a.hash.New()
	h.Write(signed)
	return h.Sum(nil)
}

func (a jwtAlgorithm) opts() crypto.SignerOpts {
	if a.pss {
		return &rsa.PSSOptions{SaltLength: rsa.PSSSaltLengthEqualsHash, Hash: a.hash}
	}
	return a.hash
}

var errSignature = errors.New("signature does not verify")

// verify checks a signature. The key must be of the algorithm's kind, so that
// the token does not choose how a key is used.
func (a jwtAlgorithm) verify(pub crypto.PublicKey, signed, sig []byte) error {
	switch k := pub.(type) {
	case *ecdsa.PublicKey:
		if a.curve == nil || k.Curve != a.curve || len(sig) != 2*a.half {
			return errSignature
		}
		r, s := new(big.Int).SetBytes(sig[:a.half]), new(big.Int).SetBytes(sig[a.half:])
		if !ecdsa.Verify(k, a.digest(signed), r, s) {
			return errSignature
		}
		return nil
	case *rsa.PublicKey:
		switch {
		case a.curve != nil:
		case a.pss:
			if rsa.VerifyPSS(k, a.hash, a.digest(signed), sig, a.opts().(*rsa.PSSOptions)) == nil {
				return nil
			}
		default:
			if rsa.VerifyPKCS1v15(k, a.hash, a.digest(signed), sig) == nil {
				return nil
			}
		}
	}
	return errSignature
}
