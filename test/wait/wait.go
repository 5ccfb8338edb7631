// Package wait waits, in tests, for what another process does and what only
// looking at it shows.
package wait

import (
	"fmt"
	"testing"
	"time"
)

// Patience bounds every wait. A machine that is busy needs it, and a wait ends
// as soon as it can.
const Patience = 30 * time.Second

const pause = 30 * time.Millisecond

// Until waits for something, until it holds.
func Until(tb testing.TB, what string, holds func() bool) {
	tb.Helper()
	UntilNil(tb, func() error {
		if !holds() {
			return fmt.Errorf("no sign of: %s", what)
		}
		return nil
	})
}

// UntilNil waits until look returns nil. What it returns until then says what
// is not yet as it should be.
func UntilNil(tb testing.TB, look func() error) {
	tb.Helper()
	for end := time.Now().Add(Patience); ; time.Sleep(pause) {
		err := look()
		if err == nil {
			return
		}
		if time.Now().After(end) {
			tb.Fatalf("waited %s in vain: %v", Patience, err)
		}
	}
}
