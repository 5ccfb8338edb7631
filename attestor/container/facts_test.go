package container

import (
	"encoding/json"
	"os"
	"regexp"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/moby/moby/api/types/container"
	dockerimage "github.com/moby/moby/api/types/image"

	"github.com/deputy-id/deputy/attestor"
)

const hex64 = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"

func TestRepositoryDigests(t *testing.T) {
	digest := "sha256:" + hex64
	tests := map[string]string{ // repository, or "" where it is none
		"alpine@" + digest:                             "docker.io/library/alpine",
		"library/alpine@" + digest:                     "docker.io/library/alpine",
		"docker.io/alpine@" + digest:                   "docker.io/library/alpine",
		"index.docker.io/library/alpine@" + digest:     "docker.io/library/alpine",
		"grafana/grafana@" + digest:                    "docker.io/grafana/grafana",
		"ghcr.io/a/b/c@" + digest:                      "ghcr.io/a/b/c",
		"localhost/app@" + digest:                      "localhost/app",
		"127.0.0.1:5000/app@" + digest:                 "127.0.0.1:5000/app",
		"[::1]:5000/app@" + digest:                     "[::1]:5000/app",
		"Registry/app@" + digest:                       "Registry/app",
		"registry:5000/my__app-x.y@" + digest:          "registry:5000/my__app-x.y",
		"app@sha256:" + strings.ToUpper(hex64):         "",
		"app@sha512:" + hex64:                          "",
		"app:1@" + digest:                              "",
		"app@" + digest + "@" + digest:                 "",
		"<none>@" + digest:                             "",
		"ghcr.io/../app@" + digest:                     "",
		"ghcr.io//app@" + digest:                       "",
		"ghcr.io/app/@" + digest:                       "",
		"ghcr.io/@" + digest:                           "",
		"@" + digest:                                   "",
		"ghcr.io/App@" + digest:                        "",
		strings.Repeat("a", 256) + "@" + digest:        "",
		"app":                                          "",
		"ghcr.io/app\n@" + digest:                      "",
		"evil.example/x@docker.io/library/a@" + digest: "",
	}
	for in, want := range tests {
		got, ok := parseRepoDigest(in)
		if ok != (want != "") || got.repository != want {
			t.Errorf("%q: got %q, %v, want %q", in, got.repository, ok, want)
		}
	}
}

// The containerd store names an image by its manifest or index, as later
// engines do by default.
func TestImageOfAStoreThatNamesManifests(t *testing.T) {
	index, manifest := "sha256:"+hex64, "sha256:"+strings.Repeat("ef", 32)
	im := decode(t, newImage, index, `{"Id":"`+index+`","Descriptor":{"digest":"`+index+`"},"RepoDigests":["app@`+index+`"]}`)
	c := decode(t, newInspected, "x", `{"Id":"x","Image":"`+index+`","State":{},"ImageManifestDescriptor":{"digest":"`+manifest+`"}}`)
	var got []string
	for _, s := range c.selectors("docker", im, nil) {
		if s.Type == "image" {
			got = append(got, s.Value)
		}
	}
	want := []string{"digest:" + index, "digest:" + manifest, "reference:docker.io/library/app@" + index, "repository:docker.io/library/app"}
	if strings.Join(got, "\n") != strings.Join(want, "\n") {
		t.Errorf("got %q, want %q", got, want)
	}
}

func decode[R, V any](t *testing.T, check func(string, R) (V, error), id, text string) V {
	t.Helper()
	var r R
	if err := json.Unmarshal([]byte(text), &r); err != nil {
		t.Fatal(err)
	}
	v, err := check(id, r)
	if err != nil {
		t.Fatal(err)
	}
	return v
}

