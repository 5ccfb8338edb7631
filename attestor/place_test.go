package attestor

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// A tree is the directories of a host by path; those that it does not have are
// root's own.
type tree map[string]directory

func (t tree) look(_ bool, path string) (directory, error) {
	if d, ok := t[path]; ok {
		return d, nil
	}
	return directory{closed: true, guarded: true}, nil
}

var (
	usersOwn  = directory{delegated: delegatedToSome}
	delegated = directory{closed: true, guarded: true, delegated: delegatedToSome}
	ours      = directory{closed: true, guarded: true, delegated: delegatedToUs}
)

const (
	id1 = "2ce89c5fd167d79cc81320eddc2ae78d57c71c072180686b23539f5709dfb345"
	id2 = "34f65b56c2d5fc05359ed0e0267ce201786375c3712191ed9ed33af90e5eefad"
)

func TestPlaceOfALayout(t *testing.T) {
	for name, test := range map[string]struct {
		text string
		tree tree
		want Place
	}{
		"root of pure v2 is no place": {
			text: "0::/\n",
			want: Place{Path: "/", Trusted: "/"},
		},
		"service on pure v2": {
			text: "0::/system.slice/researcher.service\n",
			want: Place{Path: "/system.slice/researcher.service", Trusted: "/system.slice/researcher.service",
				Unit: "researcher.service", Slice: "system.slice", Owner: "unit:researcher.service"},
		},
		"service on v1 alone": {
			text: "12:pids:/system.slice/a.service\n1:name=systemd:/system.slice/a.service\n",
			want: Place{Path: "/system.slice/a.service", Trusted: "/system.slice/a.service", FromV1: true,
				Unit: "a.service", Slice: "system.slice", Owner: "unit:a.service"},
		},
		"hybrid where v2 is unused takes v1's names": {
			text: "9:name=systemd:/docker/" + id1 + "\n4:memory:/docker/" + id1 + "\n0::/\n",
			want: Place{Path: "/docker/" + id1, Trusted: "/docker/" + id1, FromV1: true, Owner: "container:" + id1,
				Container: &ContainerRef{ID: id1, Runtime: "docker", Dir: "/docker/" + id1, FromV1: true}},
		},
		"hybrid where both have names takes v2's": {
			text: "9:name=systemd:/a.slice\n0::/b.slice\n",
			want: Place{Path: "/b.slice", Trusted: "/b.slice", Slice: "b.slice"},
		},
		"root of both may come to be named by v1": {
			text: "9:name=systemd:/\n0::/\n",
			want: Place{Path: "/", Trusted: "/", FromV1: true},
		},
		"session of a user": {
			text: "0::/user.slice/user-1000.slice/session-3.scope\n",
			want: Place{Path: "/user.slice/user-1000.slice/session-3.scope", Trusted: "/user.slice/user-1000.slice/session-3.scope",
				Unit: "session-3.scope", Slice: "user.slice", Owner: "slice:user-1000.slice"},
		},
		"unit in a user's own manager is that user's word": {
			text: "0::/user.slice/user-1000.slice/user@1000.service/app.slice/evil.service\n",
			tree: tree{"/user.slice/user-1000.slice/user@1000.service": usersOwn},
			want: Place{Path: "/user.slice/user-1000.slice/user@1000.service/app.slice/evil.service",
				Trusted: "/user.slice/user-1000.slice/user@1000.service",
				Unit:    "user@1000.service", Slice: "user.slice", Owner: "slice:user-1000.slice"},
		},
		"directory named like a container in a delegated subtree proves nothing": {
			text: "0::/user.slice/user-1000.slice/user@1000.service/docker-" + id1 + ".scope\n",
			tree: tree{"/user.slice/user-1000.slice/user@1000.service": {}}, // not even marked
			want: Place{Path: "/user.slice/user-1000.slice/user@1000.service/docker-" + id1 + ".scope",
				Trusted: "/user.slice/user-1000.slice/user@1000.service",
				Unit:    "user@1000.service", Slice: "user.slice", Owner: "slice:user-1000.slice"},
		},
		"rootless podman is not believed by root": {
			text: "0::/user.slice/user-1000.slice/user@1000.service/user.slice/libpod-" + id1 + ".scope/container\n",
			tree: tree{"/user.slice/user-1000.slice/user@1000.service": usersOwn},
			want: Place{Path: "/user.slice/user-1000.slice/user@1000.service/user.slice/libpod-" + id1 + ".scope/container",
				Trusted: "/user.slice/user-1000.slice/user@1000.service",
				Unit:    "user@1000.service", Slice: "user.slice", Owner: "slice:user-1000.slice"},
		},
		"rootless podman is, where its user counts as root": {
			text: "0::/user.slice/user-1000.slice/user@1000.service/user.slice/libpod-" + id1 + ".scope/container\n",
			tree: tree{"/user.slice/user-1000.slice/user@1000.service": ours},
			want: Place{Path: "/user.slice/user-1000.slice/user@1000.service/user.slice/libpod-" + id1 + ".scope/container",
				Trusted: "/user.slice/user-1000.slice/user@1000.service/user.slice/libpod-" + id1 + ".scope",
				Unit:    "libpod-" + id1 + ".scope", Slice: "user.slice", Owner: "container:" + id1,
				Container: &ContainerRef{ID: id1, Runtime: "podman",
					Dir: "/user.slice/user-1000.slice/user@1000.service/user.slice/libpod-" + id1 + ".scope"}},
		},
		"a daemon of a user names that user's units": {
			text: "0::/user.slice/user-1000.slice/user@1000.service/app.slice/agent.service\n",
			tree: tree{"/user.slice/user-1000.slice/user@1000.service": ours},
			want: Place{Path: "/user.slice/user-1000.slice/user@1000.service/app.slice/agent.service",
				Trusted: "/user.slice/user-1000.slice/user@1000.service/app.slice/agent.service",
				Unit:    "agent.service", Slice: "app.slice", Owner: "unit:agent.service"},
		},
		"below a unit with Delegate= nothing counts, root's own or not": {
			text: "0::/system.slice/containerd.service/docker/" + id1 + "\n",
			tree: tree{"/system.slice/containerd.service": delegated},
			want: Place{Path: "/system.slice/containerd.service/docker/" + id1, Trusted: "/system.slice/containerd.service",
				Unit: "containerd.service", Slice: "system.slice", Owner: "unit:containerd.service"},
		},
		"outermost unit and container count": {
			text: "0::/system.slice/docker-" + id1 + ".scope/system.slice/docker-" + id2 + ".scope\n",
			want: Place{Path: "/system.slice/docker-" + id1 + ".scope/system.slice/docker-" + id2 + ".scope",
				Trusted: "/system.slice/docker-" + id1 + ".scope", Unit: "docker-" + id1 + ".scope", Slice: "system.slice",
				Owner:     "container:" + id1,
				Container: &ContainerRef{ID: id1, Runtime: "docker", Dir: "/system.slice/docker-" + id1 + ".scope"}},
		},
		"kubernetes with the systemd driver": {
			text: "0::/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-podc3701101_cc75_46a6_b5ca_641119cf17d9.slice/cri-containerd-" + id1 + ".scope\n",
			want: Place{
				Path:    "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-podc3701101_cc75_46a6_b5ca_641119cf17d9.slice/cri-containerd-" + id1 + ".scope",
				Trusted: "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-podc3701101_cc75_46a6_b5ca_641119cf17d9.slice/cri-containerd-" + id1 + ".scope",
				Unit:    "cri-containerd-" + id1 + ".scope", Slice: "kubepods.slice", Owner: "container:" + id1,
				Container: &ContainerRef{ID: id1, Runtime: "containerd", Pod: "c3701101-cc75-46a6-b5ca-641119cf17d9",
					Dir: "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-podc3701101_cc75_46a6_b5ca_641119cf17d9.slice/cri-containerd-" + id1 + ".scope"}},
		},
		"kubernetes with CRI-O": {
			text: "0::/kubepods.slice/kubepods-pod7cdd7338_0773_46a9_b421_f789100dd814.slice/crio-" + id1 + ".scope\n",
			want: Place{
				Path:    "/kubepods.slice/kubepods-pod7cdd7338_0773_46a9_b421_f789100dd814.slice/crio-" + id1 + ".scope",
				Trusted: "/kubepods.slice/kubepods-pod7cdd7338_0773_46a9_b421_f789100dd814.slice/crio-" + id1 + ".scope",
				Unit:    "crio-" + id1 + ".scope", Slice: "kubepods.slice", Owner: "container:" + id1,
				Container: &ContainerRef{ID: id1, Runtime: "cri-o", Pod: "7cdd7338-0773-46a9-b421-f789100dd814",
					Dir: "/kubepods.slice/kubepods-pod7cdd7338_0773_46a9_b421_f789100dd814.slice/crio-" + id1 + ".scope"}},
		},
		"podman with cgroupfs": {
			text: "0::/libpod_parent/libpod-" + id1 + "\n",
			want: Place{Path: "/libpod_parent/libpod-" + id1, Trusted: "/libpod_parent/libpod-" + id1, Owner: "container:" + id1,
				Container: &ContainerRef{ID: id1, Runtime: "podman", Dir: "/libpod_parent/libpod-" + id1}},
		},
		"a container's monitor is not in the container": {
			text: "0::/machine.slice/libpod-conmon-" + id1 + ".scope\n",
			want: Place{Path: "/machine.slice/libpod-conmon-" + id1 + ".scope", Trusted: "/machine.slice/libpod-conmon-" + id1 + ".scope",
				Unit: "libpod-conmon-" + id1 + ".scope", Slice: "machine.slice", Owner: "unit:libpod-conmon-" + id1 + ".scope"},
		},
		"containerd's own client names containers freely": {
			text: "0::/default/t1\n",
			want: Place{Path: "/default/t1", Trusted: "/default/t1"},
		},
		"an ID in capitals, short or long is no ID": {
			text: "0::/docker/" + strings.ToUpper(id1) + "/" + id1[1:] + "/" + id1 + "0\n",
			want: Place{Path: "/docker/" + strings.ToUpper(id1) + "/" + id1[1:] + "/" + id1 + "0",
				Trusted: "/docker/" + strings.ToUpper(id1) + "/" + id1[1:] + "/" + id1 + "0"},
		},
		"directory that others may write has no believable children": {
			text: "0::/shared/a.service\n",
			tree: tree{"/shared": {guarded: true}},
			want: Place{Path: "/shared/a.service", Trusted: "/shared"},
		},
		"v2 directory that others may move processes from has none either": {
			text: "0::/shared/a.service\n",
			tree: tree{"/shared": {closed: true}},
			want: Place{Path: "/shared/a.service", Trusted: "/shared"},
		},
		"v1 directory that others may enter says nothing of those above": {
			text: "1:name=systemd:/system.slice/a.service/open\n",
			tree: tree{"/system.slice/a.service/open": {closed: true}},
			want: Place{Path: "/system.slice/a.service/open", Trusted: "/", FromV1: true},
		},
		"v1 unit delegated to a user says nothing": {
			text: "1:name=systemd:/user.slice/user-1000.slice/user@1000.service\n",
			tree: tree{"/user.slice/user-1000.slice/user@1000.service": usersOwn},
			want: Place{Path: "/user.slice/user-1000.slice/user@1000.service", Trusted: "/", FromV1: true},
		},
		"colons and backslashes belong to the path": {
			text: "0::/system.slice/dev-a\\x2db.mount\n",
			want: Place{Path: `/system.slice/dev-a\x2db.mount`, Trusted: `/system.slice/dev-a\x2db.mount`,
				Unit: `dev-a\x2db.mount`, Slice: "system.slice", Owner: `unit:dev-a\x2db.mount`},
		},
		"what cannot be written as a selector ends trust": {
			text: "0::/a/b\tc/d.service\n",
			want: Place{Path: "/a/b\tc/d.service", Trusted: "/a"},
		},
		"a unit's name has no other characters than systemd allows": {
			text: "0::/a b.service\n",
			want: Place{Path: "/a b.service", Trusted: "/a b.service"},
		},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := placeIn([]byte(test.text), test.tree)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(test.want, got); diff != "" {
				t.Errorf("place (-want +got):\n%s", diff)
			}
		})
	}
}

