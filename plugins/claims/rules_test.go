package claims

import (
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

var (
	domain = spiffeid.RequireTrustDomainFromString("prod.example")
	noon   = time.Date(2026, 11, 23, 12, 0, 0, 0, time.UTC)
)

func load(t testing.TB, text string) *Rules {
	t.Helper()
	r, err := Load(t.Context(), Source{Name: "rules.hcl", Text: text}, domain)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func id(path string) spiffeid.ID { return spiffeid.RequireFromPath(domain, path) }

// encoded are the claims of an ID as JSON, "" for none.
func encoded(t testing.TB, r *Rules, path string) string {
	t.Helper()
	c, err := r.Claims(id(path), noon)
	if err != nil {
		t.Fatal(err)
	}
	if c == nil {
		return ""
	}
	b, err := json.Marshal(c)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func TestARuleBecomesClaims(t *testing.T) {
	for name, tc := range map[string]struct{ rule, path, want string }{
		"everything": {`
rule "/agent/{team}/researcher" {          # a comment
  subject    = "head-of-{team}@example.org"
  issuer     = "https://idp.example.org"
  owner      = "team-{team}"
  agent_type = "ai_agent"
  purpose    = "literature \"research\""
  scopes     = ["crm:read", "web:{team}"]
  chain      = [
    "/agent/{team}/planner",
    "spiffe://other.example/boss", // of another trust domain
  ]
  may_act    = ["/agent/{team}/extractor"]
  max_depth  = 3
  expires    = "2026-11-24T01:00:00+01:00"
  constraints { rate = "120/1m" }
}`, "/agent/x/researcher", `{"v":1,"depth":3,"max_depth":3,"iss":"https://idp.example.org","sub":"head-of-x@example.org",` +
			`"act":{"sub":"spiffe://prod.example/agent/x/researcher","act":{"sub":"spiffe://prod.example/agent/x/planner","act":{"sub":"spiffe://other.example/boss"}}},` +
			`"may_act":["spiffe://prod.example/agent/x/extractor"],"scopes":["crm:read","web:x"],"constraints":{"rate":{"limit":120,"window":60}},` +
			`"not_after":"2026-11-24T00:00:00Z","owner":"team-x","agent_type":"ai_agent","purpose":"literature \"research\""}`},
		"nothing but the rule": {`rule "/a" {}`, "/a", `{"v":1,"depth":1,"act":{"sub":"spiffe://prod.example/a"}}`},
		"a full ID":            {`rule "spiffe://prod.example/a" {}`, "/a", `{"v":1,"depth":1,"act":{"sub":"spiffe://prod.example/a"}}`},
		"braces of its own":    {`rule "/a" { purpose = "{{x}}" }`, "/a", `{"v":1,"depth":1,"act":{"sub":"spiffe://prod.example/a"},"purpose":"{x}"}`},
		"segments that a sign parts": {`rule "/{ns}/{sa}" { owner = "{ns}:{sa}" }`, "/n-1/s.2",
			`{"v":1,"depth":1,"act":{"sub":"spiffe://prod.example/n-1/s.2"},"owner":"n-1:s.2"}`},
		"an expired rule":     {`rule "/a" { expires = "2026-11-23T12:00:00Z" }`, "/a", ""},
		"no rule":             {`rule "/a" {}`, "/b", ""},
		"below, not itself":   {`rule "/a/*" {}`, "/a", ""},
		"a longer ID":         {`rule "/a/{x}" {}`, "/a/b/c", ""},
		"case counts":         {`rule "/a" {}`, "/A", ""},
		"SPIRE's own":         {`rule "/*" {}`, "/spire/agent/x", ""},
		"an empty file":       {"", "/a", ""},
		"the empty list":      {`rule "/a" { scopes = [] }`, "/a", `{"v":1,"depth":1,"act":{"sub":"spiffe://prod.example/a"}}`},
		"lines end as on DOS": {"rule \"/a\" {\r\n  owner = \"x\"\r\n}\r\n", "/a", `{"v":1,"depth":1,"act":{"sub":"spiffe://prod.example/a"},"owner":"x"}`},
		"an escape":           {`rule "/a" { owner = "\u00fc\U0001F600\\" }`, "/a", `{"v":1,"depth":1,"act":{"sub":"spiffe://prod.example/a"},"owner":"ü😀\\"}`},
	} {
		t.Run(name, func(t *testing.T) {
			if diff := cmp.Diff(tc.want, encoded(t, load(t, tc.rule), tc.path)); diff != "" {
				t.Error(diff)
			}
		})
	}
}

func TestTheMostSpecificRuleWins(t *testing.T) {
	rules := []string{"/*", "/agent/*", "/agent/{team}/*", "/agent/{team}/{role}", "/agent/{team}/researcher", "/agent/x/researcher", "/agent/x/researcher/*", "/{any}"}
	var text strings.Builder
	for _, p := range rules {
		fmt.Fprintf(&text, "rule %q {\n  owner = %q\n}\n", p, strings.NewReplacer("{", "{{", "}", "}}").Replace(p))
	}
	r := load(t, text.String())
	for path, want := range map[string]string{
		"/else/where":           "/*",
		"/agent":                "/{any}",
		"/agent/x":              "/agent/*",
		"/agent/x/r":            "/agent/{team}/{role}",
		"/agent/y/researcher":   "/agent/{team}/researcher",
		"/agent/x/researcher":   "/agent/x/researcher",
		"/agent/x/researcher/1": "/agent/x/researcher/*",
		"/agent/y/researcher/1": "/agent/{team}/*",
		"/agent/x/other/1":      "/agent/{team}/*",
	} {
		c, err := r.Claims(id(path), noon)
		if err != nil || c == nil || c.Owner != want {
			t.Errorf("%s: got %+v, %v, want the rule %s", path, c, err, want)
		}
	}
}

func TestProblems(t *testing.T) {
	for name, tc := range map[string]struct{ text, want string }{
		"an unknown key":                                {"colour = \"blue\"\n", `1:1: unknown key "colour" in the rules; there are claim_name, on_error, rules_file and unmapped, and the block rule`},
		"an unknown key of a rule":                      {"rule \"/a\" {\n  colour = \"blue\"\n}\n", `2:3: unknown key "colour" in a rule; there are agent_type, chain, expires, issuer, max_depth, may_act, owner, purpose, scopes and subject, and the blocks constraints and x509`},
		"an unknown block":                              {`rules "/a" {}`, `1:1: unknown block "rules" in the rules; there is only rule`},
		"plugin_data around it":                         {"plugin_data {\n}\n", `1:1: plugin_data is a block of SPIRE's own configuration; here stands what is in it`},
		"a key twice":                                   {"unmapped = \"omit\"\nunmapped = \"deny\"", `2:1: unmapped is there already, at line 1`},
		"a rule as a key":                               {`rule = { "/a" = {} }`, `1:8: rule is a block: rule { … }, without =`},
		"a key as a block":                              {`claim_name "x" {}`, `1:1: claim_name is a key: claim_name = …`},
		"a quoted key":                                  {`"claim_name" = "x"`, `1:1: a key stands without quotes`},
		"a variable":                                    {`rule "/a" { owner = "x${y}" }`, `1:23: a string has no variables: ${ may not be in it; a segment is {name}`},
		"an escaped variable":                           {`rule "/a" { owner = "$${y}" }`, `1:23: a string has no variables: ${ may not be in it; a segment is {name}`},
		"a variable in code points":                     {`rule "/a" { owner = "\u0024{y}" }`, `1:21: a string may not contain ${ or %{`},
		"a directive":                                   {`rule "/a" { owner = "%{if}" }`, `1:22: a string has no variables: %{ may not be in it; a segment is {name}`},
		"a number for a string":                         {`rule "/a" { owner = 7 }`, `1:21: this is a number; a string in double quotes belongs here`},
		"a word for a string":                           {`rule "/a" { owner = team }`, `1:21: this is a bare word; a string in double quotes belongs here`},
		"a function":                                    {`rule "/a" { owner = upper("x") }`, `1:21: there are no functions or variables here`},
		"a string for a list":                           {`rule "/a" { scopes = "x" }`, `1:22: this is a string; a list of strings belongs here: ["…"]`},
		"a string for a number":                         {`rule "/a" { max_depth = "3" }`, `1:25: this is a string; a whole number belongs here`},
		"a fraction":                                    {`rule "/a" { max_depth = 3.5 }`, `1:25: a number here is whole: digits and nothing else`},
		"a depth of nine":                               {`rule "/a" { max_depth = 9 }`, `1:25: max_depth is a number from 1 to 8`},
		"a depth of zero":                               {`rule "/a" { max_depth = 0 }`, `1:25: max_depth is a number from 1 to 8`},
		"a chain deeper than max_depth":                 {"rule \"/a\" {\n  chain     = [\"/b\"]\n  max_depth = 1\n}", `3:15: max_depth is 1, but the chain has 2 agents with this one`},
		"a chain to itself":                             {"rule \"/a/{x}\" {\n  chain = [\"/b\", \"/a/{x}\"]\n}", `2:11: the chain names the agent itself`},
		"an issuer of nobody":                           {`rule "/a" { issuer = "https://idp.example" }`, `1:1: the rule has an issuer, but no subject that it vouches for`},
		"an issuer that is no URI":                      {"rule \"/a\" {\n  subject = \"x\"\n  issuer  = \"::\"\n}", `3:13: "::": an issuer with a colon in it is a URI`},
		"a scope of two words":                          {`rule "/a" { scopes = ["a b"] }`, `1:23: "a b": a scope is one word of visible ASCII characters, without quotes and backslashes`},
		"a scope twice":                                 {`rule "/a" { scopes = ["a", "a"] }`, `1:28: "a" is in the list already`},
		"blocks in one another on a line":               {`rule "/a" { constraints { rate = "0/60s" } }`, `1:13: a block on one line holds one key; give each its own line`},
		"a rate without a time":                         {"rule \"/a\" {\n  constraints { rate = \"120\" }\n}", `2:24: rate "120" is not uses in a time, such as "120/60s", of at most 999999 whole seconds and as many uses`},
		"a rate that JSON would write with an exponent": {"rule \"/a\" {\n  constraints { rate = \"1000000/60s\" }\n}", `2:24: rate "1000000/60s" is not uses in a time, such as "120/60s", of at most 999999 whole seconds and as many uses`},
		"an unknown constraint":                         {"rule \"/a\" {\n  constraints { uses = \"1\" }\n}", `2:17: unknown key "uses" in constraints; there is only rate`},
		"a time without a zone":                         {`rule "/a" { expires = "2027-01-01" }`, `1:23: "2027-01-01" is not a time such as "2027-01-31T00:00:00Z"`},
		"an empty string":                               {`rule "/a" { owner = "" }`, `1:21: the string is empty`},
		"a control character":                           {"rule \"/a\" { owner = \"a\tb\" }", `1:23: a string has no control characters`},
		"an escaped control character":                  {`rule "/a" { owner = "a\nb" }`, `1:23: of the escapes there are \", \\, \uNNNN and \UNNNNNNNN here`},
		"a code point that is a control":                {`rule "/a" { owner = "\u0007" }`, `1:22: the escape names no character that may be in a claim`},
		"a segment that is not there":                   {`rule "/a/{team}" { owner = "{tema}" }`, `1:28: "{tema}": the pattern has no segment {tema}`},
		"an open brace":                                 {`rule "/a/{team}" { owner = "{team" }`, `1:28: "{team": a { has no } after it; { itself is written {{`},
		"a closing brace":                               {`rule "/a/{team}" { owner = "team}" }`, `1:28: "team}": a } has no { before it; } itself is written }}`},
		"segments that run together":                    {`rule "/{a}/{b}" { owner = "{a}-{b}" }`, `1:27: "{a}-{b}": between {b} and what is before it stands no character that a segment cannot have, such as : @ or /, so two agents could come to one value`},
		"a pattern with dots":                           {`rule "/a/../b" {}`, `1:6: pattern "/a/../b": segment "..": path cannot contain dot segments`},
		"an upper-case trust domain":                    {`rule "spiffe://Prod.example/a" {}`, `1:6: pattern "spiffe://Prod.example/a": trust domain characters are limited to lowercase letters, numbers, dots, dashes, and underscores`},
		"another trust domain":                          {`rule "spiffe://other.example/a" {}`, `1:6: the pattern is of the trust domain other.example, and this is prod.example`},
		"a pattern without a slash":                     {`rule "a" {}`, `1:6: pattern "a": a pattern is a path such as "/agent/{team}/*", or a SPIFFE ID`},
		"a pattern of nothing":                          {`rule "/" {}`, `1:6: pattern "/": the pattern has no segment`},
		"an empty segment":                              {`rule "/a//b" {}`, `1:6: pattern "/a//b": segment "": path cannot contain empty segments`},
		"a trailing slash":                              {`rule "/a/" {}`, `1:6: pattern "/a/": segment "": path cannot contain empty segments`},
		"a star in the middle":                          {`rule "/a/*/b" {}`, `1:6: pattern "/a/*/b": a * may only be the last segment; name this one: {name}`},
		"a star in a segment":                           {`rule "/a/b*" {}`, `1:6: pattern "/a/b*": segment "b*": a * is a segment of its own, and the last one`},
		"half a named segment":                          {`rule "/a/x-{b}" {}`, `1:6: pattern "/a/x-{b}": segment "x-{b}": {name} stands for a whole segment, its name for a word of a-z, 0-9 and _`},
		"a name twice":                                  {`rule "/{a}/{a}" {}`, `1:6: pattern "/{a}/{a}": two segments have the name {a}`},
		"SPIRE's own":                                   {`rule "/spire/agent/*" {}`, `1:6: pattern "/spire/agent/*": IDs under /spire belong to SPIRE itself`},
		"no pattern":                                    {`rule {}`, `1:1: a rule has one pattern: rule "/agent/{team}/*" { … }`},
		"two patterns":                                  {`rule "/a" "/b" {}`, `1:1: a rule has one pattern: rule "/agent/{team}/*" { … }`},
		"the same rule twice":                           {"rule \"/a/{x}\" {}\nrule \"/a/{y}\" {}", `2:1: the rule at rules.hcl:1 has the same IDs`},
		"the same rule in both spellings":               {"rule \"/a\" {}\nrule \"spiffe://prod.example/a\" {}", `2:1: the rule at rules.hcl:1 has the same IDs`},
		"rules that overlap":                            {"rule \"/a/{x}\" {}\nrule \"/{y}/b\" {}", `2:1: some IDs are in this rule and in the one at rules.hcl:1, and neither has all of the other's: nobody could say which counts`},
		"rules that overlap below":                      {"rule \"/{x}/b/*\" {}\nrule \"/a/*\" {}", `2:1: some IDs are in this rule and in the one at rules.hcl:1, and neither has all of the other's: nobody could say which counts`},
		"a name that SPIRE sets":                        {`claim_name = "sub"`, `1:14: claim_name "sub" has a meaning of its own in a token; choose another`},
		"one in capitals":                               {`claim_name = "Act"`, `1:14: claim_name "Act" has a meaning of its own in a token; choose another`},
		"a top-level act":                               {`claim_name = "act"`, `1:14: claim_name "act" has a meaning of its own in a token; choose another`},
		"a name with a slash":                           {`claim_name = "https://x"`, `1:14: claim_name "https://x" is not a name of letters, digits, dots, hyphens and underscores`},
		"another word":                                  {`unmapped = "refuse"`, `1:12: "refuse" is neither omit nor deny`},
		"a relative file":                               {`rules_file = "x"`, `1:14: rules_file "x" is not an absolute path`},
		"a file that is not there":                      {`rules_file = "/nonexistent/x"`, `1:14: open /nonexistent/x: no such file or directory`},
		"a file that is a directory":                    {`rules_file = "/"`, `1:14: read /: not a regular file`},
		"a DNS name with a star":                        {"rule \"/a\" {\n  x509 { dns_names = [\"*.example\"] }\n}", `2:23: "*.example": not a DNS name in lower case`},
		"an open block":                                 {"rule \"/a\" {\n", `2:1: a block is not closed`},
		"an open string":                                {"rule \"/a\" {\n  owner = \"x\n}", `2:11: the string has no closing quote`},
		"an open comment":                               {"/* x", `1:1: the comment has no end`},
		"an open list":                                  {"rule \"/a\" {\n  scopes = [\"x\"", `2:16: a comma or ] belongs here, not the end of the text`},
		"a half-written key":                            {"rule \"/a\" {\n  own", `2:6: after own comes = and a value, or { and what is in the block, not the end of the text`},
		"two keys on a line":                            {`a = "b" c = "d"`, `1:9: the line should end here, not go on with 'c'`},
		"a brace too many":                              {"rule \"/a\" {}\n}", `2:1: a key or a block belongs here, not '}'`},
		"a heredoc":                                     {"claim_name = <<X\nx\nX\n", `1:14: a string stands in double quotes, on one line`},
		"lists without end":                             {"x = " + strings.Repeat("[", 100), `1:13: blocks and lists are more than 8 deep`},
		"not UTF-8":                                     {"a = \"b\"\nc = \"\xff\"", `2:6: this is not UTF-8`},
		"columns count characters":                      {`rule "/a" { owner = "ü${x}" }`, `1:23: a string has no variables: ${ may not be in it; a segment is {name}`},
	} {
		t.Run(name, func(t *testing.T) {
			r, err := Load(t.Context(), Source{Name: "rules.hcl", Text: tc.text}, domain)
			var problems Problems
			if r != nil || !errors.As(err, &problems) {
				t.Fatalf("got %v, %v, want Problems", r, err)
			}
			if got, want := problems[0].String(), "rules.hcl:"+tc.want; got != want {
				t.Errorf("got  %s\nwant %s", got, want)
			}
		})
	}
}

func TestAPartOfAFileHasThePlacesOfTheWhole(t *testing.T) {
	_, err := Load(t.Context(), Source{Name: "deputy.hcl", Text: " colour = \"x\"\n  shape = \"y\"\n", Line: 7, Column: 9}, domain)
	if got, want := fmt.Sprint(err), "deputy.hcl:7:10: unknown key \"colour\""; !strings.HasPrefix(got, want) {
		t.Errorf("got %s, want %s", got, want)
	}
	if got, want := fmt.Sprint(err), "deputy.hcl:8:3: unknown key \"shape\""; !strings.Contains(got, want) {
		t.Errorf("got %s, want %s in it", got, want)
	}
}

func TestEveryProblemIsReportedUpToALimit(t *testing.T) {
	_, err := Load(t.Context(), Source{Name: "x", Text: strings.Repeat("rule \"/a/..\" {}\n", 1000)}, domain)
	var problems Problems
	if !errors.As(err, &problems) || len(problems) != maxProblems || !strings.HasSuffix(err.Error(), "(and 950 more)") {
		t.Errorf("got %d problems: %v", len(problems), err)
	}
}

func TestErrorsOfOneID(t *testing.T) {
	r := load(t, `
rule "/agent/{team}/*" {
  chain = ["/agent/{team}/planner"]
}
rule "/x" {
  expires = "2026-11-23T12:00:00Z"
}`)
	long := "/agent/x/" + strings.Repeat("y", 2048)
	for name, bad := range map[string]spiffeid.ID{
		"one that would act for itself":   id("/agent/x/planner"),
		"one of another trust domain":     spiffeid.RequireFromString("spiffe://other.example/agent/x/y"),
		"one that is longer than allowed": id(long),
		"nobody":                          {},
	} {
		c, err := r.Claims(bad, noon)
		if c != nil || err == nil || errors.Is(err, ErrDenied) {
			t.Errorf("%s: got %v, %v, want an error that is no denial", name, c, err)
		}
	}
}

func TestUnmappedMayBeDenied(t *testing.T) {
	r := load(t, "unmapped = \"deny\"\nrule \"/a\" {}\nrule \"/old\" {\n expires = \"2026-01-01T00:00:00Z\"\n}\n")
	for path, denied := range map[string]bool{"/a": false, "/b": true, "/old": true} {
		if _, err := r.Claims(id(path), noon); errors.Is(err, ErrDenied) != denied {
			t.Errorf("%s: got %v, want denied: %t", path, err, denied)
		}
	}
}

func TestTheLongestID(t *testing.T) {
	r := load(t, "rule \"/a/*\" {\n owner = \"below\"\n}\nrule \"/a/{b}\" {\n purpose = \"{b}\"\n}")
	path := "/a/" + strings.Repeat("x", maxID-len("spiffe://prod.example/a/"))
	if c, err := r.Claims(id(path), noon); err != nil || c.Purpose != path[3:] {
		t.Errorf("got %v, %v", c, err)
	}
	deep := "/a" + strings.Repeat("/x", (maxID-len("spiffe://prod.example/a"))/2)
	if c, err := r.Claims(id(deep), noon); err != nil || c.Owner != "below" {
		t.Errorf("got %v, %v", c, err)
	}
}

// hundredThousand are rules of every kind, with long ones.
func hundredThousand(short bool) string {
	var b strings.Builder
	for i := range 100_000 {
		if short {
			fmt.Fprintf(&b, "rule \"/agent/team-%d/researcher\" {\n  owner = \"team-%[1]d\"\n}\n", i)
			continue
		}
		pattern := "/agent/team-%d/researcher"
		switch i % 4 {
		case 1:
			pattern = "/agent/team-%d/{role}"
		case 2:
			pattern = "/agent/team-%d/{role}/*"
		case 3:
			pattern = "/ns/{ns}/sa/agent-%d"
		}
		fmt.Fprintf(&b, "rule \""+pattern+"\" {\n  subject    = \"head@example.org\"\n  issuer     = \"https://idp.example.org\"\n  owner      = \"team\"\n"+
			"  scopes     = [\"crm:read\", \"web:search\"]\n  chain      = [\"/agent/planner\"]\n  max_depth  = 3\n  constraints { rate = \"120/60s\" }\n}\n", i)
	}
	return b.String()
}

func BenchmarkLoad(b *testing.B) {
	for name, short := range map[string]bool{"short": true, "long": false} {
		b.Run(name, func(b *testing.B) {
			text := hundredThousand(short)
			b.SetBytes(int64(len(text)))
			for b.Loop() {
				load(b, text)
			}
		})
	}
}

func BenchmarkClaims(b *testing.B) {
	r := load(b, hundredThousand(false))
	for name, path := range map[string]string{"fixed": "/agent/team-77772/researcher", "named": "/ns/x/sa/agent-99999", "below": "/agent/team-50002/x/y/z", "none": "/agent/team-x/y"} {
		b.Run(name, func(b *testing.B) {
			id := id(path)
			for b.Loop() {
				if _, err := r.Claims(id, noon); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
