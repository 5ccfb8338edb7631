package local

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/deputy-id/deputy/internal/bounded"
	"github.com/deputy-id/deputy/internal/durable"
	"github.com/deputy-id/deputy/svid"
)

const federatedFile = "federated.json"

type federatedJSON struct {
	Format      int                        `json:"format"`
	TrustDomain string                     `json:"trust_domain"`
	Bundles     map[string]json.RawMessage `json:"trust_domains"` // in SPIFFE's format
}

// SetFederated stores and publishes the bundle of another trust domain in the
// place of the one there is.
func (a *Authority) SetFederated(b *svid.Bundle) error {
	return a.UpdateFederated(b.TrustDomain, func(*svid.Bundle) (*svid.Bundle, error) { return b, nil })
}

// UpdateFederated is SetFederated of what next makes of the bundle that there
// is, nil if there is none. Nobody changes that one meanwhile, so next must
// neither block nor ask for a change itself. Its error changes nothing and is
// returned; so does the bundle that it was given. Every bundle of another trust
// domain comes in here, and one that is ours is refused (svid.ErrOurs).
func (a *Authority) UpdateFederated(td spiffeid.TrustDomain, next func(had *svid.Bundle) (*svid.Bundle, error)) error {
	if td == a.o.TrustDomain {
		return fmt.Errorf("set bundle of %s: %w", td, ErrOwnTrustDomain)
	}
	shared := false
	err := a.changeFederated(func(m map[spiffeid.TrustDomain]*svid.Bundle) (bool, error) {
		had := m[td]
		b, err := next(had)
		if err != nil || b == had {
			return false, err
		}
		all, _ := a.published.Load()
		if err := b.CheckForeign(all.Own); err != nil {
			return false, err
		}
		shared = b.SharesAuthority(all.Own)
		m[td] = b
		return true, nil
	})
	switch {
	case errors.Is(err, svid.ErrOurs):
		return err
	case err != nil:
		return fmt.Errorf("set bundle of %s: %w", td, err)
	case shared:
		a.log.Warn("bundle shares an X.509 authority with ours: whoever holds its key can speak for both trust domains", "trust_domain", td.Name())
	}
	return nil
}

// DeleteFederated forgets the bundle of another trust domain; ErrNotFederated
// says that there is none.
func (a *Authority) DeleteFederated(td spiffeid.TrustDomain) error {
	err := a.changeFederated(func(m map[spiffeid.TrustDomain]*svid.Bundle) (bool, error) {
		if _, ok := m[td]; !ok {
			return false, ErrNotFederated
		}
		delete(m, td)
		return true, nil
	})
	if err != nil {
		return fmt.Errorf("delete bundle of %s: %w", td, err)
	}
	return nil
}

// changeFederated publishes a change, if there is one, once it is stored.
func (a *Authority) changeFederated(change func(map[spiffeid.TrustDomain]*svid.Bundle) (bool, error)) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	published, _ := a.published.Load()
	next := maps.Clone(published.Federated)
	if changed, err := change(next); err != nil || !changed {
		return err
	}
	data, err := encodeFederated(next, a.o.TrustDomain)
	if err != nil {
		return err
	}
	// A bundle that could not be read again would stop the next start.
	if len(data) > maxFile {
		return fmt.Errorf("all bundles together would have %d bytes, more than %d", len(data), maxFile)
	}
	if _, err := decodeFederated(data, a.o.TrustDomain); err != nil {
		return err
	}
	if a.o.DataDir != "" {
		if err := durable.WriteFile(a.path(federatedFile), data, 0o600); err != nil {
			return err
		}
	}
	a.published.Store(&svid.Bundles{Own: published.Own, Federated: next})
	return nil
}

func encodeFederated(m map[spiffeid.TrustDomain]*svid.Bundle, td spiffeid.TrustDomain) ([]byte, error) {
	j := federatedJSON{Format: stateFormat, TrustDomain: td.Name(), Bundles: make(map[string]json.RawMessage)}
	for td, b := range m {
		data, err := b.Marshal()
		if err != nil {
			return nil, err
		}
		j.Bundles[td.Name()] = data
	}
	return json.MarshalIndent(j, "", "  ")
}

// readFederated returns what the file holds, or nothing if there is none.
func readFederated(path string, td spiffeid.TrustDomain) (map[spiffeid.TrustDomain]*svid.Bundle, error) {
	data, err := bounded.File(path, maxFile)
	if errors.Is(err, fs.ErrNotExist) {
		return map[spiffeid.TrustDomain]*svid.Bundle{}, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read federated bundles: %w", err)
	}
	m, err := decodeFederated(data, td)
	if err != nil {
		return nil, fmt.Errorf("read federated bundles: %s: %w", path, err)
	}
	return m, nil
}

func decodeFederated(data []byte, own spiffeid.TrustDomain) (map[spiffeid.TrustDomain]*svid.Bundle, error) {
	var j federatedJSON
	if err := decodeStrict(data, &j); err != nil {
		return nil, err
	}
	if err := checkOrigin(j.Format, j.TrustDomain, own); err != nil {
		return nil, err
	}
	m := make(map[spiffeid.TrustDomain]*svid.Bundle)
	for name, doc := range j.Bundles {
		td, err := spiffeid.TrustDomainFromString(name)
		if err != nil || td == own {
			return nil, fmt.Errorf("damaged: trust domain %q", name)
		}
		if m[td], err = svid.ParseBundle(td, doc); err != nil {
			return nil, fmt.Errorf("damaged: %w", err)
		}
	}
	return m, nil
}