func TestPlaceRefuses(t *testing.T) {
	for name, text := range map[string]string{
		"nothing":                                       "",
		"no line of use":                                "4:memory:/a\n",
		"a path outside of our namespace":               "0::/../../b\n",
		"a path that climbs":                            "0::/a/../b\n",
		"a relative path":                               "0::a\n",
		"an empty name":                                 "0::/a//b\n",
		"a slash at the end":                            "0::/a/\n",
		"a line that is cut off":                        "0::/a",
		"a line without fields":                         "nonsense\n",
		"an ID that is no number":                       "x:name=systemd:/a\n",
		"an ID in another notation":                     "00::/a\n",
		"two v2 lines":                                  "0::/a\n0::/b\n",
		"two lines of systemd":                          "1:name=systemd:/a\n2:name=systemd:/b\n",
		"a hierarchy without a name":                    "3::/a\n",
		"controllers on v2":                             "0:memory:/a\n",
		"lines that name different containers":          "4:memory:/docker/" + id2 + "\n0::/docker/" + id1 + "\n",
		"a container that the counting line leaves out": "9:name=systemd:/docker/" + id1 + "\n0::/system.slice/containerd.service\n",
		"more than the kernel writes":                   "0::/" + strings.Repeat("a", maxCgroupText) + "\n",
	} {
		t.Run(name, func(t *testing.T) {
			if got, err := placeIn([]byte(text), tree{}); err == nil {
				t.Errorf("got %+v, want an error", got)
			}
		})
	}
}

