package local

import (
	"bytes"
	"crypto"
	"crypto/x509"
	"encoding/json"
	"errors"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/deputy-id/deputy/svid"
	"github.com/deputy-id/deputy/svid/registry"
	"github.com/deputy-id/deputy/test/bubble"
)

// bind returns a WIT-SVID of the authority for a key of its own.
func bind(t *testing.T, a *Authority, ttl time.Duration) svid.Token {
	t.Helper()
	key, err := svid.ECP256.Generate()
	if err != nil {
		t.Fatal(err)
	}
	tok, err := a.WIT(t.Context(), registry.Entry{SPIFFEID: spiffeid.RequireFromPath(td, "/agent/x"), X509TTL: ttl}, key.Public())
	if err != nil {
		t.Fatal(err)
	}
	return tok
}

// valid reports whether the authority's bundle of now verifies it.
func valid(a *Authority, tok svid.Token) bool {
	_, err := svid.ValidateWIT(tok.Compact, &svid.Bundles{Own: bundleOf(a)})
	return err == nil
}

func stateOf(t *testing.T, dir string) map[string]json.RawMessage {
	t.Helper()
	data, err := os.ReadFile(filepath.Join(dir, stateFile))
	if err != nil {
		t.Fatal(err)
	}
	var state map[string]json.RawMessage
	if err := json.Unmarshal(data, &state); err != nil {
		t.Fatal(err)
	}
	return state
}

func TestNoWITKeysUnlessTheyAreWanted(t *testing.T) {
	dir := t.TempDir()
	a := open(t, Options{DataDir: dir})
	if _, err := a.WIT(t.Context(), registry.Entry{SPIFFEID: spiffeid.RequireFromPath(td, "/x")}, nil); !errors.Is(err, svid.ErrNotReady) {
		t.Errorf("got %v, want ErrNotReady", err)
	}
	if n := len(bundleOf(a).WITAuthorities); n != 0 {
		t.Errorf("got %d WIT keys in the bundle", n)
	}
	// A daemon that knows of none reads the file, too.
	if got := slices.Sorted(maps.Keys(stateOf(t, dir))); !slices.Equal(got, []string{"format", "jwt", "sequence", "trust_domain", "x509"}) {
		t.Errorf("the file has %q", got)
	}
}

func TestWITKeysComeAndGoWithTheirSwitch(t *testing.T) {
	bubble.Test(t, func(t *testing.T) {
		dir := t.TempDir()
		a := open(t, Options{DataDir: dir})
		before := bundleOf(a)
		a.Close()

		// Switched on: the file of before opens, and the other keys stay.
		b := open(t, Options{DataDir: dir, WIT: true})
		on := bundleOf(b)
		if !slices.EqualFunc(on.X509Authorities, before.X509Authorities, (*x509.Certificate).Equal) || !maps.EqualFunc(on.JWTAuthorities, before.JWTAuthorities, same) ||
			len(on.WITAuthorities) != 1 || on.Sequence <= before.Sequence {
			t.Errorf("got %d and %d keys, %d WIT keys, sequence %d after %d", len(on.X509Authorities), len(on.JWTAuthorities), len(on.WITAuthorities), on.Sequence, before.Sequence)
		}
		tok := bind(t, b, 0)
		if !valid(b, tok) {
			t.Error("the bundle does not verify what was signed")
		}
		b.Close()
		c := open(t, Options{DataDir: dir, WIT: true})
		if !bundleOf(c).Equal(on) || !valid(c, bind(t, c, 0)) {
			t.Error("bundle differs after a restart")
		}
		time.Sleep(13 * time.Hour) // past the half, so that a next key is prepared
		if err := c.rotate(time.Now()); err != nil {
			t.Fatal(err)
		}
		if n := len(bundleOf(c).WITAuthorities); n != 2 {
			t.Fatalf("got %d WIT keys, want the next one published", n)
		}
		tok = bind(t, c, 4*time.Hour)
		c.Close()

		// Switched off: what was signed stays verifiable, and nobody signs.
		d := open(t, Options{DataDir: dir})
		if got := bundleOf(d).WITAuthorities; len(got) != 1 || !valid(d, tok) {
			t.Errorf("got %d WIT keys, want the one that signed", len(got))
		}
		if _, err := d.WIT(t.Context(), registry.Entry{SPIFFEID: spiffeid.RequireFromPath(td, "/x")}, mustPublic(t)); !errors.Is(err, svid.ErrNotReady) {
			t.Errorf("got %v, want ErrNotReady", err)
		}
		verify(t, d, bundleOf(d))
		if wit := stateOf(t, dir)["wit"]; bytes.Contains(wit, []byte(`"key"`)) || !bytes.Contains(wit, []byte(`"public"`)) {
			t.Errorf("the file still has a private WIT key, or no public one")
		}
		d.Close()

		// On again: a new key beside the old one.
		e := open(t, Options{DataDir: dir, WIT: true})
		if got := bundleOf(e).WITAuthorities; len(got) != 2 || !valid(e, tok) || !valid(e, bind(t, e, 0)) {
			t.Errorf("got %d WIT keys, want the old and a new one", len(got))
		}
		e.Close()

		// Off until all has ended: the file names none.
		f := open(t, Options{DataDir: dir})
		time.Sleep(25 * time.Hour)
		for range 2 { // by both clocks
			if err := f.rotate(time.Now()); err != nil {
				t.Fatal(err)
			}
			time.Sleep(5 * time.Hour)
		}
		if _, ok := stateOf(t, dir)["wit"]; ok || len(bundleOf(f).WITAuthorities) != 0 {
			t.Errorf("got %d WIT keys after all ended, in the file %v", len(bundleOf(f).WITAuthorities), ok)
		}
	})
}

