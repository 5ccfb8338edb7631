package engine

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/deputy-id/deputy/test/wait"
)

// Freeze stops the daemon, and returns what continues it when none of its
// threads runs any more: the signal reaches them one after another, and one may
// answer meanwhile.
func (e *Engine) Freeze(tb testing.TB) (resume func()) {
	tb.Helper()
	pid := e.daemon.cmd.Process.Pid
	if err := syscall.Kill(pid, syscall.SIGSTOP); err != nil {
		tb.Fatal(err)
	}
	resume = sync.OnceFunc(func() { syscall.Kill(pid, syscall.SIGCONT) })
	tb.Cleanup(resume)
	wait.UntilNil(tb, func() error { return frozen(pid) })
	return resume
}

func frozen(pid int) error {
	threads, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/stat", pid))
	if err != nil || len(threads) == 0 {
		return fmt.Errorf("process %d has %d threads, %v", pid, len(threads), err)
	}
	for _, thread := range threads {
		stat, err := os.ReadFile(thread)
		if err != nil {
			return err
		}
		if _, state, ok := strings.Cut(string(stat), ") "); !ok || state[0] != 'T' {
			return fmt.Errorf("a thread runs still: %s", stat)
		}
	}
	return nil
}
