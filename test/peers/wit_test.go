package peers

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/sha256"
	"path/filepath"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/exp/svid/witsvid"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/deputy-id/deputy/test/scratch"
	"github.com/deputy-id/deputy/test/wait"
)

// withWITs is the page's configuration for WIT-SVIDs.
func withWITs(t *testing.T) string {
	t.Helper()
	blocks := meshBlocks(t, "WIT-SVIDs", "hcl")
	if len(blocks) != 1 {
		t.Fatalf("the page has %d configurations for WIT-SVIDs, want 1", len(blocks))
	}
	return blocks[0]
}

func (d *host) client(t *testing.T) *workloadapi.Client {
	t.Helper()
	c, err := workloadapi.New(t.Context(), workloadapi.WithAddr("unix://"+d.Workload))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

func (d *host) witSource(t *testing.T) *workloadapi.WITSource {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	s, err := workloadapi.NewWITSource(ctx, workloadapi.WithClientOptions(workloadapi.WithAddr("unix://"+d.Workload)))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

// proven reports whether a proof by the fetched private key is one by the key
// that a verifier found in the token.
func proven(t *testing.T, fetched, verified *witsvid.SVID) bool {
	t.Helper()
	digest := sha256.Sum256([]byte("a request"))
	proof, err := fetched.PrivateKey.(crypto.Signer).Sign(rand.Reader, digest[:], crypto.SHA256)
	if err != nil {
		t.Fatal(err)
	}
	return ecdsa.VerifyASN1(verified.PublicKey.(*ecdsa.PublicKey), digest[:], proof)
}

func TestGoSPIFFEFetchesWITSVIDs(t *testing.T) {
	d := start(t, "peers.example", withWITs(t)+own("one", "  hint = \"first\"\n")+own("two", ""))
	one, two := spiffeid.RequireFromString("spiffe://peers.example/agent/one"), spiffeid.RequireFromString("spiffe://peers.example/agent/two")
	c, source := d.client(t), d.witSource(t)

	all, err := c.FetchWITSVIDs(t.Context(), "")
	if err != nil || len(all) != 2 || all[0].ID != one || all[1].ID != two || all[0].Hint != "first" {
		t.Fatalf("got %+v, %v, want both", all, err)
	}
	for _, s := range all {
		got, err := witsvid.ParseAndValidate(s.Marshal(), source)
		if err != nil || got.ID != s.ID {
			t.Fatalf("got %+v, %v", got, err)
		}
		if life := time.Until(got.Expiry); life < 59*time.Minute || life > time.Hour {
			t.Errorf("lives for %v, want an hour", life)
		}
		if !proven(t, s, got) {
			t.Errorf("the key of %s is another than its token says", s.ID)
		}
	}
	if proven(t, all[0], all[1]) {
		t.Error("two IDs have one key")
	}
	// The source's is the same one: a process has one key for an ID.
	if s, err := source.GetWITSVIDForID(two); err != nil || s.Marshal() != all[1].Marshal() {
		t.Errorf("got %v, %v", s, err)
	}
	if s, err := c.FetchWITSVID(t.Context(), two.String()); err != nil || s.ID != two {
		t.Errorf("got %v, %v, want the one that was named", s, err)
	}
	if _, err := c.FetchWITSVID(t.Context(), "spiffe://peers.example/agent/three"); status.Code(err) != codes.PermissionDenied {
		t.Errorf("an ID that is not held: got %v", err)
	}

	// It is no JWT-SVID, and the bundles for those do not know its key.
	jwts, err := c.FetchJWTBundles(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := jwtsvid.ParseAndValidate(all[0].Marshal(), jwts, []string{"a"}); err == nil {
		t.Error("a WIT-SVID passes for a JWT-SVID")
	}
	ours, ok := jwts.Get(one.TrustDomain())
	theirs, err := source.GetWITBundleForTrustDomain(one.TrustDomain())
	if err != nil || !ok {
		t.Fatal(err)
	}
	for kid := range theirs.WITAuthorities() {
		if ours.HasJWTAuthority(kid) {
			t.Errorf("key %s is for both", kid)
		}
	}
}

func TestGoSPIFFEIsToldThatThereAreNoWITs(t *testing.T) {
	d := start(t, "peers.example", own("one", ""))
	c := d.client(t)
	if _, err := c.FetchWITSVID(t.Context(), ""); status.Code(err) != codes.Unimplemented {
		t.Errorf("got %v", err)
	}
	if _, err := c.FetchWITBundles(t.Context()); status.Code(err) != codes.Unimplemented {
		t.Errorf("got %v", err)
	}
}

// SVIDs, and then the key that signs them, change under an open source.
func TestGoSPIFFEFollowsWITs(t *testing.T) {
	d := start(t, "peers.example", withWITs(t)+"\nauthority \"local\" { ca_ttl = \"30s\" }\n"+own("brief", "  x509_ttl = \"5s\"\n"))
	id := spiffeid.RequireFromString("spiffe://peers.example/agent/brief")
	source := d.witSource(t)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	tokens, signers := map[string]bool{}, map[string]bool{}
	for len(signers) < 2 {
		s, err := source.GetWITSVIDForID(id)
		if err != nil {
			t.Fatal(err)
		}
		got, err := witsvid.ParseAndValidate(s.Marshal(), source)
		if err != nil {
			t.Fatalf("after %d SVIDs by %d keys: %v", len(tokens), len(signers), err)
		}
		if !proven(t, s, got) {
			t.Fatal("the key is another than its token says")
		}
		tokens[s.Marshal()], signers[s.KeyID] = true, true
		if len(signers) == 2 {
			break
		}
		if err := source.WaitUntilUpdated(ctx); err != nil {
			t.Fatalf("got %d SVIDs by %d keys: %v", len(tokens), len(signers), err)
		}
	}
	if len(tokens) < 5 {
		t.Errorf("got %d SVIDs in a key's life, want one each 2.5 s", len(tokens))
	}
}

// The keys go from one trust domain to the other with its bundle.
func TestGoSPIFFEValidatesWITsAcrossTrustDomains(t *testing.T) {
	here := start(t, "peers.example", withWITs(t)+own("here", "  federates_with = [\"other.example\"]\n"))
	there := start(t, "other.example", withWITs(t)+own("there", ""))
	file := scratch.Write(t, filepath.Join(t.TempDir(), "bundle.json"), there.Run(t, "bundle", "show", "--format", "spiffe"))
	theirs, err := there.client(t).FetchWITSVID(t.Context(), "")
	if err != nil {
		t.Fatal(err)
	}
	source := here.witSource(t)
	if _, err := witsvid.ParseAndValidate(theirs.Marshal(), source); err == nil {
		t.Error("a stranger's WIT-SVID is valid")
	}
	here.Run(t, "bundle", "set", "other.example", "--path", file)
	wait.Until(t, "the other's bundle", func() bool {
		_, err := source.GetWITBundleForTrustDomain(theirs.ID.TrustDomain())
		return err == nil
	})
	got, err := witsvid.ParseAndValidate(theirs.Marshal(), source)
	if err != nil || got.ID != theirs.ID || !proven(t, theirs, got) {
		t.Errorf("got %v, %v, want %s", got, err, theirs.ID)
	}
}
