// Package bubble runs tests on a clock of their own, by testing/synctest, with
// a way around a fault of Go's race detector (https://go.dev/issue/78156): the
// timers of a bubble share one race context, and where two processors run two
// of them at once, the detector breaks its own state and ends the test's
// process with SIGSEGV or "CHECK failed". On one processor they take turns.
package bubble

import (
	"runtime"
	"sync"
	"testing"
	"testing/synctest"
)

// running is held by the bubble that runs, since GOMAXPROCS is the process's.
var running sync.Mutex

// Test runs f in a bubble, on one processor.
func Test(t *testing.T, f func(*testing.T)) {
	running.Lock()
	defer running.Unlock()
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(1))
	synctest.Test(t, f)
}

// Wait waits until all other goroutines of the bubble are durably blocked.
func Wait() { synctest.Wait() }
