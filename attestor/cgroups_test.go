package attestor

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// hierarchies are where this machine shows its cgroups.
func hierarchies(t *testing.T) (unified, systemd string) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Fatal("making cgroups needs root")
	}
	text, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	return cgroupMounts(text)
}

// makeCgroups makes the directories of a path, below one of the test's own,
// and returns that as the kernel names it.
func makeCgroups(t *testing.T, mount, path string) string {
	t.Helper()
	top := fmt.Sprintf("/deputy-test-%d-%s.slice", os.Getpid(), strings.NewReplacer("/", "-", " ", "-").Replace(t.Name()))
	var made []string
	t.Cleanup(func() {
		for len(made) > 0 {
			last := made[len(made)-1]
			made = made[:len(made)-1]
			if err := unix.Rmdir(last); err != nil {
				t.Errorf("remove %s: %v", last, err)
			}
		}
	})
	at := mount
	for _, name := range strings.Split(top[1:]+path, "/") {
		at = filepath.Join(at, name)
		if err := os.Mkdir(at, 0o755); err != nil {
			t.Fatal(err)
		}
		made = append(made, at)
	}
	return top
}

// enter starts a process in the cgroup. It ends before the directories go.
func enter(t *testing.T, dir string) int {
	t.Helper()
	r := start(t, self(t), nil)
	if err := os.WriteFile(dir+"/cgroup.procs", []byte(itoa(r.self)), 0); err != nil {
		t.Fatal(err)
	}
	return r.self
}

func openCgroups(t *testing.T) *Cgroups {
	t.Helper()
	c, err := OpenCgroups()
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// give makes a user the owner of a directory as systemd does for Delegate=.
func give(t *testing.T, dir string, uid int) {
	t.Helper()
	for _, name := range []string{"", "cgroup.procs", "cgroup.threads", "cgroup.subtree_control", "tasks"} {
		if err := os.Chown(filepath.Join(dir, name), uid, uid); err != nil && !os.IsNotExist(err) {
			t.Fatal(err)
		}
	}
}

func TestRealPlaces(t *testing.T) {
	unified, systemd := hierarchies(t)
	scope := "docker-" + id1 + ".scope"
	for name, mount := range map[string]string{"v2": unified, "v1": systemd} {
		v1 := name == "v1"
		if mount == "" {
			t.Logf("this machine has no %s hierarchy", name)
			continue
		}
		t.Run(name+" of root", func(t *testing.T) {
			top := makeCgroups(t, mount, "/agent.service")
			got, err := openCgroups(t).Place(newBench(t).open(enter(t, mount+top+"/agent.service")))
			if err != nil {
				t.Fatal(err)
			}
			want := top + "/agent.service"
			if got.Trusted != want || got.Unit != "agent.service" || got.Slice != top[1:] || got.FromV1 != v1 || got.Owner != "unit:agent.service" {
				t.Errorf("got %+v, want unit agent.service in %s", got, want)
			}
		})
		t.Run(name+" given to a user", func(t *testing.T) {
			top := makeCgroups(t, mount, "/user@77.service/"+scope)
			give(t, mount+top+"/user@77.service", 77)
			give(t, mount+top+"/user@77.service/"+scope, 77)
			p := newBench(t).open(enter(t, mount+top+"/user@77.service/"+scope))
			got, err := openCgroups(t).Place(p)
			if err != nil {
				t.Fatal(err)
			}
			// On v1 the user may have put anything of that UID there.
			unit, owner := "user@77.service", "unit:user@77.service"
			if v1 {
				unit, owner = "", "uid:0"
			}
			if got.Container != nil || got.Unit != unit || got.Owner != owner {
				t.Errorf("got %+v, want unit %q and no container", got, unit)
			}
			theirs := openCgroups(t)
			theirs.trusted = append(theirs.trusted, 77) // as in a daemon that user 77 runs
			trusting, err := theirs.Place(p)
			if err != nil {
				t.Fatal(err)
			}
			if trusting.Container == nil || trusting.Container.ID != id1 {
				t.Errorf("got %+v where user 77 counts as root, want the container", trusting)
			}
		})
		for _, mark := range []string{"user.delegate", "trusted.delegate"} {
			t.Run(name+" marked "+mark, func(t *testing.T) {
				top := makeCgroups(t, mount, "/engine.service/"+scope)
				if err := unix.Setxattr(mount+top+"/engine.service", mark, []byte("1"), 0); err != nil {
					t.Fatal(err)
				}
				got, err := openCgroups(t).Place(newBench(t).open(enter(t, mount+top+"/engine.service/"+scope)))
				if err != nil {
					t.Fatal(err)
				}
				if got.Container != nil || got.Unit != "engine.service" {
					t.Errorf("got %+v, want unit engine.service and no container", got)
				}
			})
		}
	}
}

func TestSetSeesAMoveInV1(t *testing.T) {
	_, systemd := hierarchies(t)
	if systemd == "" {
		t.Skip("LOUD: this machine has no v1 hierarchy, so that moves in it are not tested")
	}
	top := makeCgroups(t, systemd, "/a.service")
	pid := enter(t, systemd+top+"/a.service")
	p := newBench(t).open(pid)
	s := newTestSet(Source{Name: "cgroup", Prefixes: []string{"cgroup:"}, Attestor: NewCgroup(openCgroups(t))})
	unit := Selector{"cgroup", "unit:a.service"}
	first := mustAttest(t, s, p)
	if !first.Has(unit) || first.Owner != "unit:a.service" {
		t.Fatalf("got %v of %s, want %s", first.Selectors, first.Owner, unit)
	}
	if err := os.WriteFile(systemd+"/cgroup.procs", []byte(itoa(pid)), 0); err != nil {
		t.Fatal(err)
	}
	if e := mustAttest(t, s, p); e.Has(unit) {
		t.Errorf("got %s after the process left that cgroup", unit)
	}
}
