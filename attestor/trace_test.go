package attestor

import (
	"runtime"
	"strconv"
	"syscall"
	"testing"
)

// traceFor traces one thread while f runs.
func traceFor(t *testing.T, tid int, f func()) {
	t.Helper()
	runtime.LockOSThread() // a tracer is a thread
	defer runtime.UnlockOSThread()
	if err := syscall.PtraceAttach(tid); err != nil {
		t.Fatal(err)
	}
	var status syscall.WaitStatus
	if _, err := syscall.Wait4(tid, &status, syscall.WALL, nil); err != nil {
		t.Fatal(err)
	}
	defer syscall.PtraceDetach(tid)
	f()
}

func itoa(n int) string { return strconv.Itoa(n) }

func atoi(t *testing.T, s string) int {
	t.Helper()
	n, err := strconv.Atoi(s)
	if err != nil {
		t.Fatal(err)
	}
	return n
}
