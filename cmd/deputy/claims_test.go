package main

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

func TestTheSamplesAreInOrder(t *testing.T) {
	files, err := filepath.Glob("../../conf/samples/*.hcl")
	if err != nil || len(files) == 0 {
		t.Fatalf("got %d files, %v", len(files), err)
	}
	for _, file := range files {
		s, err := load(file)
		if err != nil {
			t.Errorf("%s: %v", file, err)
		} else if filepath.Base(file) == "claims.hcl" && s.claims.Len() == 0 {
			t.Errorf("%s: got no rules", file)
		}
	}
}

func TestProblemsOfClaimsHaveTheirPlaceInTheFile(t *testing.T) {
	dir := t.TempDir()
	file, rules := filepath.Join(dir, "deputy.hcl"), filepath.Join(dir, "rules.hcl")
	text := fmt.Sprintf("trust_domain = \"example.org\"\ndata_dir = %q\nclaims { rules_file = %q }\nentry \"/x\" {}\n", dir, rules)
	for path, content := range map[string]string{file: text, rules: "\nrule \"/a\" { owner = 1 }\nrule \"spiffe://other.org/b\" {}\n"} {
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	_, err := load(file)
	want := file + ":4:1: the entry has no selectors, which say whom it is for\n" +
		rules + ":2:21: this is a number; a string in double quotes belongs here\n" +
		rules + ":3:6: the pattern is of the trust domain other.org, and this is example.org"
	if got := fmt.Sprint(err); got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
}

func TestWithoutABlockThereAreNoClaims(t *testing.T) {
	t.Setenv("HOME", t.TempDir())
	s, err := load("")
	if err != nil {
		t.Fatal(err)
	}
	c, err := s.claims.Claims(spiffeid.RequireFromString("spiffe://example.org/a"), time.Now())
	if c != nil || err != nil {
		t.Errorf("got %v, %v, want nothing", c, err)
	}
}
