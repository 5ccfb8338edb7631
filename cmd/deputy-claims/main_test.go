package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func deputyClaims(t *testing.T, args ...string) (status int, stdout, stderr string) {
	t.Helper()
	var out, errs bytes.Buffer
	status = run(t.Context(), args, &out, &errs)
	return status, out.String(), errs.String()
}

func write(t *testing.T, text string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "rules.hcl")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestCommands(t *testing.T) {
	good := write(t, "rule \"/agent/{who}\" {\n  owner = \"<{who}>\"\n  x509 { dns_names = [\"{who}.example\"] }\n}\n")
	one := write(t, "on_error = \"omit\"\nrule \"spiffe://example.org/{x}\" {\n  chain = [\"/a\"]\n}\nrule \"/old\" {\n  expires = \"2020-01-01T00:00:00Z\"\n}\n")
	bad := write(t, "rule \"/a/..\" {}\nowner = 1\n")
	deny := write(t, "unmapped = \"deny\"\n")
	self := write(t, "rule \"/{x}\" {\n  chain = [\"/a\"]\n}\n")
	open := write(t, "rule \"/a\" {}\n")
	if err := os.Chmod(open, 0o666); err != nil {
		t.Fatal(err)
	}
	missing := filepath.Join(t.TempDir(), "missing")
	for name, tc := range map[string]struct {
		args           []string
		status         int
		stdout, stderr string
	}{
		"no arguments":                {nil, 2, "", help},
		"help":                        {[]string{"help"}, 0, help, ""},
		"version":                     {[]string{"--version"}, 0, "deputy-claims unknown\n", ""},
		"an unknown command":          {[]string{"mint"}, 2, "", "deputy-claims: there is no command \"mint\"; there are check, show and version\n"},
		"check":                       {[]string{"check", good}, 0, good + ": ok, 1 rule\n", ""},
		"check many":                  {[]string{"check", one}, 0, one + ": ok, 2 rules\n", ""},
		"check what others may write": {[]string{"check", open}, 0, open + ": ok, 1 rule\n", "warning: " + open + " may be written by others than its owner (mode 0666), who could give any agent any claim\n"},
		"check for a domain":          {[]string{"check", "--trust-domain", "example.org", one}, 0, one + ": ok, 2 rules\n", ""},
		"check for another":           {[]string{"check", "--trust-domain", "other.org", one}, 1, "", one + ":2:6: the pattern is of the trust domain example.org, and this is other.org\n"},
		"check for none":              {[]string{"check", "--trust-domain", "A B", one}, 2, "", "deputy-claims: --trust-domain: trust domain characters are limited to lowercase letters, numbers, dots, dashes, and underscores\n"},
		"check's help":                {[]string{"check", "--help"}, 0, help, ""},
		"check nothing":               {[]string{"check"}, 2, "", "deputy-claims: check takes one file\n"},
		"check what is wrong":         {[]string{"check", bad}, 1, "", bad + ":1:6: pattern \"/a/..\": segment \"..\": path cannot contain dot segments\n" + bad + ":2:1: unknown key \"owner\" in the rules; there are claim_name, on_error, rules_file and unmapped, and the block rule\n"},
		"check what is not there":     {[]string{"check", missing}, 1, "", "deputy-claims: open " + missing + ": no such file or directory\n"},
		"show": {[]string{"show", good, "spiffe://example.org/agent/x"}, 0,
			`{"delegation":{"v":1,"depth":1,"act":{"sub":"spiffe://example.org/agent/x"},"owner":"<x>"},"x509":{"dns_names":["x.example"]}}`, ""},
		"show without a rule":       {[]string{"show", good, "spiffe://example.org/x"}, 0, "{}", "no rule in force for spiffe://example.org/x: its token has no claim of ours\n"},
		"show after the end":        {[]string{"show", one, "spiffe://example.org/old"}, 0, "{}", "no rule in force for spiffe://example.org/old: its token has no claim of ours\n"},
		"show what goes without":    {[]string{"show", one, "spiffe://example.org/a"}, 0, "{}", "the token goes without its claim: claims of spiffe://example.org/a by the rule at " + one + ":2: chain: spiffe://example.org/a would act for itself\n"},
		"show what is not signed":   {[]string{"show", self, "spiffe://example.org/a"}, 3, "", "no token is signed: claims of spiffe://example.org/a by the rule at " + self + ":1: chain: spiffe://example.org/a would act for itself\n"},
		"show what is denied":       {[]string{"show", deny, "spiffe://example.org/a"}, 3, "", "deputy-claims: no rule in force for spiffe://example.org/a: the rules deny a token\n"},
		"show what is wrong":        {[]string{"show", bad, "spiffe://example.org/a"}, 1, "", ""},
		"show a certificate's flaw": {[]string{"show", good, "spiffe://example.org/agent/X"}, 0, `{"delegation":{"v":1,"depth":1,"act":{"sub":"spiffe://example.org/agent/X"},"owner":"<X>"}}`, "no certificate is signed: certificate of spiffe://example.org/agent/X by the rule at " + good + ":1: DNS name \"X.example\" is not one\n"},
		"show what is no ID":        {[]string{"show", good, "example.org/x"}, 2, "", "deputy-claims: \"example.org/x\": scheme is missing or invalid\n"},
		"show too little":           {[]string{"show", good}, 2, "", "deputy-claims: show takes a file and a SPIFFE ID\n"},
	} {
		t.Run(name, func(t *testing.T) {
			status, stdout, stderr := deputyClaims(t, tc.args...)
			var tidy bytes.Buffer
			if strings.HasPrefix(stdout, "{") && json.Compact(&tidy, []byte(stdout)) == nil {
				stdout = tidy.String()
			}
			if status != tc.status || stdout != tc.stdout || tc.stderr != "" && stderr != tc.stderr {
				t.Errorf("got %d\n%s\n%s\nwant %d\n%s\n%s", status, stdout, stderr, tc.status, tc.stdout, tc.stderr)
			}
		})
	}
}

