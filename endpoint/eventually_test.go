package endpoint

import (
	"testing"
	"time"

	"google.golang.org/protobuf/proto"
)

func unmarshal(b encoded, m proto.Message) error { return proto.Unmarshal(b, m) }

// eventually waits for what another goroutine or process does.
func eventually(t testing.TB, what string, holds func() bool) {
	t.Helper()
	within(t, 5*time.Second, what, holds)
}

func within(t testing.TB, d time.Duration, what string, holds func() bool) {
	t.Helper()
	for end := time.Now().Add(d); !holds(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("waited in vain: %s", what)
		}
	}
}
