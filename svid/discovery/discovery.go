// Package discovery serves what a relying party of OpenID Connect needs to
// take JWT-SVIDs as ID tokens: the provider's configuration (OpenID Connect
// Discovery 1.0) and the trust domain's JWT keys as a JWK Set.
//
// It defends against a client that chooses what is said: issuer and key
// location are those of the configuration, whatever Host a request names. It
// reads nothing of a request but its method and path, and gives away what is
// public: no WIT or X.509 authorities, and no bundle of another trust domain.
//
// A caller owes it a jwt_issuer that is the same as that of the tokens.
package discovery

import (
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"maps"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/hashicorp/go-hclog"

	"github.com/deputy-id/deputy/svid"
)

// source has the keys; an svid.Authority is one.
type source interface {
	Bundles() (*svid.Bundles, <-chan struct{})
}

// A Handler answers with the two documents under the path of the issuer. It is
// safe for concurrent use.
type Handler struct {
	source               source
	log                  hclog.Logger
	configPath, keysPath string
	configuration        document
	keys                 atomic.Pointer[keySet]
}

// A document is immutable.
type document struct {
	body []byte
	etag string
}

type keySet struct {
	of *svid.Bundle // the keys of which these are
	document
}

// provider is the configuration, as far as there is anything to say. No client
// is ever sent to authorize; the member must be there (Discovery §3), and who
// reads it takes SPIRE's empty one.
type provider struct {
	Issuer        string                    `json:"issuer"`
	KeysURI       string                    `json:"jwks_uri"`
	Authorization string                    `json:"authorization_endpoint"`
	ResponseTypes []string                  `json:"response_types_supported"`
	SubjectTypes  []string                  `json:"subject_types_supported"`
	Algorithms    []jose.SignatureAlgorithm `json:"id_token_signing_alg_values_supported"`
	Claims        []string                  `json:"claims_supported"`
}

// New returns a handler for tokens of this issuer, a URL that begins with
// https:// and has neither query nor fragment.
func New(issuer string, s source, log hclog.Logger) (*Handler, error) {
	u, err := url.Parse(issuer)
	if err != nil {
		return nil, fmt.Errorf("read issuer: %w", err)
	}
	if u.Scheme != "https" || u.Host == "" || u.RawQuery != "" || u.Fragment != "" {
		return nil, fmt.Errorf("issuer %q is not a URL such as https://issuer.example.org", issuer)
	}
	// Discovery §4.1: without the slash that it may end in.
	prefix := strings.TrimSuffix(u.Path, "/")
	config, err := json.Marshal(provider{
		Issuer:        issuer,
		KeysURI:       strings.TrimSuffix(issuer, "/") + "/keys",
		ResponseTypes: []string{"id_token"},
		SubjectTypes:  []string{"public"},
		Algorithms:    svid.SigningAlgorithms,
		Claims:        []string{"aud", "exp", "iat", "iss", "jti", "sub"},
	})
	if err != nil {
		return nil, fmt.Errorf("encode provider configuration: %w", err)
	}
	return &Handler{
		source:        s,
		log:           log,
		configPath:    prefix + "/.well-known/openid-configuration",
		keysPath:      prefix + "/keys",
		configuration: newDocument(config),
	}, nil
}

func newDocument(body []byte) document {
	return document{body, fmt.Sprintf(`"%x"`, sha256.Sum256(body))}
}

// ServeHTTP implements http.Handler.
func (h *Handler) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	head := w.Header()
	head.Set("X-Content-Type-Options", "nosniff")
	if r.URL.Path != h.configPath && r.URL.Path != h.keysPath {
		http.NotFound(w, r)
		return
	}
	if r.Method != http.MethodGet && r.Method != http.MethodHead {
		head.Set("Allow", "GET, HEAD")
		http.Error(w, "method not allowed", http.StatusMethodNotAllowed)
		return
	}
	set, err := h.keySet()
	if err != nil {
		h.log.Warn("keys could not be served", "error", err)
		head.Set("Cache-Control", "no-store")
		head.Set("Retry-After", "5")
		http.Error(w, "keys are not available", http.StatusServiceUnavailable)
		return
	}
	d := set.document
	if r.URL.Path == h.configPath {
		d = h.configuration
	}
	head.Set("Content-Type", "application/json")
	head.Set("ETag", d.etag)
	head.Set("Cache-Control", fmt.Sprintf("public, max-age=%d", maxAge(set.of)/time.Second))
	http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(d.body))
}

// maxAge is how long a copy may be used: as long as a bundle may. The next key
// is published for three times that, at least, before it signs.
func maxAge(b *svid.Bundle) time.Duration { return max(b.RefreshHint, time.Second) }

// keySet returns the keys of now, encoded once for each bundle.
func (h *Handler) keySet() (*keySet, error) {
	all, _ := h.source.Bundles()
	if all == nil || all.Own == nil || len(all.Own.JWTAuthorities) == 0 {
		return nil, svid.ErrNotReady
	}
	if set := h.keys.Load(); set != nil && set.of == all.Own {
		return set, nil
	}
	var jwks jose.JSONWebKeySet
	for _, id := range slices.Sorted(maps.Keys(all.Own.JWTAuthorities)) {
		key := all.Own.JWTAuthorities[id]
		alg, err := svid.Algorithm(key)
		if err != nil {
			return nil, fmt.Errorf("JWT key %s: %w", id, err)
		}
		jwks.Keys = append(jwks.Keys, jose.JSONWebKey{Key: key, KeyID: id, Algorithm: string(alg), Use: "sig"})
	}
	body, err := json.Marshal(jwks)
	if err != nil {
		return nil, fmt.Errorf("encode JWT keys: %w", err)
	}
	set := &keySet{all.Own, newDocument(body)}
	h.keys.Store(set)
	return set, nil
}
