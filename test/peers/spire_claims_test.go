package peers

import (
	"fmt"
	"os"
	"os/exec"
	"regexp"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"

	"github.com/deputy-id/deputy/test/binary"
	"github.com/deputy-id/deputy/test/wait"
)

const researcher = "/agent/crm/researcher"

// entries of this process: one that the sample's rules map, and one that none does.
func (s *spire) researchers(t testing.TB) {
	t.Helper()
	mine := fmt.Sprintf("unix:uid:%d", os.Getuid())
	s.entry(t, researcher, mine)
	s.entry(t, "/agent/crm/mute", mine)
}

// withoutAttest leaves the agent its own attestor alone.
func withoutAttest(text string) string {
	return without(`WorkloadAttestor "image"`)(without(`WorkloadAttestor "deputy"`)(text))
}

func delegation(t testing.TB, s *jwtsvid.SVID) map[string]any {
	t.Helper()
	claim, ok := s.Claims["delegation"].(map[string]any)
	if !ok {
		t.Fatalf("got claims %v, want a delegation among them", s.Claims)
	}
	return claim
}

func TestStockServerMintsWhatTheRulesSay(t *testing.T) {
	s := newSPIRE(t, changes{agent: withoutAttest})
	s.startServer(t)
	s.researchers(t)
	s.startAgent(t)

	svid := s.mustJWT(t, researcher, "first")
	planner := map[string]any{"sub": "spiffe://example.org/agent/crm/planner"}
	want := map[string]any{
		"v":           1.0,
		"iss":         "https://idp.example.org",
		"sub":         "head-of-crm@example.org",
		"act":         map[string]any{"sub": "spiffe://example.org/agent/crm/researcher", "act": planner},
		"depth":       2.0,
		"max_depth":   3.0,
		"scopes":      []any{"crm:read", "web:search"},
		"owner":       "team-crm",
		"agent_type":  "ai_agent",
		"purpose":     "literature research",
		"may_act":     []any{"spiffe://example.org/agent/crm/extractor"},
		"constraints": map[string]any{"rate": map[string]any{"limit": 120.0, "window": 60.0}},
	}
	if diff := cmp.Diff(want, delegation(t, svid)); diff != "" {
		t.Errorf("delegation (-want +got):\n%s", diff)
	}
	if svid.ID.String() != "spiffe://example.org"+researcher || !cmp.Equal(svid.Audience, []string{"first"}) || svid.Claims["act"] != nil {
		t.Errorf("got %s for %q with act %v, want SPIRE's own claims as they are", svid.ID, svid.Audience, svid.Claims["act"])
	}
	if claim, ok := s.mustJWT(t, "/agent/crm/mute", "first").Claims["delegation"]; ok {
		t.Errorf("an ID without a rule got %v", claim)
	}

	// Each token is for an audience of its own: the agent keeps those it has.
	n := 0
	purpose := func() string {
		n++
		svid := s.mustJWT(t, researcher, fmt.Sprintf("audience-%d", n))
		text, _ := delegation(t, svid)["purpose"].(string)
		return text
	}
	s.write(t, "claims.hcl", strings.Replace(sample(t, "claims.hcl"), "literature research", "market research", 1))
	wait.Until(t, "a token by the new rules", func() bool { return purpose() == "market research" })

	// A broken file is said to be so, with its place, and changes nothing.
	s.write(t, "claims.hcl", "rule \"/agent/{team}/researcher\" {\n  purpos = \"none\"\n}\n")
	s.server.Says(t, regexp.QuoteMeta(s.rules)+":2:3: ")
	if got := purpose(); got != "market research" {
		t.Errorf("with a broken file: got purpose %q, want the last good one", got)
	}
	if err := os.Remove(s.rules); err != nil {
		t.Fatal(err)
	}
	s.server.Says(t, "no such file")
	if got := purpose(); got != "market research" {
		t.Errorf("without a file: got purpose %q, want the last good one", got)
	}
	s.write(t, "claims.hcl", strings.Replace(sample(t, "claims.hcl"), "literature research", "mended", 1))
	wait.Until(t, "a token by the mended rules", func() bool { return purpose() == "mended" })

	// SPIRE does not start a plugin again that has ended: it signs for nobody
	// until it is restarted itself, and says why.
	pids := children(t, s.server.PID(), "deputy-claims")
	if len(pids) != 1 {
		t.Fatalf("got %d processes of the plugin, want 1", len(pids))
	}
	if err := syscall.Kill(pids[0], syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	wait.Until(t, "a refusal", func() bool {
		n++
		_, err := s.jwt(researcher, fmt.Sprintf("audience-%d", n))
		return err != nil
	})
	contains(t, s.server.Log(), "credentialcomposer(deputy)")
	s.server.End(t)
	s.startServer(t)
	if got := purpose(); got != "mended" {
		t.Errorf("after a restart of the server: got purpose %q, want it as before", got)
	}
}

// Rules in a plugin_data_file are SPIRE's to read: it does at SIGUSR1.
func TestStockServerReconfiguresThePlugin(t *testing.T) {
	s := newSPIRE(t, changes{
		agent: withoutAttest,
		server: func(text string) string {
			before, rest, _ := strings.Cut(text, "    plugin_data {\n      # Read again")
			_, rest, _ = strings.Cut(rest, "    }\n")
			return before + "    plugin_data_file = \"CLAIMS\"\n" + rest
		},
	})
	s.write(t, "server.conf", strings.ReplaceAll(s.read(t, "server.conf"), "CLAIMS", s.rules))
	s.startServer(t)
	mint := func() (out string) {
		return s.cli(t, "jwt", "mint", "-spiffeID", "spiffe://example.org"+researcher, "-audience", "x")
	}
	purpose := func() string {
		svid, err := jwtsvid.ParseInsecure(strings.TrimSpace(mint()), []string{"x"})
		if err != nil {
			t.Fatal(err)
		}
		text, _ := delegation(t, svid)["purpose"].(string)
		return text
	}
	if got := purpose(); got != "literature research" {
		t.Errorf("got purpose %q, want the sample's", got)
	}
	reload := func(text string) {
		s.write(t, "claims.hcl", text)
		s.server.Signal(t, syscall.SIGUSR1)
	}
	reload("rule \"/agent/x\" {\n  purpos = \"none\"\n}\n")
	s.server.Says(t, "Failed to reconfigure plugin")
	contains(t, s.server.Log(), ":2:3: ")
	if got := purpose(); got != "literature research" {
		t.Errorf("after a broken configuration: got purpose %q, want the last good one", got)
	}
	reload(strings.Replace(sample(t, "claims.hcl"), "literature research", "market research", 1))
	wait.Until(t, "the new configuration", func() bool { return purpose() == "market research" })
}

func TestStockServerRefusesABrokenStart(t *testing.T) {
	s := newSPIRE(t, changes{rules: "rule \"/agent/../x\" {\n}\n"})
	for _, verb := range []string{"validate", "run"} {
		contains(t, fail(t, s.serverBin, verb, "-config", s.path("server.conf")), s.rules+":1:6: ")
	}
}

// The lines of the documentation that check and show rules.
func TestRulesOnTheCommandLine(t *testing.T) {
	claims := binary.Program(t, "cmd/deputy-claims")
	run(t, claims, "check", "../../conf/samples/spire/claims.hcl")
	out, err := exec.Command(claims, "show", "../../conf/samples/spire/claims.hcl", "spiffe://example.org"+researcher).Output()
	if err != nil {
		t.Fatal(err)
	}
	contains(t, string(out), "head-of-crm@example.org", "team-crm")
}
