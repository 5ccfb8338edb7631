package svid_test

import (
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/deputy-id/deputy/svid"
)

// A time without its monotonic reading is compared by the wall clock alone, so
// it stands for a clock that was set.
func TestWhatIsKeptIsJudgedByBothClocks(t *testing.T) {
	a := newAuthority(t, svid.ECP256)
	issued := time.Now()
	chain, err := a.issuer.X509(spiffeid.RequireFromPath(td, "/x"), mustKey(t, svid.ECP256).Public(), nil, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	wall := issued.Round(0)
	for name, tt := range map[string]struct {
		now          time.Time
		due, expired bool
	}{
		"at issue":                         {issued, false, false},
		"before half, both clocks":         {issued.Add(29 * time.Minute), false, false},
		"after half, both clocks":          {issued.Add(31 * time.Minute), true, false},
		"after its life, both clocks":      {issued.Add(61 * time.Minute), true, true},
		"wall clock set ahead":             {wall.Add(31 * time.Minute), true, false},
		"wall clock set far ahead":         {wall.Add(61 * time.Minute), true, true},
		"wall clock set back a little":     {wall.Add(-20 * time.Second), false, false},
		"wall clock set back before issue": {wall.Add(-2 * time.Minute), true, false},
	} {
		t.Run(name, func(t *testing.T) {
			if due, expired := svid.LeafDue(chain[0], issued, tt.now), svid.LeafExpired(chain[0], issued, tt.now); due != tt.due || expired != tt.expired {
				t.Errorf("got due %v, expired %v, want %v, %v", due, expired, tt.due, tt.expired)
			}
		})
	}
	for name, tt := range map[string]struct {
		now   time.Time
		fresh bool
	}{
		"at issue":                     {issued, true},
		"after half":                   {issued.Add(151 * time.Second), false},
		"wall clock set ahead":         {wall.Add(151 * time.Second), false},
		"wall clock set back a little": {wall.Add(-5 * time.Second), true},
		"wall clock set back":          {wall.Add(-time.Minute), false},
	} {
		t.Run("token "+name, func(t *testing.T) {
			if got := svid.TokenFresh(issued, tt.now); got != tt.fresh {
				t.Errorf("got fresh %v, want %v", got, tt.fresh)
			}
		})
	}
}
