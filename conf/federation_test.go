package conf

import (
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

func TestLoadReadsFederation(t *testing.T) {
	c, warnings, err := Load(write(t, `
federation {
  bundle_endpoint {
    address      = "[::]:8443"
    refresh_hint = "1m"
    profile "https_web" {
      cert_file = "/etc/deputy/tls.pem"
      key_file  = "/etc/deputy/tls.key"
    }
  }
  federates_with "a.example" {
    bundle_endpoint_url = "https://a.example:8443/bundles/a?format=spiffe"
    profile "https_spiffe" {
      endpoint_spiffe_id = "spiffe://a.example/spire/server"
      bootstrap_bundle   = "/etc/deputy/a.json"
    }
  }
  federates_with "b.example" {
    bundle_endpoint_url = "https://192.0.2.7"
    profile "https_web" { ca_file = "/etc/deputy/ca.pem" }
  }
  federates_with "c.example" {
    bundle_endpoint_url = "https://mirror.example"
    profile "https_spiffe" { endpoint_spiffe_id = "spiffe://mirror.example/x" }
  }
}
authority "local" { ca_ttl = "10m" } # a ninth is more than the hint
`), base(t))
	if err != nil || len(warnings) > 0 {
		t.Fatal(err, warnings)
	}
	e := c.Federation.Endpoint
	got := []any{e.Address.Value, e.RefreshHint.Value, e.Profile.Value, e.CertFile.Value, e.KeyFile.Value}
	for _, w := range c.Federation.FederatesWith {
		got = append(got, w.TrustDomain.Value.Name(), w.URL.Value, w.Profile.Value, w.EndpointID.Value.String(), w.BootstrapBundle.Value, w.CAFile.Value)
	}
	want := []any{"[::]:8443", time.Minute, Web, "/etc/deputy/tls.pem", "/etc/deputy/tls.key",
		"a.example", "https://a.example:8443/bundles/a?format=spiffe", SPIFFE, "spiffe://a.example/spire/server", "/etc/deputy/a.json", "",
		"b.example", "https://192.0.2.7", Web, "", "", "/etc/deputy/ca.pem",
		"c.example", "https://mirror.example", SPIFFE, "spiffe://mirror.example/x", "", "",
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
}
