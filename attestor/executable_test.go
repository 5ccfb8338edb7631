package attestor

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func digestOfFile(t *testing.T, path string) string {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:])
}

func TestPathIsTheFilesNameOnTheHost(t *testing.T) {
	b := newBench(t)
	b.demand.ExecutableDigest = true
	path := copyTo(t, filepath.Join(t.TempDir(), "agent"))
	p := b.open(start(t, path, nil).self)
	b.want(p, "unix:path", path)
	b.want(p, "unix:sha256", digestOfFile(t, path))
}

func TestCopyElsewhereHasItsOwnPath(t *testing.T) {
	b := newBench(t)
	dir := t.TempDir()
	copyTo(t, filepath.Join(dir, "agent"))
	other := copyTo(t, filepath.Join(dir, "copy"))
	b.want(b.open(start(t, other, nil).self), "unix:path", other)
}

func TestPathSurvivesUpgrade(t *testing.T) {
	upgrades := map[string]func(t *testing.T, path string){
		"renamed over": func(t *testing.T, path string) {
			if err := os.Rename(copyTo(t, path+".new"), path); err != nil {
				t.Fatal(err)
			}
		},
		"moved aside": func(t *testing.T, path string) {
			if err := os.Rename(path, path+".old"); err != nil {
				t.Fatal(err)
			}
			copyTo(t, path)
		},
		"removed": func(t *testing.T, path string) {
			if err := os.Remove(path); err != nil {
				t.Fatal(err)
			}
		},
	}
	for name, upgrade := range upgrades {
		t.Run(name, func(t *testing.T) {
			b := newBench(t)
			path := copyTo(t, filepath.Join(t.TempDir(), "agent"))
			p := b.open(start(t, path, nil).self)
			b.want(p, "unix:path", path)
			upgrade(t, path)
			b.want(p, "unix:path", path)
		})
	}
}

func TestPathSurvivesUpgradeBetweenConnections(t *testing.T) {
	b := newBench(t)
	path := copyTo(t, filepath.Join(t.TempDir(), "agent"))
	pid := start(t, path, nil).self
	b.want(b.open(pid), "unix:path", path)
	b.table = b.newTable() // which pins it anew
	if err := os.Rename(copyTo(t, path+".new"), path); err != nil {
		t.Fatal(err)
	}
	b.want(b.open(pid), "unix:path", path)
}

func TestPathIsNotRememberedFromAnotherProgram(t *testing.T) {
	b := newBench(t)
	dir := t.TempDir()
	first := copyTo(t, filepath.Join(dir, "first"))
	second := copyTo(t, filepath.Join(dir, "second"))
	r := start(t, first, nil)
	p := b.open(r.self)
	b.want(p, "unix:path", first)
	r.tell("exec %s", second)
	b.want(p, "unix:path", second)
	if err := os.Remove(second); err != nil {
		t.Fatal(err)
	}
	b.want(p, "unix:path", second)
	r.tell("exec /proc/self/exe") // the file has no name any more, and this is another run of it
	b.want(p, "unix:path")
}

func TestPathAndDigestAreOfOneProgram(t *testing.T) {
	b := newBench(t)
	dir := t.TempDir()
	digests := make(map[string]string)
	for _, name := range []string{"first", "second"} {
		path := copyTo(t, filepath.Join(dir, name))
		f, err := os.OpenFile(path, os.O_APPEND|os.O_WRONLY, 0)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := f.WriteString(name); err != nil {
			t.Fatal(err)
		}
		f.Close()
		digests[path] = digestOfFile(t, path)
	}
	r := start(t, filepath.Join(dir, "first"), nil)
	p := b.open(r.self)
	u := NewUnix(b.host, b.executables, nil)
	stop := make(chan struct{})
	var wg sync.WaitGroup
	for range 3 {
		wg.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				selectors, err := u.Attest(context.Background(), p)
				if errors.Is(err, ErrGone) {
					t.Errorf("got %v for a living process", err)
					return
				}
				path, sum := pick(selectors, "unix:path"), pick(selectors, "unix:sha256")
				if len(path) == 0 || len(sum) == 0 {
					continue
				}
				if digests[path[0]] != sum[0] {
					t.Errorf("path %q has the digest of another program", path[0])
				}
			}
		})
	}
	for i := range 20 {
		r.tell("exec %s", filepath.Join(dir, []string{"second", "first"}[i%2]))
	}
	close(stop)
	wg.Wait()
	last := filepath.Join(dir, "first")
	b.want(p, "unix:path", last)
	b.demand.ExecutableDigest = true
	b.want(p, "unix:sha256", digests[last])
}

