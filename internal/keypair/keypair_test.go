package keypair

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/deputy-id/deputy/test/bubble"
)

// pair makes a self-signed pair in PEM.
func pair(t testing.TB, name string) (cert, key []byte) {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1),
		Subject:      pkix.Name{CommonName: name},
		DNSNames:     []string{name},
		NotAfter:     time.Date(2100, 1, 1, 0, 0, 0, 0, time.UTC),
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, k.Public(), k)
	if err != nil {
		t.Fatal(err)
	}
	pkcs8, err := x509.MarshalPKCS8PrivateKey(k)
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}),
		pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: pkcs8})
}

func write(t testing.TB, path string, data []byte) {
	t.Helper()
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}
}

func files(t testing.TB, name string) (cert, key string) {
	dir := t.TempDir()
	cert, key = filepath.Join(dir, "tls.crt"), filepath.Join(dir, "tls.key")
	c, k := pair(t, name)
	write(t, cert, c)
	write(t, key, k)
	return cert, key
}

func serves(t testing.TB, p *Pair) string {
	t.Helper()
	c, err := p.GetCertificate(&tls.ClientHelloInfo{})
	if err != nil {
		t.Fatal(err)
	}
	return c.Leaf.Subject.CommonName
}

func TestANewPairIsTakenAtAHandshake(t *testing.T) {
	bubble.Test(t, func(t *testing.T) {
		cert, key := files(t, "old")
		p, err := Open(cert, key)
		if err != nil {
			t.Fatal(err)
		}
		var reports []error
		p.Report = func(err error) { reports = append(reports, err) }
		c, k := pair(t, "new")

		// Between the two files the old pair goes on, and is reported once.
		write(t, cert, c)
		for range 3 {
			time.Sleep(every)
			if got := serves(t, p); got != "old" {
				t.Fatalf("got %s with half of a pair, want old", got)
			}
		}
		if len(reports) != 1 || reports[0] == nil || !strings.Contains(reports[0].Error(), cert) {
			t.Fatalf("got reports %v, want one that names %s", reports, cert)
		}
		write(t, key, k)
		if got := serves(t, p); got != "old" {
			t.Fatalf("got %s: looked again within a second", got)
		}
		time.Sleep(every)
		if got := serves(t, p); got != "new" {
			t.Fatalf("got %s, want new", got)
		}
		if len(reports) != 2 || reports[1] != nil {
			t.Fatalf("got reports %v, want one that the pair is in use", reports[1:])
		}
		if got := p.Certificate().Subject.CommonName; got != "new" {
			t.Errorf("got certificate %s, want new", got)
		}
	})
}

func TestTheLastGoodPairGoesOn(t *testing.T) {
	c, _ := pair(t, "other")
	for _, tt := range []struct {
		name   string
		damage func(t *testing.T, cert, key string)
	}{
		{"files gone", func(t *testing.T, cert, key string) { os.Remove(cert); os.Remove(key) }},
		{"empty certificate", func(t *testing.T, cert, _ string) { write(t, cert, nil) }},
		{"empty key", func(t *testing.T, _, key string) { write(t, key, nil) }},
		{"half a certificate", func(t *testing.T, cert, _ string) { write(t, cert, c[:len(c)/2]) }},
		{"another's key", func(t *testing.T, cert, _ string) { write(t, cert, c) }},
		{"a huge file", func(t *testing.T, cert, _ string) { write(t, cert, bytes.Repeat([]byte("x"), maxFile+1)) }},
		{"a directory", func(t *testing.T, cert, _ string) { os.Remove(cert); os.Mkdir(cert, 0o700) }},
	} {
		t.Run(tt.name, func(t *testing.T) {
			bubble.Test(t, func(t *testing.T) {
				cert, key := files(t, "good")
				p, err := Open(cert, key)
				if err != nil {
					t.Fatal(err)
				}
				var reports []error
				p.Report = func(err error) { reports = append(reports, err) }
				tt.damage(t, cert, key)
				for range 2 {
					time.Sleep(every)
					if got := serves(t, p); got != "good" {
						t.Fatalf("got %s, want good", got)
					}
				}
				if len(reports) != 1 || reports[0] == nil {
					t.Fatalf("got reports %v, want one error", reports)
				}
				if _, err := Open(cert, key); err == nil {
					t.Error("opened what is broken")
				}
			})
		})
	}
}

func TestErrorsQuoteNoKey(t *testing.T) {
	cert, key := files(t, "one")
	_, k := pair(t, "two")
	write(t, key, k)
	_, err := Open(cert, key)
	if err == nil {
		t.Fatal("opened a certificate with another's key")
	}
	body := strings.Split(string(k), "\n")[1]
	if strings.Contains(err.Error(), body) {
		t.Errorf("the error quotes the key: %v", err)
	}
}
