package bubble

import (
	"sync"
	"testing"
	"time"
)

// Timers of one bubble that are due at the same moments. Under the race
// detector and on two processors, this ends the process in every second run.
func TestTimersTakeTurns(t *testing.T) {
	for range 200 {
		Test(t, func(t *testing.T) {
			var wg sync.WaitGroup
			for range 20 {
				wg.Go(func() {
					tick := time.NewTicker(time.Millisecond)
					defer tick.Stop()
					for range 200 {
						select {
						case <-tick.C:
						case <-time.After(time.Millisecond):
						}
					}
				})
			}
			wg.Wait()
		})
	}
}
