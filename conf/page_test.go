package conf

import (
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/deputy-id/deputy/test/page"
)

// sections are those of docs/configuration.md, each with the block that it is
// about, which has %s in the place of its content.
var sections = map[string]string{
	"The file":                               "%s",
	"workload_socket":                        "workload_socket {\n%s\n}",
	"admin_socket":                           "admin_socket {\n%s\n}",
	`authority "local"`:                      "authority \"local\" {\n%s\n}",
	`attestor "docker"`:                      "attestor \"docker\" {\n%s\n}",
	`entry "/PATH"`:                          "entry \"/a\" {\n%s\n}",
	"sds":                                    "sds {\n%s\n}",
	"federation":                             "federation {\n%s\n}",
	"bundle_endpoint":                        "federation {\nbundle_endpoint {\n%s\n}\n}",
	"oidc_discovery":                         "oidc_discovery {\n%s\n}",
	"broker":                                 "broker {\n%s\n}",
	`client "SPIFFE ID"`:                     "broker {\nclient \"spiffe://a/b\" {\n%s\n}\n}",
	"kubelet":                                "broker {\nkubelet {\n%s\n}\n}",
	"delegated_identity":                     "delegated_identity {\n%s\n}",
	"experimental":                           "experimental {\n%s\n}",
	`federates_with "TRUST-DOMAIN"`:          "federation {\nfederates_with \"b\" {\n%s\n}\n}",
	`profile "https_web" of bundle_endpoint`: "federation {\nbundle_endpoint {\nprofile \"https_web\" {\n%s\n}\n}\n}",
	`profile "https_web" of federates_with`:  "federation {\nfederates_with \"b\" {\nprofile \"https_web\" {\n%s\n}\n}\n}",
	`profile "https_spiffe" of federates_with`: "federation {\nfederates_with \"b\" {\nprofile \"https_spiffe\" {\n%s\n}\n}\n}",
}

// The loader says of an unknown key and block which there are: the page has
// them all, and no others.
func TestPageHasEverySetting(t *testing.T) {
	doc := page.Open(t, "../docs/configuration.md")
	named := regexp.MustCompile("(?m)^\\| `([a-z0-9_]+)` \\|")
	for heading, block := range sections {
		section, _, _ := strings.Cut(string(doc.Section(t, heading)), "\n#") // without those below it
		var keys []string
		for _, m := range named.FindAllStringSubmatch(section, -1) {
			keys = append(keys, m[1])
		}
		slices.Sort(keys)
		if diff := cmp.Diff(there(t, block, "nonsense = 1", "key"), keys); diff != "" {
			t.Errorf("keys of %s: - there are, + the page has\n%s", heading, diff)
		}
		for _, name := range there(t, block, "nonsense {}", "block") {
			if !regexp.MustCompile(`(?m)^#+ `+name+`\b`).MatchString(string(doc)) && name != "profile" {
				t.Errorf("block %s: the page has no heading for it", name)
			}
		}
	}
}

// there is what the loader says that there is in the place of nonsense.
func there(t *testing.T, block, nonsense, kind string) []string {
	t.Helper()
	_, _, err := Load(write(t, fmt.Sprintf(block, nonsense)), base(t))
	var all Problems
	errors.As(err, &all)
	for _, p := range all {
		_, names, ok := strings.Cut(p.Reason, "; there ")
		if !ok || !strings.HasPrefix(p.Reason, "unknown "+kind+` "nonsense"`) {
			continue
		}
		if names == "are none" {
			return nil
		}
		names = strings.TrimPrefix(strings.TrimPrefix(names, "are "), "is only ")
		return strings.Split(strings.Replace(names, " and ", ", ", 1), ", ")
	}
	t.Fatalf("no word of an unknown %s in %v", kind, err)
	return nil
}
