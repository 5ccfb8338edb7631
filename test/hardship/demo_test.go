package hardship

import (
	"bytes"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/deputy-id/deputy/test/binary"
	"github.com/deputy-id/deputy/test/need"
	"github.com/deputy-id/deputy/test/process"
	"github.com/deputy-id/deputy/test/scratch"
)

// A show is the demonstration in a directory of its own.
type show struct {
	dir string
	cmd *exec.Cmd
	*process.Process
}

// newShow gives the demonstration a home and a place for temporary files, in
// which this user may write. With a wrap it is started by that.
func newShow(t *testing.T, uid uint32, wrap ...string) *show {
	t.Helper()
	binary.Deputy(t)
	demo := binary.Program(t, "test/demo") // beside it
	dir := scratch.Dir(t)
	if err := os.Chown(dir, int(uid), int(uid)); err != nil {
		t.Fatal(err)
	}
	s := &show{dir: dir}
	args := append(wrap, demo)
	s.cmd = exec.Command(args[0], args[1:]...)
	s.cmd.Env = []string{"PATH=/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin", "HOME=" + dir, "TMPDIR=" + dir}
	s.cmd.Dir = dir
	s.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if os.Geteuid() == 0 {
		s.cmd.SysProcAttr.Credential = &syscall.Credential{Uid: uid, Gid: uid}
	}
	return s
}

// leavesNothing wants no file, mount, cgroup or process to be left of it.
func (s *show) leavesNothing(t *testing.T) {
	t.Helper()
	left, err := os.ReadDir(s.dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range left {
		t.Errorf("%s is left in its directory", l.Name())
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(mounts)) {
		if strings.Contains(line, s.dir) {
			t.Errorf("mounted still: %s", line)
		}
	}
	// It has its name from its directory.
	for _, pattern := range []string{"/sys/fs/cgroup/deputy-demo-*", "/sys/fs/cgroup/*/deputy-demo-*"} {
		groups, err := filepath.Glob(pattern)
		if err != nil {
			t.Fatal(err)
		}
		for _, g := range groups {
			if strings.Contains(s.Log(), filepath.Base(g)) {
				t.Errorf("the cgroup %s is left", g)
			}
		}
	}
	all, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range all {
		if text, err := os.ReadFile(path); err == nil && bytes.Contains(text, []byte(s.dir)) {
			t.Errorf("%s runs still: %q", filepath.Dir(path), bytes.ReplaceAll(text, []byte{0}, []byte{' '}))
		}
	}
}

// finishes wants it to end well, within the minute.
func (s *show) finishes(t *testing.T, wants ...string) {
	t.Helper()
	begin := time.Now()
	s.Process = process.Start(t, s.cmd)
	<-s.Done()
	if err := s.Wait(t); err != nil {
		t.Fatal(err)
	}
	if took := time.Since(begin); took > time.Minute {
		t.Errorf("it took %s", took)
	}
	for _, want := range wants {
		if !strings.Contains(s.Log(), want) {
			t.Errorf("got no %q", want)
		}
	}
}

const lastWords = "That was all"

func TestDemonstrationOfAnOrdinaryUser(t *testing.T) {
	need.Root(t, "other users")
	t.Parallel()
	s := newShow(t, 61013)
	s.finishes(t, "Without root", "mTLS with", "PermissionDenied", lastWords)
	s.leavesNothing(t)
}

// withoutEngine hides Docker's daemon behind a program that only fails.
var withoutEngine = []string{"unshare", "--mount", "--propagation", "private", "sh", "-c",
	`for d in /usr/bin/dockerd /usr/sbin/dockerd; do [ ! -e $d ] || mount --bind /bin/false $d || exit 9; done; exec "$0" "$@"`}

func TestDemonstrationWithoutAnEngine(t *testing.T) {
	need.Root(t, "other users, and an engine")
	t.Parallel()
	s := newShow(t, 0, withoutEngine...)
	s.finishes(t, "goes on without the container", "mTLS with", "PermissionDenied", lastWords)
	s.leavesNothing(t)
}

// Ctrl-C reaches the whole process group of a terminal, at any time.
func TestDemonstrationInterrupted(t *testing.T) {
	need.Root(t, "other users, and an engine")
	t.Parallel()
	for scene, at := range map[string]struct {
		line string
		by   []string
	}{
		"while the engine starts":  {"1. A container engine", nil},
		"while the daemon starts":  {"2. The daemon starts", withoutEngine},
		"while the agents speak":   {"4. The planner calls", withoutEngine},
		"while the container runs": {"6. The crawler runs", nil},
		"while it waits":           {"7. Meanwhile", withoutEngine},
	} {
		t.Run(scene, func(t *testing.T) {
			t.Parallel()
			s := newShow(t, 0, at.by...)
			s.Process = process.Start(t, s.cmd)
			s.Says(t, "\n"+at.line)
			if err := syscall.Kill(-s.PID(), syscall.SIGINT); err != nil {
				t.Fatal(err)
			}
			err := s.Wait(t)
			var exit *exec.ExitError
			if !errors.As(err, &exit) || exit.ExitCode() != 130 {
				t.Errorf("got %v, want status 130", err)
			}
			if strings.Contains(s.Log(), lastWords) {
				t.Error("it played on to the end")
			}
			s.leavesNothing(t)
		})
	}
}