func TestNeverConfirmedPathOfDeletedFileIsNone(t *testing.T) {
	b := newBench(t)
	path := copyTo(t, filepath.Join(t.TempDir(), "agent"))
	r := start(t, path, nil)
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	copyTo(t, path) // the name is there, but names another file
	b.want(b.open(r.self), "unix:path")
}

func TestFileCalledDeletedIsItself(t *testing.T) {
	b := newBench(t)
	path := copyTo(t, filepath.Join(t.TempDir(), "agent (deleted)"))
	b.want(b.open(start(t, path, nil).self), "unix:path", path)
}

func TestPathThatIsNoSelectorIsNone(t *testing.T) {
	b := newBench(t)
	for _, name := range []string{"a\nb", "a\xffb", "a\x1bb"} {
		path := copyTo(t, filepath.Join(t.TempDir(), name))
		b.want(b.open(start(t, path, nil).self), "unix:path")
	}
}

func TestProgramMountedOverAnotherHasNoPath(t *testing.T) {
	needRoot(t)
	namespaces := map[string]*syscall.SysProcAttr{
		"made by root": {Unshareflags: syscall.CLONE_NEWNS},
		"in an unprivileged user namespace": {
			Cloneflags:  syscall.CLONE_NEWUSER | syscall.CLONE_NEWNS,
			UidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: 0, Size: 1}},
			GidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: 0, Size: 1}},
		},
	}
	for name, attr := range namespaces {
		t.Run(name, func(t *testing.T) {
			b := newBench(t)
			b.demand.ExecutableDigest = true
			dir := t.TempDir()
			evil := copyTo(t, filepath.Join(dir, "evil"))
			trusted := copyTo(t, filepath.Join(dir, "trusted"))
			r := start(t, evil, attr)
			r.tell("bind %s %s", evil, trusted)
			r.tell("exec %s", trusted)
			p := b.open(r.self)
			if link, err := p.Readlink("exe"); link != trusted {
				t.Fatalf("the kernel calls it %q (%v), so nothing is tested; want %q", link, err, trusted)
			}
			b.want(p, "unix:path")
			if attr.Cloneflags != 0 {
				b.want(p, "unix:sha256")
			} else {
				b.want(p, "unix:sha256", digestOfFile(t, evil))
			}
		})
	}
}

func TestSameFileInAnotherMountNamespaceHasItsPath(t *testing.T) {
	needRoot(t)
	b := newBench(t)
	path := copyTo(t, filepath.Join(t.TempDir(), "agent"))
	b.want(b.open(start(t, path, &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS}).self), "unix:path", path)
}

func TestForeignUserNamespaceHasNeitherPathNorDigest(t *testing.T) {
	needRoot(t)
	b := newBench(t)
	b.demand.ExecutableDigest = true
	pid := cat(t, &syscall.SysProcAttr{
		Cloneflags:  syscall.CLONE_NEWUSER,
		UidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: 1000, Size: 1}},
		GidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: 1000, Size: 1}},
		Credential:  &syscall.Credential{Uid: 0, Gid: 0, NoSetGroups: true},
	})
	p := b.open(pid)
	b.want(p, "unix:uid", "1000")
	b.want(p, "unix:path")
	b.want(p, "unix:sha256")
}