func same(a, b crypto.PublicKey) bool { return equalPublic(a, b) }

func mustPublic(t *testing.T) crypto.PublicKey {
	t.Helper()
	key, err := svid.ECP256.Generate()
	if err != nil {
		t.Fatal(err)
	}
	return key.Public()
}

func TestWITsLiveAsLongAsX509SVIDs(t *testing.T) {
	bubble.Test(t, func(t *testing.T) {
		a := open(t, Options{CATTL: 12 * time.Hour, WIT: true})
		for ttl, want := range map[time.Duration]time.Duration{0: time.Hour, time.Minute: time.Minute, time.Second: minTTL, 24 * time.Hour: 2 * time.Hour} {
			if got := time.Until(bind(t, a, ttl).Expires); got != want {
				t.Errorf("TTL %v: got %v, want %v", ttl, got, want)
			}
		}
		short := open(t, Options{CATTL: time.Hour, WIT: true})
		if got := time.Until(bind(t, short, 0).Expires); got != 10*time.Minute {
			t.Errorf("under a CA of an hour: got %v, want 10m", got)
		}
	})
}

func TestKeyIDsAreUniqueInTheBundle(t *testing.T) {
	bubble.Test(t, func(t *testing.T) {
		a := open(t, Options{CATTL: time.Hour, WIT: true})
		for range 50 {
			time.Sleep(10 * time.Minute)
			if err := a.rotate(time.Now()); err != nil {
				t.Fatal(err)
			}
			b := bundleOf(a)
			for id, key := range b.WITAuthorities {
				if id == "" || b.JWTAuthorities[id] != nil {
					t.Fatalf("key ID %q is a JWT key's as well", id)
				}
				for _, jwt := range b.JWTAuthorities {
					if equalPublic(key, jwt) {
						t.Fatal("one key signs both")
					}
				}
			}
			if len(b.WITAuthorities) == 0 || len(b.WITAuthorities) > 3 {
				t.Fatalf("got %d WIT keys", len(b.WITAuthorities))
			}
		}
	})
}

func TestDamagedWITKeysAreRefused(t *testing.T) {
	a := open(t, Options{WIT: true})
	data, err := a.state.encode(td)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := decodeState(data, td); err != nil {
		t.Fatal(err)
	}
	var whole map[string]any
	if err := json.Unmarshal(data, &whole); err != nil {
		t.Fatal(err)
	}
	active := whole["wit"].(map[string]any)["active"]
	jwt := whole["jwt"].(map[string]any)["active"].(map[string]any)
	for name, wit := range map[string]any{
		"prepared without active": map[string]any{"active": nil, "prepared": active},
		"active without key":      map[string]any{"active": map[string]any{"public": jwt["public"], "created": jwt["created"], "expires": jwt["expires"]}},
		"keys of two pairs":       map[string]any{"active": map[string]any{"key": active.(map[string]any)["key"], "public": jwt["public"], "created": jwt["created"], "expires": jwt["expires"]}},
		"unknown member":          map[string]any{"active": active, "x": 1},
	} {
		whole["wit"] = wit
		bad, err := json.Marshal(whole)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := decodeState(bad, td); err == nil || !strings.Contains(err.Error(), "damaged") {
			t.Errorf("%s: got %v, want an error", name, err)
		}
	}
}
