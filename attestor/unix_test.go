package attestor

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"os/user"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestUnixOfAnotherUser(t *testing.T) {
	needRoot(t)
	b := newBench(t)
	p := b.open(cat(t, &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 1, Gid: 2, Groups: []uint32{3, 4_000_000}}}))
	b.want(p, "unix:uid", "1")
	b.want(p, "unix:gid", "2")
	b.want(p, "unix:supplementary_gid", "3", "4000000")
	owner, err := user.LookupId("1")
	if err != nil {
		t.Fatal(err)
	}
	b.want(p, "unix:user", owner.Username)
	for kind, id := range map[string]string{"unix:group": "2", "unix:supplementary_group": "3"} {
		group, err := user.LookupGroupId(id)
		if err != nil {
			t.Fatal(err)
		}
		b.want(p, kind, group.Name)
	}
	b.want(p, "unix:path", "/usr/bin/cat")
}

// hostAt is a host whose root is dir.
func hostAt(t *testing.T, dir string) *Host {
	t.Helper()
	root, err := os.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	return &Host{root: root}
}

func writeFile(t *testing.T, path, content string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path+".new", []byte(content), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(path+".new", path); err != nil {
		t.Fatal(err)
	}
}

func TestNamesComeFromTheHostsFiles(t *testing.T) {
	b := newBench(t)
	p := b.open(cat(t, nil))
	root := t.TempDir()
	uid, gid := os.Geteuid(), os.Getegid()
	u := NewUnix(hostAt(t, root), b.executables, func() Demand { return Demand{} })
	want := func(kind string, want ...string) {
		t.Helper()
		selectors, err := u.Attest(context.Background(), p)
		if err != nil {
			t.Fatal(err)
		}
		if got := pick(selectors, kind); !slices.Equal(got, want) {
			t.Errorf("%s: got %q, want %q", kind, got, want)
		}
	}
	want("unix:user") // no file
	want("unix:uid", fmt.Sprint(uid))
	writeFile(t, root+"/etc/passwd", fmt.Sprintf("ann:x:%d:0::/:/bin/sh\n", uid))
	writeFile(t, root+"/etc/group", fmt.Sprintf("crew:x:%d:\n", gid))
	want("unix:user", "ann")
	want("unix:group", "crew")
	writeFile(t, root+"/etc/passwd", fmt.Sprintf("bob:x:%d:0::/:/bin/sh\n", uid))
	want("unix:user", "bob")
	writeFile(t, root+"/etc/passwd", "other:x:4000000000:0::/:/bin/sh\n")
	want("unix:user")
}

func TestUnreadableNamesAreUnknown(t *testing.T) {
	b := newBench(t)
	p := b.open(cat(t, nil))
	root := t.TempDir()
	for _, name := range []string{"passwd", "group"} {
		if err := os.MkdirAll(filepath.Join(root, "etc", name), 0o755); err != nil { // no file
			t.Fatal(err)
		}
	}
	u := NewUnix(hostAt(t, root), b.executables, func() Demand { return Demand{} })
	selectors, err := u.Attest(context.Background(), p)
	var unknown *Unknown
	if !errors.As(err, &unknown) {
		t.Fatalf("got error %v, want an Unknown", err)
	}
	want := []string{"unix:user:", "unix:group:", "unix:supplementary_group:"}
	if diff := cmp.Diff(want, unknown.Prefixes); diff != "" {
		t.Errorf("unknown prefixes (-want +got):\n%s", diff)
	}
	if len(pick(selectors, "unix:uid")) != 1 || len(pick(selectors, "unix:gid")) != 1 {
		t.Errorf("got %v, want the numbers all the same", selectors)
	}
}

func TestParseAccounts(t *testing.T) {
	cases := []struct {
		name, file string
		want       map[uint32]string
	}{
		{"users", "root:x:0:0:root:/root:/bin/bash\nann:x:1000:1000::/home/ann:/bin/sh\n", map[uint32]string{0: "root", 1000: "ann"}},
		{"groups", "root:x:0:\nwheel:x:10:ann,bob\n", map[uint32]string{0: "root", 10: "wheel"}},
		{"no line break at the end", "ann:x:1:1:::", map[uint32]string{1: "ann"}},
		{"the first name of a number", "root:x:0:0:::\ntoor:x:0:0:::\n", map[uint32]string{0: "root"}},
		{"comments and NIS", "#ann:x:1:1:::\n+bob:x:2:2:::\n-eve:x:3:3:::\n+::::::\n", map[uint32]string{}},
		{"too few fields", "ann\nann:x\nann:x:1\n:x:1:1:::\n", map[uint32]string{}},
		{"no number", "a:x::1:::\nb:x:1x:1:::\nc:x:-1:1:::\nd:x:+1:1:::\ne:x: 1:1:::\nf:x:1_0:1:::\ng:x:0x1:1:::\n", map[uint32]string{}},
		{"number too large", "a:x:4294967296:1:::\nb:x:4294967295:1:::\nc:x:4294967294:1:::\n", map[uint32]string{4294967294: "c"}},
		{"name that is no text", "a\x00b:x:1:1:::\na b:x:2:1:::\na\xff:x:3:1:::\n", map[uint32]string{}},
		{"broken line between", "ann:x:1:1:::\n\n::::\nbob:x:2:2:::\n", map[uint32]string{1: "ann", 2: "bob"}},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			if diff := cmp.Diff(c.want, parseAccounts([]byte(c.file))); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		})
	}
}

