package local

import (
	"crypto"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/deputy-id/deputy/svid"
	"github.com/deputy-id/deputy/test/bubble"
)

// pki is a root with an intermediate below it, and their files.
type pki struct {
	dir               string
	root, inter       *x509.Certificate
	rootKey, interKey crypto.Signer
	files             Upstream
}

func newPKI(t *testing.T, change func(*x509.Certificate)) *pki {
	t.Helper()
	p := &pki{dir: t.TempDir()}
	p.files = Upstream{
		Cert:   filepath.Join(p.dir, "cert.pem"),
		Key:    filepath.Join(p.dir, "key.pem"),
		Bundle: filepath.Join(p.dir, "bundle.pem"),
	}
	p.rootKey, p.root = certificate(t, nil, nil, func(c *x509.Certificate) { c.Subject.CommonName = "root" })
	p.write(t, p.files.Bundle, "CERTIFICATE", p.root.Raw)
	p.renew(t, change)
	return p
}

// renew writes a new intermediate.
func (p *pki) renew(t *testing.T, change func(*x509.Certificate)) {
	t.Helper()
	p.interKey, p.inter = certificate(t, p.root, p.rootKey, change)
	der, err := x509.MarshalPKCS8PrivateKey(p.interKey)
	if err != nil {
		t.Fatal(err)
	}
	p.write(t, p.files.Key, "PRIVATE KEY", der)
	p.write(t, p.files.Cert, "CERTIFICATE", p.inter.Raw)
}

func (p *pki) write(t *testing.T, path, kind string, der []byte) {
	t.Helper()
	if err := os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600); err != nil {
		t.Fatal(err)
	}
}

func certificate(t *testing.T, parent *x509.Certificate, signer crypto.Signer, change func(*x509.Certificate)) (crypto.Signer, *x509.Certificate) {
	t.Helper()
	key, err := svid.ECP256.Generate()
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		Subject:               pkix.Name{CommonName: "intermediate"},
		NotBefore:             time.Now().Add(-2 * time.Hour),
		NotAfter:              time.Now().Add(30 * 24 * time.Hour),
		IsCA:                  true,
		BasicConstraintsValid: true,
		KeyUsage:              x509.KeyUsageCertSign,
	}
	if change != nil {
		change(template)
	}
	if parent == nil {
		parent, signer = template, key
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, key.Public(), signer)
	if err != nil {
		t.Fatal(err)
	}
	c, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return key, c
}

func TestUpstreamSignsTheCA(t *testing.T) {
	bubble.Test(t, func(t *testing.T) {
		p := newPKI(t, func(c *x509.Certificate) { c.PermittedURIDomains = []string{"example.org"} })
		a := open(t, Options{DataDir: t.TempDir(), Upstream: p.files})
		verify(t, a, bundleOf(a))
		if got := bundleOf(a).X509Authorities; len(got) != 1 || !got[0].Equal(p.root) {
			t.Errorf("got %d authorities, want the root alone", len(got))
		}
		if chain := a.state.X509.Active.chain; len(chain) != 2 || !chain[1].Equal(p.inter) {
			t.Errorf("got a chain of %d above the leaf, want our CA and the intermediate", len(chain))
		}
		// The files are read again when the next key is prepared.
		p.renew(t, nil)
		sequence := bundleOf(a).Sequence
		time.Sleep(12 * time.Hour)
		if err := a.rotate(time.Now()); err != nil {
			t.Fatal(err)
		}
		if chain := a.state.X509.Prepared.chain; !chain[1].Equal(p.inter) {
			t.Error("the next CA does not hang under the new intermediate")
		}
		if got := bundleOf(a); len(got.X509Authorities) != 1 || len(got.JWTAuthorities) != 2 || got.Sequence != sequence+1 {
			t.Errorf("got %d authorities, %d JWT keys, sequence %d", len(got.X509Authorities), len(got.JWTAuthorities), got.Sequence)
		}
	})
}

// An upstream that is configured later, or no more, is followed by the next CA,
// which is made at once and published for as long as ever before it signs.
func TestUpstreamThatIsConfiguredLaterIsFollowed(t *testing.T) {
	bubble.Test(t, func(t *testing.T) {
		p := newPKI(t, nil)
		dir := t.TempDir()
		a := open(t, Options{DataDir: dir})
		before := bundleOf(a)
		for _, o := range []Options{{DataDir: dir, Upstream: p.files}, {DataDir: dir}} {
			time.Sleep(time.Minute)
			a.Close()
			a = open(t, o)
			if a.fits(a.state.X509.Active) || a.state.X509.Prepared == nil || !a.fits(a.state.X509.Prepared) {
				t.Fatalf("the next CA does not follow the configuration: %v", a.failure)
			}
			verify(t, a, before)
			published := bundleOf(a)
			time.Sleep(8 * time.Hour)
			if err := a.rotate(time.Now()); err != nil {
				t.Fatal(err)
			}
			if !a.fits(a.state.X509.Active) {
				t.Error("a third of a CA's life later the old one signs")
			}
			verify(t, a, published)
			before = bundleOf(a)
		}
		// Back before it signs: the one of before stays.
		time.Sleep(time.Minute)
		a.Close()
		a = open(t, Options{DataDir: dir, Upstream: p.files})
		was := a.state.X509
		a.Close()
		a = open(t, Options{DataDir: dir})
		if a.state.X509.Active.ID != was.Active.ID || a.state.X509.Prepared != nil {
			t.Error("got another CA although the configuration is as it was")
		}
	})
}