// The page's rules give the page's claim.
func TestThePageIsRight(t *testing.T) {
	page, err := os.ReadFile("../../docs/spire-plugins.md")
	if err != nil {
		t.Fatal(err)
	}
	_, rest, found := strings.Cut(string(page), "CredentialComposer \"deputy\"")
	_, rest, found2 := strings.Cut(rest, "plugin_data {\n")
	rules, rest, found3 := strings.Cut(rest, "\n    }\n")
	_, rest, found4 := strings.Cut(rest, "```json\n")
	claims, _, found5 := strings.Cut(rest, "```")
	if !found || !found2 || !found3 || !found4 || !found5 {
		t.Fatal("the page has no rules and claim where they were")
	}
	status, stdout, stderr := deputyClaims(t, "show", write(t, rules), "spiffe://example.org/agent/crm/researcher")
	if status != 0 {
		t.Fatalf("got %d, %s", status, stderr)
	}
	var got, want struct{ Delegation map[string]any }
	if err := json.Unmarshal([]byte(stdout), &got); err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal([]byte(claims), &want); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, got); diff != "" || len(got.Delegation) == 0 {
		t.Errorf("(-page +got)\n%s", diff)
	}
}

// Each key that the rules know stands in the page's tables, and no other.
func TestThePageHasEveryKey(t *testing.T) {
	page, err := os.ReadFile("../../docs/spire-plugins.md")
	if err != nil {
		t.Fatal(err)
	}
	section, _, _ := strings.Cut(string(page), "## deputy-attest, in the agent")
	for text, in := range map[string]string{"?": "unknown key", "rule \"/a\" { ? }": "a rule"} {
		_, _, stderr := deputyClaims(t, "check", write(t, strings.Replace(text, "?", "x = 1", 1)))
		_, known, ok := strings.Cut(strings.TrimSpace(stderr), "; there are ")
		if !ok {
			t.Fatalf("%s: got %q", in, stderr)
		}
		keys, blocks, _ := strings.Cut(known, ", and the block")
		for _, block := range strings.Split(strings.TrimLeft(blocks, "s "), " and ") {
			if !strings.Contains(section, fmt.Sprintf("`%s", block)) {
				t.Errorf("the block %s is not in the page", block)
			}
		}
		for key := range strings.SplitSeq(strings.ReplaceAll(keys, " and ", ", "), ", ") {
			if !strings.Contains(section, fmt.Sprintf("| `%s` |", key)) {
				t.Errorf("%s is not in the page", key)
			}
		}
	}
}

// Without a server above it the binary says what it is; it does not hang or
// speak to a terminal in the plugin's protocol.
func TestByHand(t *testing.T) {
	if os.Getenv("DEPUTY_CLAIMS_MAIN") == "1" {
		os.Args = os.Args[:1]
		main()
		return
	}
	cmd := exec.Command(os.Args[0], "-test.run=^TestByHand$")
	cmd.Env = append(os.Environ(), "DEPUTY_CLAIMS_MAIN=1")
	out, err := cmd.CombinedOutput()
	if cmd.ProcessState.ExitCode() != statusUsage || !strings.HasPrefix(string(out), help) {
		t.Errorf("got %v\n%s", err, out)
	}
}