func TestDigestOnlyOnDemand(t *testing.T) {
	b := newBench(t)
	p := b.open(cat(t, nil))
	b.want(p, "unix:sha256")
	b.demand.ExecutableDigest = true
	b.want(p, "unix:sha256", digestOfFile(t, "/usr/bin/cat"))
}

// planted is a digest that no file has: where it comes out, none was read.
var planted = [sha256.Size]byte{1, 2, 3}

func TestDigestOfRootsFileIsSharedBetweenProcesses(t *testing.T) {
	needRoot(t)
	b := newBench(t)
	b.demand.ExecutableDigest = true
	b.want(b.open(cat(t, nil)), "unix:sha256", digestOfFile(t, "/usr/bin/cat"))
	var st unix.Stat_t
	if err := unix.Stat("/usr/bin/cat", &st); err != nil {
		t.Fatal(err)
	}
	if _, ok := b.executables.shared.load(versionOf(&st)); !ok {
		t.Fatal("digest of /usr/bin/cat is not kept for others")
	}
	b.executables.shared.store(versionOf(&st), planted)
	b.want(b.open(cat(t, nil)), "unix:sha256", hex.EncodeToString(planted[:]))
}

func TestDigestOnTmpfsIsNotShared(t *testing.T) {
	needRoot(t)
	b := newBench(t)
	b.demand.ExecutableDigest = true
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Unmount(dir, unix.MNT_DETACH) })
	path := copyTo(t, filepath.Join(dir, "agent"))
	p := b.open(start(t, path, nil).self)
	b.want(p, "unix:sha256", digestOfFile(t, path))
	if n := b.executables.shared.used.Len(); n != 0 {
		t.Errorf("got %d shared digests, want none", n)
	}
	// Once per process all the same.
	im := b.executables.images[p.ID()]
	first := im.digest
	b.want(p, "unix:sha256", digestOfFile(t, path))
	if im.digest != first {
		t.Error("the file was read twice for one process")
	}
}

func TestShareable(t *testing.T) {
	now := time.Unix(2_000_000_000, 0)
	good := unix.Stat_t{Mode: unix.S_IFREG | 0o755, Ctim: unix.Timespec{Sec: now.Unix() - 3}}
	disk := unix.Statfs_t{Type: unix.EXT4_SUPER_MAGIC}
	cases := []struct {
		name string
		edit func(*unix.Stat_t, *unix.Statfs_t)
		want bool
	}{
		{"root's on ext4", func(*unix.Stat_t, *unix.Statfs_t) {}, true},
		{"root's on xfs", func(_ *unix.Stat_t, fs *unix.Statfs_t) { fs.Type = unix.XFS_SUPER_MAGIC }, true},
		{"set-user-ID", func(st *unix.Stat_t, _ *unix.Statfs_t) { st.Mode |= 0o4000 }, true},
		{"of another user", func(st *unix.Stat_t, _ *unix.Statfs_t) { st.Uid = 1000 }, false},
		{"group may write", func(st *unix.Stat_t, _ *unix.Statfs_t) { st.Mode |= 0o020 }, false},
		{"others may write", func(st *unix.Stat_t, _ *unix.Statfs_t) { st.Mode |= 0o002 }, false},
		{"no file", func(st *unix.Stat_t, _ *unix.Statfs_t) { st.Mode = unix.S_IFDIR | 0o755 }, false},
		{"changed a second ago", func(st *unix.Stat_t, _ *unix.Statfs_t) { st.Ctim.Sec = now.Unix() - 1 }, false},
		{"changed in the future", func(st *unix.Stat_t, _ *unix.Statfs_t) { st.Ctim.Sec = now.Unix() + 9 }, false},
		{"on tmpfs", func(_ *unix.Stat_t, fs *unix.Statfs_t) { fs.Type = unix.TMPFS_MAGIC }, false},
		{"on overlayfs", func(_ *unix.Stat_t, fs *unix.Statfs_t) { fs.Type = unix.OVERLAYFS_SUPER_MAGIC }, false},
		{"on NFS", func(_ *unix.Stat_t, fs *unix.Statfs_t) { fs.Type = unix.NFS_SUPER_MAGIC }, false},
		{"on FUSE", func(_ *unix.Stat_t, fs *unix.Statfs_t) { fs.Type = unix.FUSE_SUPER_MAGIC }, false},
		{"on a user's disk", func(_ *unix.Stat_t, fs *unix.Statfs_t) { fs.Flags = unix.ST_NOSUID }, false},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			st, fs := good, disk
			c.edit(&st, &fs)
			if got := shareable(&st, &fs, now); got != c.want {
				t.Errorf("got %v, want %v", got, c.want)
			}
		})
	}
}