type failing struct{ error }

func (f failing) look(bool, string) (directory, error) { return directory{}, f.error }

func TestPlaceIsUnknownWhenADirectoryCannotBeLookedAt(t *testing.T) {
	broken := errors.New("no")
	for _, text := range []string{"0::/a\n", "1:name=systemd:/a\n"} {
		if _, err := placeIn([]byte(text), failing{broken}); !errors.Is(err, broken) {
			t.Errorf("%q: got %v, want the directory's error", text, err)
		}
	}
}

// The captures are whole files of containers on one node: Kubernetes 1.34 with
// containerd 1.6 and the cgroupfs driver, hybrid hierarchies.
func TestPlaceOfKubernetesCaptures(t *testing.T) {
	dir := filepath.Join("testdata", "kubernetes-1.34-containerd-1.6-cgroupfs-hybrid")
	for file, want := range map[string]struct{ pod, id string }{
		"burstable-main":    {"c3701101-cc75-46a6-b5ca-641119cf17d9", "2ce89c5fd167d79cc81320eddc2ae78d57c71c072180686b23539f5709dfb345"},
		"burstable-sandbox": {"c3701101-cc75-46a6-b5ca-641119cf17d9", "34f65b56c2d5fc05359ed0e0267ce201786375c3712191ed9ed33af90e5eefad"},
		"guaranteed":        {"7cdd7338-0773-46a9-b421-f789100dd814", "6a1a9149ceabd369cb737bc22a0bdf52343dd4e9af2d31b88c5164a69574a5c2"},
		"besteffort":        {"a48063ad-dca3-4b43-b65f-205129594ef3", "8b8dd3206285375af0e4f9ccf0a3f8962220e9b6fb4c618566b8dc3781bff52c"},
		"static":            {"a7f39d8503ce360d93670ce9fafc89e1", "10d35f5b518e6731df86e355296125359c44459887dd51866a6a7af9f46a0631"},
	} {
		t.Run(file, func(t *testing.T) {
			text, err := os.ReadFile(filepath.Join(dir, file+".cgroup"))
			if err != nil {
				t.Fatal(err)
			}
			got, err := placeIn(text, tree{})
			if err != nil {
				t.Fatal(err)
			}
			if got.Container == nil || got.Container.ID != want.id || got.Container.Pod != want.pod || got.FromV1 {
				t.Errorf("got %+v, container %+v, want container %s of pod %s from v2", got, got.Container, want.id, want.pod)
			}
			if got.Trusted != got.Path || !got.In(got.Container) {
				t.Errorf("got trust as far as %s, want the whole of %s", got.Trusted, got.Path)
			}
		})
	}
}

