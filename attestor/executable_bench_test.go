package attestor

import (
	"context"
	"os"
	"testing"

	"github.com/deputy-id/deputy/attestor/peer"
)

// BenchmarkAttest is the gathering of what is already known: nothing is read
// or confirmed again.
func BenchmarkAttest(b *testing.B) {
	table, _, err := peer.NewTable()
	if err != nil {
		b.Fatal(err)
	}
	defer table.Close()
	host, err := OpenHost()
	if err != nil {
		b.Fatal(err)
	}
	p, err := table.Open(int32(os.Getpid()))
	if err != nil {
		b.Fatal(err)
	}
	defer p.Close()
	executables := NewExecutables(host, 0)
	for name, a := range map[string]Attestor{
		"unix":    NewUnix(host, executables, nil),
		"process": NewProcess(table, host, executables, nil),
	} {
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if _, err := a.Attest(context.Background(), p); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