func TestTooLargeExecutableHasNoDigest(t *testing.T) {
	st, err := os.Stat("/usr/bin/cat")
	if err != nil {
		t.Fatal(err)
	}
	b := newBench(t)
	b.demand.ExecutableDigest = true
	p := b.open(cat(t, nil))
	b.executables = NewExecutables(b.host, st.Size()-1)
	b.want(p, "unix:sha256")
	b.want(p, "unix:path", "/usr/bin/cat")
	b.executables = NewExecutables(b.host, st.Size())
	b.want(p, "unix:sha256", digestOfFile(t, "/usr/bin/cat"))
}

func TestDigestThatTakesTooLongIsUnknownAndGoesOn(t *testing.T) {
	b := newBench(t)
	p := b.open(cat(t, nil))
	b.want(p, "unix:path", "/usr/bin/cat")
	b.demand.ExecutableDigest = true

	leave, err := b.executables.hashes.enter(context.Background(), client(p))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	selectors, err := NewUnix(b.host, b.executables, nil).Attest(ctx, p)
	var unknown *Unknown
	if !errors.As(err, &unknown) || !slices.Equal(unknown.Prefixes, []string{"unix:sha256:"}) {
		t.Errorf("got error %#v, want unix:sha256: unknown", err)
	}
	if got := pick(selectors, "unix:path"); !slices.Equal(got, []string{"/usr/bin/cat"}) {
		t.Errorf("path beside it: got %q, want /usr/bin/cat", got)
	}
	im := b.executables.images[p.ID()]
	running := im.digest
	leave()
	b.want(p, "unix:sha256", digestOfFile(t, "/usr/bin/cat"))
	if im.digest != running {
		t.Error("the reading was started again, want the one under way")
	}
}

func TestExecutableOfEndedProcessIsGone(t *testing.T) {
	b := newBench(t)
	r := start(t, copyTo(t, filepath.Join(t.TempDir(), "agent")), nil)
	p := b.open(r.self)
	b.want(p, "unix:uid", decimal(uint32(os.Geteuid())))
	if err := unix.Kill(r.self, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	<-p.Done()
	for _, a := range []Attestor{
		NewUnix(b.host, b.executables, nil),
		NewProcess(b.table, b.host, b.executables, nil),
	} {
		if _, err := a.Attest(context.Background(), p); !errors.Is(err, ErrGone) {
			t.Errorf("%T: got %v, want %v", a, err, ErrGone)
		}
	}
}

func TestImagesOfEndedProcessesAreDropped(t *testing.T) {
	b := newBench(t)
	r := start(t, copyTo(t, filepath.Join(t.TempDir(), "agent")), nil)
	ended, alive := b.open(r.self), b.open(cat(t, nil))
	b.values(ended, "unix:path")
	b.values(alive, "unix:path")
	if err := unix.Kill(r.self, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	<-ended.Done()
	var ws syscall.WaitStatus
	syscall.Wait4(r.self, &ws, 0, nil)
	b.executables.mu.Lock()
	b.executables.dropEnded()
	b.executables.mu.Unlock()
	if _, ok := b.executables.images[ended.ID()]; ok {
		t.Error("what was known of the ended process is still kept")
	}
	b.want(alive, "unix:path", "/usr/bin/cat")
	if len(b.executables.images) != 1 {
		t.Errorf("got %d images, want that of the living one", len(b.executables.images))
	}
}
