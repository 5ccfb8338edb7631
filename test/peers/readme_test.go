package peers

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
)

// What the README and the page show for a SPIRE server, in the place of the
// sample's own plugin, works as it stands; SPIRE prints its plugin_data anew.
func TestStockServerTakesThePagesLines(t *testing.T) {
	for page, block := range map[string]string{"README.md": "```conf\n", "docs/spire-plugins.md": "```hcl\nplugins {\n"} {
		t.Run(page, func(t *testing.T) {
			text, err := os.ReadFile("../../" + page)
			if err != nil {
				t.Fatal(err)
			}
			_, rest, ok := strings.Cut(string(text), block+"  CredentialComposer")
			lines, _, ok2 := strings.Cut(rest, "\n  }\n")
			if !ok || !ok2 {
				t.Fatal("the page has no plugin of a server where it was")
			}
			bin := plugins(t)
			lines = strings.NewReplacer("/opt/deputy/bin", bin,
				"CHECKSUM-OF-DEPUTY-CLAIMS", checksum(t, filepath.Join(bin, "deputy-claims"))).Replace(lines)
			s := newSPIRE(t, changes{agent: withoutAttest, server: func(sample string) string {
				before, after, _ := strings.Cut(sample, "  CredentialComposer")
				_, after, _ = strings.Cut(after, "\n  }\n")
				return before + "  CredentialComposer" + lines + "\n  }\n" + after
			}})
			s.startServer(t)
			token := s.cli(t, "jwt", "mint", "-spiffeID", "spiffe://example.org"+researcher, "-audience", "x")
			svid, err := jwtsvid.ParseInsecure(strings.TrimSpace(token), []string{"x"})
			if err != nil {
				t.Fatal(err)
			}
			claim := delegation(t, svid)
			if diff := cmp.Diff([]any{"head-of-crm@example.org", "https://idp.example.org", []any{"crm:read", "web:search"}},
				[]any{claim["sub"], claim["iss"], claim["scopes"]}); diff != "" {
				t.Error(diff)
			}
		})
	}
}
