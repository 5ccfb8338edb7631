package main

import (
	"fmt"

	"github.com/hashicorp/go-hclog"

	"github.com/deputy-id/deputy/conf"
	"github.com/deputy-id/deputy/svid"
	"github.com/deputy-id/deputy/svid/discovery"
)

// listenDiscovery returns what serves OpenID Connect discovery, nil where it is
// not configured.
func listenDiscovery(c *conf.Config, a svid.Authority, log hclog.Logger) (*discovery.Server, error) {
	d := c.OIDCDiscovery
	if d == nil {
		return nil, nil
	}
	pair, err := openPair(d.CertFile, d.KeyFile, "oidc_discovery", log)
	if err != nil {
		return nil, fmt.Errorf("oidc_discovery: %w", err)
	}
	h, err := discovery.New(c.Authority.JWTIssuer.Value, a, log)
	if err != nil {
		return nil, fmt.Errorf("oidc_discovery: %w", err)
	}
	s, err := discovery.Listen(d.Address.Value, h, pair.GetCertificate, log)
	if err != nil {
		return nil, fmt.Errorf("oidc_discovery: %w", err)
	}
	log.Info("serving OpenID Connect discovery", "address", s.Addr().String(), "issuer", c.Authority.JWTIssuer.Value)
	return s, nil
}

// discoveryValues are for needRestart.
func discoveryValues(c *conf.Config) []string {
	d := c.OIDCDiscovery
	if d == nil {
		return nil
	}
	return []string{d.Address.Value, d.CertFile.Value, d.KeyFile.Value}
}