func TestUpstreamThatEndsEndsTheCA(t *testing.T) {
	bubble.Test(t, func(t *testing.T) {
		p := newPKI(t, func(c *x509.Certificate) { c.NotAfter = time.Now().Add(10 * time.Hour) })
		a := open(t, Options{Upstream: p.files})
		if got := a.state.X509.Active.Expires; !got.Equal(p.inter.NotAfter) {
			t.Errorf("got a CA until %v, want %v", got, p.inter.NotAfter)
		}
		before := a.state.X509.Active
		time.Sleep(6 * time.Hour)
		if err := a.rotate(time.Now()); err == nil || !strings.Contains(err.Error(), "no later") {
			t.Errorf("got %v, want that a new CA would end no later", err)
		}
		if a.state.X509.Active != before || a.state.X509.Prepared != nil {
			t.Error("the CA changed, though none could live longer")
		}
		verify(t, a, bundleOf(a))
		p.renew(t, nil)
		if err := a.rotate(time.Now()); err != nil || a.state.X509.Prepared == nil {
			t.Errorf("got %v after the intermediate was renewed, want the next CA", err)
		}
	})
}

func TestUpstreamThatCannotServeIsRefused(t *testing.T) {
	for name, tt := range map[string]struct {
		change func(*x509.Certificate)
		spoil  func(*testing.T, *pki)
		want   string
	}{
		"no CA":              {change: func(c *x509.Certificate) { c.IsCA = false }, want: "not a CA"},
		"may not sign":       {change: func(c *x509.Certificate) { c.KeyUsage = x509.KeyUsageCRLSign }, want: "keyCertSign"},
		"path length 0":      {change: func(c *x509.Certificate) { c.MaxPathLenZero = true }, want: "path length"},
		"expired":            {change: func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Hour) }, want: "expired"},
		"other trust domain": {change: func(c *x509.Certificate) { c.URIs = []*url.URL{{Scheme: "spiffe", Host: "other.example"}} }, want: "SPIFFE ID"},
		"name constraints":   {change: func(c *x509.Certificate) { c.PermittedURIDomains = []string{"other.example"} }, want: "does not verify"},
		"another key": {spoil: func(t *testing.T, p *pki) {
			key, _ := svid.ECP256.Generate()
			der, err := x509.MarshalPKCS8PrivateKey(key)
			if err != nil {
				t.Fatal(err)
			}
			p.write(t, p.files.Key, "PRIVATE KEY", der)
		}, want: "does not belong to the key"},
		"another root": {spoil: func(t *testing.T, p *pki) {
			_, root := certificate(t, nil, nil, nil)
			p.write(t, p.files.Bundle, "CERTIFICATE", root.Raw)
		}, want: "does not verify"},
		"key is no key":       {spoil: func(t *testing.T, p *pki) { p.write(t, p.files.Key, "CERTIFICATE", p.root.Raw) }, want: "want a private key"},
		"certificate missing": {spoil: func(t *testing.T, p *pki) { os.Remove(p.files.Cert) }, want: "no such file"},
		"bundle is not PEM":   {spoil: func(t *testing.T, p *pki) { os.WriteFile(p.files.Bundle, []byte("x"), 0o600) }, want: "not PEM"},
	} {
		t.Run(name, func(t *testing.T) {
			p := newPKI(t, tt.change)
			if tt.spoil != nil {
				tt.spoil(t, p)
			}
			_, err := Open(t.Context(), Options{TrustDomain: td, Upstream: p.files})
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("got %v, want %q", err, tt.want)
			}
		})
	}
}

func FuzzUpstreamFiles(f *testing.F) {
	f.Add([]byte("-----BEGIN EC PRIVATE KEY-----\nAA==\n-----END EC PRIVATE KEY-----\n"))
	f.Add([]byte("-----BEGIN CERTIFICATE-----\nAA==\n-----END CERTIFICATE-----\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		if certs, err := parsePEM(data); err == nil && len(certs) == 0 {
			t.Error("got no certificates and no error")
		}
		if key, err := parseKey(data); err == nil && key == nil {
			t.Error("got no key and no error")
		}
	})
}
