package attestor

import (
	"slices"
	"strings"
	"testing"
)

func TestCheckSelectorTakesWhatAttestorsGive(t *testing.T) {
	for _, text := range []string{
		"unix:uid:0", "unix:gid:4294967295", "unix:supplementary_gid:27", "unix:user:alice", "unix:group:www-data",
		"unix:path:/usr/bin/agent", "unix:sha256:" + id1,
		"process:leader:true", "process:host:true", "process:exec:a-b_c.1", "process:parent_path:/bin/sh", "process:parent_sha256:" + id1, "process:ancestor_path:/bin/sh",
		"cgroup:path:/system.slice/a.service", "cgroup:ancestor:/system.slice", "cgroup:unit:a@1.service", "cgroup:unit:session-1.scope", "cgroup:slice:user-1000.slice",
		"systemd:id:a.service", "systemd:fragment_path:/etc/systemd/system/a.service",
		"docker:label:com.example.a:b:c", "docker:label:empty:", "docker:env:A=b=c", "docker:image_id:alpine:3.20", "docker:image_config_digest:sha256:" + id1,
		"container:id:" + id1, "container:name:web_1", "container:runtime:docker", "container:path:/app",
		"image:digest:sha256:" + id1, "image:config_digest:sha256:" + id1, "image:repository:docker.io/library/alpine", "image:repository:127.0.0.1:5000/a",
		"image:reference:docker.io/library/alpine@sha256:" + id1,
		"k8s:ns:default", "k8s:sa:workload", "k8s:node-name:node-1", "k8s:pod-name:demo", "k8s:pod-uid:c3701101-cc75-46a6-b5ca-641119cf17d9",
		"k8s:pod-label:app.kubernetes.io/name:demo", "k8s:pod-label:empty:", "k8s:pod-owner:ReplicaSet:demo", "k8s:pod-owner-uid:ReplicaSet:c3701101",
		"k8s:pod-image:docker.io/library/alpine:3.20", "k8s:pod-init-image:a", "k8s:pod-image-count:1", "k8s:pod-init-image-count:0",
	} {
		s, err := ParseSelector(text)
		if err != nil {
			t.Fatal(err)
		}
		if err := CheckSelector(s); err != nil {
			t.Errorf("%s: %v", text, err)
		}
	}
}

func TestCheckSelectorSaysWhatItExpected(t *testing.T) {
	for text, want := range map[string]string{
		"unxi:uid:0":                          "known are cgroup, container, docker, image, k8s, process, systemd, unix",
		"unix:pid:0":                          "gid, group, path, sha256, supplementary_gid",
		"unix:uid":                            "a number from 0 to 4294967295",
		"unix:uid:":                           "a number from 0 to 4294967295",
		"unix:uid:01":                         "a number from 0 to 4294967295",
		"unix:uid:4294967296":                 "a number from 0 to 4294967295",
		"unix:uid:alice":                      "a number from 0 to 4294967295",
		"unix:path:bin/agent":                 "an absolute path",
		"unix:path:/bin/../agent":             "an absolute path",
		"unix:path:/bin/":                     "an absolute path",
		"unix:sha256:sha256:" + id1:           "64 lower-case",
		"unix:sha256:" + strings.ToUpper(id1): "64 lower-case",
		"process:leader:yes":                  "true",
		"process:exec:a b":                    "1 to 64",
		"cgroup:unit:agent":                   "such as agent.service",
		"cgroup:slice:system":                 "such as system.slice",
		"docker:label:a":                      "NAME:VALUE",
		"docker:env:A":                        "NAME=VALUE",
		"container:id:2ce89c5fd167":           "full ID",
		"container:runtime:moby":              "docker, containerd",
		"image:digest:" + id1:                 "sha256: and 64",
		"image:repository:alpine":             "with its registry",
		"image:repository:docker.io/a:1":      "without tag",
		"image:reference:docker.io/a":         "REPOSITORY@sha256:DIGEST",
	} {
		typ, value, _ := strings.Cut(text, ":")
		err := CheckSelector(Selector{typ, value})
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: got %v, want an error that says %q", text, err, want)
		}
	}
}

func TestCheckPrefixSaysWhatHasNoValue(t *testing.T) {
	for _, c := range []struct{ typ, key, name, want string }{
		{"unix", "user", "", ""},
		{"docker", "label", "com.example.role", ""},
		{"docker", "label", "", ""},
		{"k8s", "pod-owner", "ReplicaSet", ""},
		{"image", "digest", "sha256", ""},
		{"image", "repository", "127.0.0.1", ""}, // and a port
		{"nope", "x", "", `no selectors of the type "nope"; known are cgroup`},
		{"unix", "nope", "", `unix has no "nope", but gid, group`},
		{"unix", "user", "alice", `never begins with "alice:": it is a name`},
		{"docker", "env", "TEAM", `never begins with "TEAM:": it is NAME=VALUE`},
		{"image", "digest", "md5", `never begins with "md5:"`},
	} {
		err := CheckPrefix(c.typ, c.key, c.name)
		if c.want == "" && err != nil || c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)) {
			t.Errorf("%s.%s:%s: got %v, want %q", c.typ, c.key, c.name, err, c.want)
		}
	}
}

func TestKnownTypesAreSorted(t *testing.T) {
	if got := KnownTypes(); !slices.IsSorted(got) || !slices.Contains(got, "unix") {
		t.Errorf("got %v", got)
	}
}
