package endpoint

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	"google.golang.org/grpc/codes"

	"github.com/deputy-id/deputy/attestor"
	"github.com/deputy-id/deputy/attestor/peer"
	"github.com/deputy-id/deputy/svid/local"
)

// A connection belongs to the program that opened it, although the next one
// of the same process inherits it.
func TestConnectionEndsWhenItsProcessExecutesAnotherProgram(t *testing.T) {
	w := start(t)
	w.entry("/a", nil, mine)
	p := w.run("exec:" + w.socket)
	p.says(t, "[/a]")
	p.says(t, "executed") // with the connection still open
	w.entry("/b", nil, mine)
	eventually(t, "the stream ends", func() bool { return w.budget.streams.Load() == 0 })
	eventually(t, "the connection ends", func() bool {
		w.budget.mu.Lock()
		defer w.budget.mu.Unlock()
		return w.budget.conns == 0
	})
}

// Nor is what the next program says heard as the rest of what the one before
// began.
func TestRequestOfAnAdministratorIsOfOneProgram(t *testing.T) {
	w := start(t)
	w.run("half:"+w.admin).says(t, peer.ErrProgramChanged.Error())
	if set, _ := w.Registry.Set(); len(set.Entries()) > 0 {
		t.Errorf("got %d entries, want none", len(set.Entries()))
	}
}

func TestWhoMayAdminister(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Fatal("this test starts processes of other users and in other namespaces: it needs root")
	}
	const uid, gid = 12345, 12346
	as := func(groups ...uint32) *syscall.SysProcAttr {
		return &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: uid, Groups: groups}}
	}
	contained := &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS}
	rootOfNamespace := &syscall.SysProcAttr{
		Cloneflags:  syscall.CLONE_NEWUSER,
		UidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: 0, Size: 1}},
		GidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: 0, Size: 1}},
	}
	for _, c := range []struct {
		name  string
		group int
		attr  *syscall.SysProcAttr
		host  bool
		want  codes.Code
	}{
		{"root", -1, nil, false, codes.OK},
		{"a user", -1, as(), false, codes.PermissionDenied},
		{"a user of another group", gid, as(1), false, codes.PermissionDenied},
		{"a member of the group", gid, as(1, gid), false, codes.OK},
		{"a member of a group with no group configured", -1, as(gid), false, codes.PermissionDenied},
		{"root in a mount namespace of its own", -1, contained, false, codes.PermissionDenied},
		{"root in a mount namespace of its own, on the host as attested", -1, contained, true, codes.OK},
		{"root of a user namespace", -1, rootOfNamespace, true, codes.PermissionDenied},
	} {
		t.Run(c.name, func(t *testing.T) {
			w := start(t, func(cfg *Config, _ *local.Options) { cfg.AdminGroup = c.group })
			for dir := filepath.Dir(w.admin); dir != filepath.Clean(os.TempDir()); dir = filepath.Dir(dir) {
				passable(t, dir)
			}
			if c.host {
				w.evidence.set(func(ev *attestor.Evidence) { ev.Selectors = append(ev.Selectors, onHost) })
			}
			p := w.runAs(c.attr, "count:"+w.admin)
			p.says(t, c.want.String())
			if refused := strings.Contains(w.log.String(), "administrator refused"); refused != (c.want != codes.OK) {
				t.Errorf("refusal in the log: %v", refused)
			}
		})
	}
}

// passable lets other users through a directory of the test.
func passable(t *testing.T, dir string) {
	t.Helper()
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
}

// count is what the process of TestWhoMayAdminister does.
func count(api entryv1.EntryClient) error {
	_, err := api.CountEntries(context.Background(), &entryv1.CountEntriesRequest{})
	return err
}