// What Docker 20.10.24 answered about a container of an image that was pushed.
func TestCapture(t *testing.T) {
	const container = "3e4b64e9a6d41962b44af52bfd091639746fe96f696eb7ad7737c2c9555517b9"
	const imageID = "sha256:20e9a197e362c3a81b080042d7f2836210c662624dad003fa0fe20f1121ab092"
	const manifest = "sha256:fc43e1c92667219f477f7022bc7d0b418faeeec36ecaeb4d38ca27fbd632fecd"
	c := decode(t, newInspected, container, capture(t, "container"))
	im := decode(t, newImage, imageID, capture(t, "image"))
	if !c.running || c.pid != 14448 || c.name != "crawler" {
		t.Errorf("got %q running %v as %d, want crawler running as 14448", c.name, c.running, c.pid)
	}
	var got []string
	for _, s := range c.selectors("docker", im, []string{"STAGE"}) {
		got = append(got, s.String())
	}
	want := []string{
		"container:id:" + container,
		"container:runtime:docker",
		"docker:env:STAGE=live",
		"docker:image_config_digest:" + imageID,
		"docker:image_id:127.0.0.1:36435/agents/crawler:1",
		"docker:label:team:search",
		"image:config_digest:" + imageID,
		"image:digest:" + manifest,
		"image:reference:127.0.0.1:36435/agents/crawler@" + manifest,
		"image:repository:127.0.0.1:36435/agents/crawler",
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("selectors differ (-want +got):\n%s", diff)
	}
}

func capture(tb testing.TB, of string) string {
	tb.Helper()
	b, err := os.ReadFile("testdata/docker-20.10.24-overlay2-" + of + ".json")
	if err != nil {
		tb.Fatal(err)
	}
	return string(b)
}

func TestEnvironmentIsOfferedByNameAlone(t *testing.T) {
	c := inspected{env: []string{"A=1", "AB=2", "B=x=y", "NOVALUE", "A"}}
	var got []string
	for _, s := range c.selectors("docker", image{}, []string{"A", "B", "NOVALUE"}) {
		if strings.HasPrefix(s.Value, "env:") {
			got = append(got, s.Value)
		}
	}
	if want := "env:A=1 env:B=x=y"; strings.Join(got, " ") != want {
		t.Errorf("got %q, want %q", got, want)
	}
}

// idForm finds the ID that the fuzz tests do not ask about.
var idForm = regexp.MustCompile(`^\{"Id":"[^"]*"`)

func FuzzInspected(f *testing.F) {
	f.Add([]byte(idForm.ReplaceAllString(capture(f, "container"), `{"Id":"x"`)))
	f.Add([]byte(`{"Id":"x","Name":"/a","Image":"sha256:` + hex64 + `","State":{"Running":true,"Pid":7},"Config":{"Image":"a","Labels":{"k":"v","k\n":"\u0000"},"Env":["A=b","A","=",""]}}`))
	f.Add([]byte(`{"Id":"x","Image":"sha256:` + hex64 + `","State":{"Pid":-1}}`))
	f.Add([]byte(`{"Id":"x","State":null,"Config":null}`))
	f.Add([]byte(`null`))
	f.Fuzz(func(t *testing.T, b []byte) {
		var r container.InspectResponse
		if json.Unmarshal(b, &r) != nil {
			return
		}
		c, err := newInspected("x", r)
		if err != nil {
			return
		}
		if c.id != "x" || c.running && c.pid <= 0 || !digestForm.MatchString(c.imageID) {
			t.Errorf("got %+v", c)
		}
		wellFormed(t, c.selectors("docker", image{}, []string{"A", ""}))
	})
}

func FuzzImage(f *testing.F) {
	f.Add([]byte(idForm.ReplaceAllString(capture(f, "image"), `{"Id":"x"`)))
	f.Add([]byte(`{"Id":"x","RepoDigests":["a@sha256:` + hex64 + `","b","@"],"Descriptor":{"digest":"x"}}`))
	f.Add([]byte(`{"Id":"y"}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		var r dockerimage.InspectResponse
		if json.Unmarshal(b, &r) != nil {
			return
		}
		im, err := newImage("x", r)
		if err != nil {
			return
		}
		for _, d := range im.repoDigests {
			host, path, ok := strings.Cut(d.repository, "/")
			if !ok || !hostForm.MatchString(host) || !pathForm.MatchString(path) || !digestForm.MatchString(d.digest) {
				t.Errorf("got %+v", d)
			}
			if again, ok := parseRepoDigest(d.String()); ok && again != d {
				t.Errorf("got %+v read again, want %+v", again, d)
			}
		}
		wellFormed(t, inspected{id: hex64, imageID: "sha256:" + hex64}.selectors("docker", im, nil))
	})
}

func wellFormed(t *testing.T, selectors []attestor.Selector) {
	t.Helper()
	for _, s := range selectors {
		if _, err := attestor.ParseSelector(s.String()); err != nil {
			t.Error(err)
		}
	}
}