func TestPlaceInAContainer(t *testing.T) {
	c := &ContainerRef{ID: id1, Dir: "/docker/" + id1}
	for _, test := range []struct {
		place Place
		want  bool
	}{
		{Place{Path: "/docker/" + id1}, true},
		{Place{Path: "/docker/" + id1 + "/init"}, true},
		{Place{Path: "/docker/" + id1 + "0"}, false},
		{Place{Path: "/docker"}, false},
		{Place{Path: "/docker/" + id1, FromV1: true}, false},
	} {
		if got := test.place.In(c); got != test.want {
			t.Errorf("%+v in %s: got %v, want %v", test.place, c.Dir, got, test.want)
		}
	}
}

func TestCgroupSelectors(t *testing.T) {
	place, err := placeIn([]byte("0::/system.slice/system-agent.slice/agent@1.service\n"), tree{})
	if err != nil {
		t.Fatal(err)
	}
	want := []Selector{
		{"cgroup", "path:/system.slice/system-agent.slice/agent@1.service"},
		{"cgroup", "ancestor:/system.slice"},
		{"cgroup", "ancestor:/system.slice/system-agent.slice"},
		{"cgroup", "unit:agent@1.service"},
		{"cgroup", "slice:system.slice"},
	}
	if diff := cmp.Diff(want, place.selectors()); diff != "" {
		t.Errorf("selectors (-want +got):\n%s", diff)
	}
	if got := (Place{Path: "/evil", Trusted: "/"}).selectors(); got != nil {
		t.Errorf("got %v of a place that is not trusted, want none", got)
	}
}

