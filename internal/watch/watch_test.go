package watch

import "testing"

func TestStoreWakesReadersOfTheValueBefore(t *testing.T) {
	w := New(1)
	v, stale := w.Load()
	if v != 1 {
		t.Fatalf("got %d, want 1", v)
	}
	select {
	case <-stale:
		t.Fatal("the newest value is stale")
	default:
	}
	w.Store(2)
	<-stale
	v, stale = w.Load()
	if v != 2 {
		t.Fatalf("got %d, want 2", v)
	}
	select {
	case <-stale:
		t.Fatal("the newest value is stale")
	default:
	}
}
