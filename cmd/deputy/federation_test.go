package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/deputy-id/deputy/svid"
	"github.com/deputy-id/deputy/svid/federation"
	"github.com/deputy-id/deputy/svid/local"
)

// The file that says whom to believe at first is believed itself only if
// nobody else could have written it.
func TestReadBootstrap(t *testing.T) {
	td := spiffeid.RequireTrustDomainFromString("theirs.example")
	own := spiffeid.RequireTrustDomainFromString("ours.example")
	bundle := func(td spiffeid.TrustDomain) (*svid.Bundle, string) {
		a, err := local.Open(t.Context(), local.Options{TrustDomain: td})
		if err != nil {
			t.Fatal(err)
		}
		defer a.Close()
		all, _ := a.Bundles()
		text, err := all.Own.Marshal()
		if err != nil {
			t.Fatal(err)
		}
		return all.Own, string(text)
	}
	theirs, good := bundle(td)
	_, ours := bundle(own)
	for _, c := range []struct {
		name    string
		content string
		mode    os.FileMode
		owner   int
		want    string // "": it is taken
	}{
		{"a bundle", good, 0o644, 0, ""},
		{"our own", ours, 0o644, 0, "bundle is our own: its X.509 authority names spiffe://ours.example"},
		{"writable by others", good, 0o646, 0, "may be written by others"},
		{"writable by the group", good, 0o664, 0, "may be written by others"},
		{"a stranger's", good, 0o644, 61002, "belongs to UID"},
		{"no authority", `{"keys":[]}`, 0o644, 0, "no X.509 authority"},
		{"PEM", "\n-----BEGIN CERTIFICATE-----", 0o644, 0, "is PEM, and a SPIFFE bundle is wanted, as deputy bundle show --format spiffe prints it"},
		{"nothing", "", 0o644, 0, "parse bundle"},
		{"too long", strings.Repeat(" ", maxBundle+1), 0o644, 0, "longer than"},
	} {
		t.Run(c.name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "bundle.json")
			if err := os.WriteFile(path, []byte(c.content), 0o600); err != nil {
				t.Fatal(err)
			}
			if err := os.Chmod(path, c.mode); err != nil {
				t.Fatal(err)
			}
			if c.owner != 0 {
				if os.Getuid() != 0 {
					if os.Getenv("CI") != "" {
						t.Fatal("files of other users take root to make")
					}
					t.Skip("SKIPPED: files of other users take root to make")
				}
				if err := os.Chown(path, c.owner, -1); err != nil {
					t.Fatal(err)
				}
			}
			b, err := readBootstrap(federation.Relationship{TrustDomain: td}, own, path)
			switch {
			case c.want == "" && (err != nil || !b.Equal(theirs)):
				t.Errorf("got %+v, %v, want the bundle", b, err)
			case c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)):
				t.Errorf("got %v, want an error with %q", err, c.want)
			}
		})
	}
	if _, err := readBootstrap(federation.Relationship{TrustDomain: td}, own, "/nonexistent"); err == nil {
		t.Error("got no error for a file that is not there")
	}
}