func TestCgroupMounts(t *testing.T) {
	for name, test := range map[string]struct{ text, unified, systemd string }{
		"pure v2":  {"31 23 0:28 / /sys/fs/cgroup rw,relatime shared:4 - cgroup2 cgroup2 rw,nsdelegate\n", "/sys/fs/cgroup", ""},
		"hybrid":   {"40 31 0:37 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,xattr,name=systemd\n41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n", "/sys/fs/cgroup/unified", "/sys/fs/cgroup/systemd"},
		"a part":   {"41 31 0:38 /docker/x /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n42 31 0:38 /../.. /host rw - cgroup2 cgroup2 rw\n", "", ""},
		"escaped":  {"41 31 0:38 / /a\\040b\\134 rw - cgroup2 cgroup2 rw\n", `/a b\`, ""},
		"nonsense": {"x\n - \n1 2 3 / /a rw - cgroup2\n", "", ""},
		"others":   {"32 31 0:29 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n", "", ""},
	} {
		t.Run(name, func(t *testing.T) {
			unified, systemd := cgroupMounts([]byte(test.text))
			if unified != test.unified || systemd != test.systemd {
				t.Errorf("got %q and %q, want %q and %q", unified, systemd, test.unified, test.systemd)
			}
		})
	}
}

func FuzzPlace(f *testing.F) {
	f.Add("0::/system.slice/a.service\n")
	f.Add("9:name=systemd:/docker/" + id1 + "\n0::/docker/" + id1 + "\n")
	f.Add("0::/kubepods.slice/kubepods-pod7cdd_1.slice/crio-" + id1 + ".scope\n")
	f.Add("0::/../x\n")
	f.Fuzz(func(t *testing.T, text string) {
		place, err := placeIn([]byte(text), tree{})
		if err != nil {
			return
		}
		if place.Path != place.Trusted && place.Trusted != "/" && !strings.HasPrefix(place.Path, place.Trusted+"/") {
			t.Errorf("trusted %q is not on %q", place.Trusted, place.Path)
		}
		if !strings.Contains(text, ":"+place.Path+"\n") {
			t.Errorf("path %q is not in the text", place.Path)
		}
		for name := range strings.SplitSeq(place.Trusted, "/") {
			if name == ".." || name == "." {
				t.Errorf("trusted %q is not clean", place.Trusted)
			}
		}
		for _, s := range place.selectors() {
			if err := CheckSelector(s); err != nil {
				t.Errorf("gives a selector that it refuses: %v", err)
			}
		}
	})
}
