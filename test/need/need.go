// Package need ends tests that cannot be run here: loudly, and as failures
// where CI is set, so that nothing goes untested unseen.
package need

import (
	"os"
	"os/exec"
	"testing"
)

// Root wants the test to run as root, for this reason.
func Root(tb testing.TB, reason string) {
	tb.Helper()
	if os.Geteuid() != 0 {
		lack(tb, "not root, which it takes for "+reason)
	}
}

// Program returns the path of the first of these that there is, by name or by
// path. test/prerequisites installs them on Debian.
func Program(tb testing.TB, names ...string) string {
	tb.Helper()
	for _, name := range names {
		if path, err := exec.LookPath(name); err == nil {
			return path
		}
	}
	lack(tb, names[0]+" is not here (test/prerequisites installs it on Debian)")
	return ""
}

func lack(tb testing.TB, what string) {
	tb.Helper()
	if os.Getenv("CI") != "" {
		tb.Fatal(what)
	}
	tb.Skip("SKIPPED: " + what)
}