func FuzzParseAccounts(f *testing.F) {
	f.Add([]byte("root:x:0:0:root:/root:/bin/bash\nann:x:1000:1000::/home/ann:/bin/sh\n"))
	f.Add([]byte("wheel:x:10:ann,bob\n+::::::\n#\n:::\n\xff:x:1:\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		names := parseAccounts(b)
		for id, name := range names {
			line := fmt.Sprintf("%s:", name)
			if !strings.Contains("\n"+string(b), "\n"+line) {
				t.Errorf("%d: name %q does not begin a line", id, name)
			}
			if !selectable("unix:user:" + name) {
				t.Errorf("%d: name %q is no selector", id, name)
			}
		}
		var again strings.Builder
		for id, name := range names {
			fmt.Fprintf(&again, "%s:x:%d:\n", name, id)
		}
		if got := parseAccounts([]byte(again.String())); !maps.Equal(got, names) {
			t.Errorf("read again: got %v, want %v", got, names)
		}
	})
}

// status as Linux 6.18 writes it, cut after what is read.
const status = `Name:	agent
Umask:	0022
State:	S (sleeping)
Tgid:	4711
Ngid:	0
Pid:	4711
PPid:	4710
TracerPid:	0
Uid:	1000	1001	1002	1003
Gid:	2000	2001	2002	2003
FDSize:	64
Groups:	27 100 2000 
NStgid:	4711	7
NSpid:	4711	7
`

func TestParseIdentity(t *testing.T) {
	cases := []struct {
		name, file string
		want       identity
		bad        bool
	}{
		{name: "effective IDs", file: status, want: identity{uid: 1001, gid: 2001, groups: []uint32{27, 100, 2000}}},
		{name: "no groups", file: "Uid:\t1\t1\t1\t1\nGid:\t2\t2\t2\t2\nGroups:\t \n", want: identity{uid: 1, gid: 2, groups: []uint32{}}},
		{name: "empty", file: "", bad: true},
		{name: "no Groups", file: "Uid:\t1\t1\t1\t1\nGid:\t2\t2\t2\t2\n", bad: true},
		{name: "Uid twice", file: "Uid:\t0\t0\t0\t0\n" + status, bad: true},
		{name: "three IDs", file: "Uid:\t1\t1\t1\nGid:\t2\t2\t2\t2\nGroups:\t\n", bad: true},
		{name: "no number", file: "Uid:\t1\tx\t1\t1\nGid:\t2\t2\t2\t2\nGroups:\t\n", bad: true},
		{name: "negative", file: "Uid:\t1\t-1\t1\t1\nGid:\t2\t2\t2\t2\nGroups:\t\n", bad: true},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			got, err := parseIdentity([]byte(c.file))
			if (err != nil) != c.bad {
				t.Fatalf("got error %v, want one: %v", err, c.bad)
			}
			if diff := cmp.Diff(c.want, got, cmp.AllowUnexported(identity{})); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		})
	}
}

func FuzzParseIdentity(f *testing.F) {
	f.Add([]byte(status))
	f.Add([]byte("Name:\tUid:\\n\nUid:\t1\t1\t1\t1\nGid:\t2\t2\t2\t2\nGroups:\t\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		id, err := parseIdentity(b)
		if err != nil {
			return
		}
		plain := fmt.Sprintf("Uid:\t9\t%d\t9\t9\nGid:\t9\t%d\t9\t9\nGroups:\t%s\n",
			id.uid, id.gid, strings.Trim(fmt.Sprint(id.groups), "[]"))
		again, err := parseIdentity([]byte(plain))
		if diff := cmp.Diff(id, again, cmp.AllowUnexported(identity{})); err != nil || diff != "" {
			t.Errorf("read again: error %v (-want +got):\n%s", err, diff)
		}
	})
}
