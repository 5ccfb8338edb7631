package conf

import (
	"bytes"
	"errors"
	"flag"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/hashicorp/go-hclog"
)

var update = flag.Bool("update", false, "write the messages that are got to testdata/*.want")

func base(t testing.TB) *Config {
	t.Helper()
	c, err := Default(true, func(string) string { return "" })
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func write(t testing.TB, text string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "deputy.hcl")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// Each broken file has the messages that it must give beside it.
func TestEveryProblemIsReportedWithItsPlace(t *testing.T) {
	files, err := filepath.Glob("testdata/*.hcl")
	if err != nil || len(files) == 0 {
		t.Fatalf("got %d files, %v", len(files), err)
	}
	for _, file := range files {
		t.Run(strings.TrimSuffix(filepath.Base(file), ".hcl"), func(t *testing.T) {
			_, _, err := Load(file, base(t))
			var p Problems
			if !errors.As(err, &p) {
				t.Fatalf("got %v, want Problems", err)
			}
			got := err.Error() + "\n"
			golden := strings.TrimSuffix(file, ".hcl") + ".want"
			if *update {
				if err := os.WriteFile(golden, []byte(got), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(golden)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(string(want), got); diff != "" {
				t.Error(diff)
			}
		})
	}
}

func TestLoadReadsEverySetting(t *testing.T) {
	path := write(t, `
trust_domain = "example.org"
data_dir     = "/srv/deputy/"
log_level    = "debug"
log_format   = "json"

workload_socket { path = "/run/w/workload.sock" }
admin_socket {
  path  = "/run/a/admin.sock"
  group = "ops"
}
authority "local" {
  ca_ttl            = "48h"
  key_type          = "ec-p384"
  workload_key_type = "rsa-2048"
  keys              = "memory"
  upstream_cert     = "/etc/deputy/ca.pem"
  upstream_key      = "/etc/deputy/ca.key"
  upstream_bundle   = "/etc/deputy/root.pem"
  jwt_issuer        = "https://issuer.example.org/x"
}
attestor "docker" {
  socket = "/run/other.sock"
  env    = ["ROLE"]
}
attestor "systemd" {}
claims { unmapped = "omit" } # read elsewhere

entry "spiffe://example.org/agent/{{unix.user}}" {
  selectors      = ["unix:uid:1000", "docker:label:a:$${b}"]
  x509_ttl       = "8h"
  jwt_ttl        = "5m"
  dns_names      = ["b", "a"]
  hint           = "main"
  federates_with = ["other.org"]
  audiences      = ["x", "y"]
  instance       = true
  allow_traced   = true
  jwt_fresh      = false
}

sds {
  default_svid_name              = "own"
  default_bundle_name            = "root"
  default_all_bundles_name       = "roots"
  disable_spiffe_cert_validation = true
}
oidc_discovery {
  address   = "0.0.0.0:8444"
  cert_file = "/etc/deputy/tls.crt"
  key_file  = "/etc/deputy/tls.key"
}
experimental { wit_svid = true }
`)
	c, warnings, err := Load(path, base(t))
	if err != nil {
		t.Fatal(err)
	}
	values := func(all []Setting[string]) (out []string) {
		for _, s := range all {
			out = append(out, s.Value)
		}
		return out
	}
	e, a := c.Entries[0], c.Authority
	got := []any{
		c.File == path, c.TrustDomain.Value.Name(), c.DataDir.Value, c.LogLevel.Value, c.LogFormat.Value,
		c.WorkloadSocket.Path.Value, c.AdminSocket.Path.Value, c.AdminSocket.Group.Value,
		a.CATTL.Value, a.KeyType.Value, a.WorkloadKeyType.Value, a.Keys.Value,
		a.UpstreamCert.Value, a.UpstreamKey.Value, a.UpstreamBundle.Value, a.JWTIssuer.Value,
		c.Docker.Socket.Value, values(c.Docker.Env), c.Systemd != nil,
		c.SDS.DefaultSVIDName.Value, c.SDS.DefaultBundleName.Value, c.SDS.DefaultAllBundlesName.Value, c.SDS.DisableSPIFFECertValidation.Value,
		e.Path.Value, values(e.Selectors), e.X509TTL.Value, e.JWTTTL.Value, values(e.DNSNames), e.Hint.Value,
		e.FederatesWith[0].Value.Name(), values(e.Audiences), e.Instance.Value, e.AllowTraced.Value, e.JWTFresh.Value,
		c.OIDCDiscovery.Address.Value, c.OIDCDiscovery.CertFile.Value, c.OIDCDiscovery.KeyFile.Value, c.Experimental.WITSVID.Value,
	}
	want := []any{
		true, "example.org", "/srv/deputy", hclog.Debug, JSON,
		"/run/w/workload.sock", "/run/a/admin.sock", "ops",
		48 * time.Hour, "ec-p384", "rsa-2048", Memory,
		"/etc/deputy/ca.pem", "/etc/deputy/ca.key", "/etc/deputy/root.pem", "https://issuer.example.org/x",
		"/run/other.sock", []string{"ROLE"}, true,
		"own", "root", "roots", true,
		"/agent/{{unix.user}}", []string{"unix:uid:1000", "docker:label:a:${b}"}, 8 * time.Hour, 5 * time.Minute, []string{"b", "a"}, "main",
		"other.org", []string{"x", "y"}, true, true, false,
		"0.0.0.0:8444", "/etc/deputy/tls.crt", "/etc/deputy/tls.key", true,
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	if len(warnings) != 2 {
		t.Errorf("got warnings %v, want one of the group and one of the keys", warnings)
	}
	if got := c.Claims; got == nil || got.Text != ` unmapped = "omit" ` || got.Start.Line != 27 || got.Start.Column != 9 {
		t.Errorf("got claims %+v, want the text between the braces with its place", got)
	}
	if got := e.Selectors[1].Range.Start; got.Line != 30 || got.Column != 38 {
		t.Errorf("second selector: got %d:%d, want 30:38", got.Line, got.Column)
	}
	if got := e.At("hint").Start.Line; got != 34 {
		t.Errorf("hint: got line %d, want 34", got)
	}
	if got := e.At("nothing"); got != e.Range {
		t.Errorf("a key that is not there: got %v, want the header", got)
	}
}

func TestWhatTheFileDoesNotSetIsTheDefault(t *testing.T) {
	want := base(t)
	got, warnings, err := Load(write(t, "# nothing\n"), want)
	if err != nil || len(warnings) > 0 {
		t.Fatalf("got %v, %v", warnings, err)
	}
	if got.TrustDomain != want.TrustDomain || got.DataDir != want.DataDir || got.Authority != want.Authority ||
		got.WorkloadSocket != want.WorkloadSocket || got.AdminSocket != want.AdminSocket || got.SDS != want.SDS || got.LogLevel != want.LogLevel {
		t.Errorf("got %+v, want %+v", got, want)
	}
	if got.TrustDomain.Given() {
		t.Error("a default counts as given")
	}
}

func TestBlocksMayStandOnOneLine(t *testing.T) {
	c, _, err := Load(write(t, `
workload_socket { path = "/run/w/workload.sock" }
authority "local" { ca_ttl = "24h" } # a comment
attestor "docker" { socket = "/run/docker.sock" }
`), base(t))
	if err != nil || c.WorkloadSocket.Path.Value != "/run/w/workload.sock" || c.Docker == nil {
		t.Errorf("got %+v, %v", c, err)
	}
}

func TestWhatIsRightIsThereBesideAnError(t *testing.T) {
	c, _, err := Load(write(t, `
entry "/half" {
  selectors = ["unix:uid:1"]
  x509_ttl  = "1ms"
}
entry "/good" { selectors = ["unix:uid:1"] }
`), base(t))
	if err == nil {
		t.Fatal("got no error")
	}
	if len(c.Entries) != 2 || c.Entries[0].Path.Value != "/half" || len(c.Entries[0].Selectors) != 1 || c.Entries[0].X509TTL.Given() || c.Entries[1].Path.Value != "/good" {
		t.Errorf("got %+v, want both entries, the first without its TTL", c.Entries)
	}
}

func TestDefault(t *testing.T) {
	for name, tc := range map[string]struct {
		root                    bool
		env                     map[string]string
		workload, admin, dataAt string
	}{
		"root": {
			true, map[string]string{"HOME": "/root", "XDG_RUNTIME_DIR": "/run/user/0"},
			"/run/deputy/public/workload.sock", "/run/deputy/private/admin.sock", "/var/lib/deputy",
		},
		"a user with a session": {
			false, map[string]string{"HOME": "/home/u", "XDG_RUNTIME_DIR": "/run/user/7"},
			"/run/user/7/deputy/public/workload.sock", "/run/user/7/deputy/private/admin.sock", "/home/u/.local/state/deputy",
		},
		"a user without": {
			false, map[string]string{"HOME": "/home/u"},
			"/home/u/.local/state/deputy/run/public/workload.sock", "/home/u/.local/state/deputy/run/private/admin.sock", "/home/u/.local/state/deputy",
		},
		"a user with a state directory and relative paths": {
			false, map[string]string{"HOME": "u", "XDG_STATE_HOME": "/s", "XDG_RUNTIME_DIR": "run"},
			"/s/deputy/run/public/workload.sock", "/s/deputy/run/private/admin.sock", "/s/deputy",
		},
	} {
		t.Run(name, func(t *testing.T) {
			c, err := Default(tc.root, func(k string) string { return tc.env[k] })
			if err != nil {
				t.Fatal(err)
			}
			got := []string{c.WorkloadSocket.Path.Value, c.AdminSocket.Path.Value, c.DataDir.Value, c.TrustDomain.Value.Name()}
			if diff := cmp.Diff([]string{tc.workload, tc.admin, tc.dataAt, "deputy.internal"}, got); diff != "" {
				t.Error(diff)
			}
			// A file that only sets what already holds is no less safe.
			if _, _, problems := decode(nil, "x", c); len(problems) > 0 {
				t.Error(problems)
			}
		})
	}
	if _, err := Default(false, func(string) string { return "" }); err == nil {
		t.Error("a user without HOME: got no error")
	}
}

func TestDefaultTTLsFitTheCA(t *testing.T) {
	for ca, want := range map[string][2]time.Duration{
		"24h": {time.Hour, 5 * time.Minute},
		"1h":  {10 * time.Minute, 5 * time.Minute},
		"31s": {5 * time.Second, 5 * time.Second},
	} {
		c, _, err := Load(write(t, `authority "local" { ca_ttl = "`+ca+`" }`), base(t))
		if err != nil {
			t.Fatal(err)
		}
		if got := [2]time.Duration{c.Authority.X509TTL(), c.Authority.JWTTTL()}; got != want {
			t.Errorf("ca_ttl %s: got %v, want %v", ca, got, want)
		}
	}
}

func TestFilesThatCannotBeRead(t *testing.T) {
	big := write(t, strings.Repeat("#", maxFile+1))
	for name, path := range map[string]string{"missing": "/nonexistent/deputy.hcl", "a directory": t.TempDir(), "too large": big} {
		if c, _, err := Load(path, base(t)); err == nil || c != nil || !strings.Contains(err.Error(), path) {
			t.Errorf("%s: got %v, %v, want an error that names it", name, c, err)
		}
	}
}

func TestAFileThatOthersMayWriteIsWarnedOf(t *testing.T) {
	path := write(t, "")
	if err := os.Chmod(path, 0o664); err != nil {
		t.Fatal(err)
	}
	_, warnings, err := Load(path, base(t))
	if err != nil || len(warnings) != 1 || !strings.HasPrefix(warnings[0].String(), path+":1:1: ") {
		t.Errorf("got %v, %v, want one warning", warnings, err)
	}
}

func TestSamplesLoad(t *testing.T) {
	files, err := filepath.Glob("samples/*.hcl")
	if err != nil || len(files) == 0 {
		t.Fatalf("got %d files, %v", len(files), err)
	}
	for _, file := range files {
		if _, _, err := Load(file, base(t)); err != nil {
			t.Error(err)
		}
	}
}

// The block on the page about meshes says what the defaults are.
func TestMeshPageHasTheDefaultsOfSDS(t *testing.T) {
	page, err := os.ReadFile("../docs/mesh.md")
	if err != nil {
		t.Fatal(err)
	}
	_, section, _ := strings.Cut(string(page), "\n## Envoy: names and formats\n")
	section, _, _ = strings.Cut(section, "\n## ")
	_, block, _ := strings.Cut(section, "```hcl\n")
	block, _, ok := strings.Cut(block, "```\n")
	if !ok {
		t.Fatal("the page has no configuration of SDS")
	}
	want := base(t)
	c, _, err := Load(write(t, block), want)
	if err != nil {
		t.Fatal(err)
	}
	got := []any{c.SDS.DefaultSVIDName.Value, c.SDS.DefaultBundleName.Value, c.SDS.DefaultAllBundlesName.Value, c.SDS.DisableSPIFFECertValidation.Value}
	is := []any{want.SDS.DefaultSVIDName.Value, want.SDS.DefaultBundleName.Value, want.SDS.DefaultAllBundlesName.Value, want.SDS.DisableSPIFFECertValidation.Value}
	if diff := cmp.Diff(is, got); diff != "" {
		t.Error(diff)
	}
	if n := strings.Count(block, " = "); n != 4 {
		t.Errorf("got %d settings on the page, want all four", n)
	}
}

func FuzzLoad(f *testing.F) {
	for _, pattern := range []string{"testdata/*.hcl", "samples/*.hcl"} {
		files, err := filepath.Glob(pattern)
		if err != nil {
			f.Fatal(err)
		}
		for _, file := range files {
			src, err := os.ReadFile(file)
			if err != nil {
				f.Fatal(err)
			}
			f.Add(src)
		}
	}
	f.Add([]byte(`a = "%{ if x }"`))
	f.Add([]byte("entry \"/a\" {\n  selectors = [\"\\u0000\"]\n}"))
	f.Add(bytes.Repeat([]byte("["), 1000))
	b := base(f)
	f.Fuzz(func(t *testing.T, src []byte) {
		c, warnings, problems := decode(src, "x", b)
		if c == nil && len(problems) == 0 {
			t.Fatal("got neither a configuration nor a problem")
		}
		for _, p := range append(warnings, problems...) {
			if p.Range.Filename != "x" || p.Range.Start.Line < 1 || p.Range.Start.Column < 1 {
				t.Errorf("problem without a place: %v", p)
			}
			if strings.ContainsAny(p.Reason, "\n") || p.Reason == "" {
				t.Errorf("reason %q is not one line", p.Reason)
			}
		}
		if len(problems) > 0 {
			return
		}
		for _, e := range c.Entries {
			if len(e.Selectors) == 0 || !strings.HasPrefix(e.Path.Value, "/") {
				t.Errorf("entry without path or selectors: %+v", e)
			}
			if ttl := e.X509TTL.Value; ttl != 0 && (ttl < MinTTL || ttl > c.Authority.CATTL.Value/6) {
				t.Errorf("got x509_ttl %s under a ca_ttl of %s", ttl, c.Authority.CATTL.Value)
			}
		}
	})
}
