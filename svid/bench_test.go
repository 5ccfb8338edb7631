package svid_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/sha256"
	"fmt"
	"runtime"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/deputy-id/deputy/svid"
	"github.com/deputy-id/deputy/svid/registry"
)

func BenchmarkKeeperX509Warm(b *testing.B) {
	k := svid.NewKeeper(newAuthority(b, svid.ECP256), svid.KeeperOptions{})
	h, end := holder(1)
	defer end()
	entries := []registry.Entry{entry("a"), entry("b")}
	b.ReportAllocs()
	for b.Loop() {
		if _, err := k.X509(context.Background(), h, entries); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkKeeperX509New(b *testing.B) {
	k := svid.NewKeeper(newAuthority(b, svid.ECP256), svid.KeeperOptions{})
	entries := []registry.Entry{entry("a")}
	var id uint64
	for b.Loop() {
		id++
		h, end := holder(id)
		if _, err := k.X509(context.Background(), h, entries); err != nil {
			b.Fatal(err)
		}
		end()
	}
}

// The memory that a holder costs, without its connection.
func BenchmarkKeeperHolders(b *testing.B) {
	const n = 2000
	var before, after runtime.MemStats
	for b.Loop() {
		k := svid.NewKeeper(newAuthority(b, svid.ECP256), svid.KeeperOptions{})
		gone := make(chan struct{})
		runtime.GC() // twice: what the last round left is swept by the second
		runtime.GC()
		runtime.ReadMemStats(&before)
		for id := range uint64(n) {
			if _, err := k.X509(context.Background(), svid.Holder{ID: id, Gone: gone}, []registry.Entry{entry("a")}); err != nil {
				b.Fatal(err)
			}
		}
		runtime.GC()
		runtime.ReadMemStats(&after)
		b.ReportMetric(float64(int64(after.HeapInuse+after.StackInuse)-int64(before.HeapInuse+before.StackInuse))/n, "B/holder")
		close(gone)
		runtime.KeepAlive(k)
	}
}

func BenchmarkES256Sign(b *testing.B) {
	key := mustKey(b, svid.ECP256).(*ecdsa.PrivateKey)
	for b.Loop() {
		sum := sha256.Sum256(make([]byte, 200))
		if _, err := ecdsa.SignASN1(rand.Reader, key, sum[:]); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkIssuerJWT(b *testing.B) {
	a := newAuthority(b, svid.ECP256)
	id := spiffeid.RequireFromPath(td, "/agent/x")
	for b.Loop() {
		if _, err := a.issuer.JWT(id, []string{"https://api.example.org"}, 1e11); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkKeeperJWTNewAudience(b *testing.B) {
	k := svid.NewKeeper(newAuthority(b, svid.ECP256), svid.KeeperOptions{})
	h, end := holder(1)
	defer end()
	n := 0
	for b.Loop() {
		n++
		if _, err := k.JWT(context.Background(), h, entry("a"), []string{fmt.Sprint(n)}); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkES256Verify(b *testing.B) {
	key := mustKey(b, svid.ECP256).(*ecdsa.PrivateKey)
	sum := sha256.Sum256(make([]byte, 200))
	sig, err := ecdsa.SignASN1(rand.Reader, key, sum[:])
	if err != nil {
		b.Fatal(err)
	}
	for b.Loop() {
		if !ecdsa.VerifyASN1(&key.PublicKey, sum[:], sig) {
			b.Fatal("does not verify")
		}
	}
}

func BenchmarkValidate(b *testing.B) {
	a := newAuthority(b, svid.ECP256)
	tok, err := a.issuer.JWT(spiffeid.RequireFromPath(td, "/agent/x"), []string{"https://api.example.org"}, 1e12)
	if err != nil {
		b.Fatal(err)
	}
	bundles, _ := a.Bundles()
	for b.Loop() {
		if _, _, err := svid.Validate(tok.Compact, "https://api.example.org", bundles); err != nil {
			b.Fatal(err)
		}
	}
}
