package attestor

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"path"
	"strings"

	"github.com/deputy-id/deputy/attestor/peer"
)

// maxAncestors bounds the walk towards the first process.
const maxAncestors = 32

// errMoved says that the lineage changed while it was read.
var errMoved = errors.New("process was given another parent meanwhile")

// An ancestor is a process above the attested one and what it runs.
type ancestor struct {
	process *peer.Process
	executable
}

// lineage returns the ancestors of p from its parent upwards, as far as they
// say something: up to the first that takes in orphans, which is left out with
// all above it. A process whose parent died before it stands below whoever took
// it in, and that is nobody's choice. The digest is that of the parent alone.
func lineage(ctx context.Context, table *peer.Table, executables *Executables, p *peer.Process, digest bool) ([]ancestor, error) {
	const tries = 3 // a parent may exit while we look
	var up []ancestor
	var err error
	for range tries {
		up, err = climb(ctx, table, executables, p, digest)
		for _, a := range up {
			a.process.Close()
		}
		switch {
		case err == nil:
			return up, nil
		case errors.Is(err, peer.ErrGone):
			// Whoever it was: if it was the process itself, its caller will see.
		case !errors.Is(err, errMoved):
			return nil, fmt.Errorf("read lineage of %d: %w", p.PID(), err)
		}
	}
	return nil, fmt.Errorf("read lineage of %d: %w", p.PID(), err)
}

// climb is one try at lineage. What it returns is still pinned, also beside an error.
func climb(ctx context.Context, table *peer.Table, executables *Executables, p *peer.Process, digest bool) ([]ancestor, error) {
	var up []ancestor
	for child := p; len(up) < maxAncestors; {
		parent, err := openParent(table, child)
		if err != nil {
			return up, err
		}
		if parent == nil {
			break
		}
		up = append(up, ancestor{process: parent})
		stop, err := adopts(parent)
		if err != nil {
			return up, err
		}
		if stop {
			parent.Close()
			up = up[:len(up)-1]
			break
		}
		if up[len(up)-1].executable, err = executables.look(ctx, parent, digest && child == p); err != nil {
			return up, err
		}
		child = parent
	}
	// All of it has to have held at one time: from when the last was pinned
	// until now, when none has another parent.
	child := p
	for _, a := range up {
		if err := isChild(child, a.process); err != nil {
			return up, err
		}
		child = a.process
	}
	return up, nil
}

// openParent pins the parent of a process. It is nil if there is none to be
// seen: of a kernel thread, or one outside our PID namespace.
func openParent(table *peer.Table, child *peer.Process) (*peer.Process, error) {
	info, err := child.Info()
	if err != nil || info.PPID == 0 {
		return nil, err
	}
	parent, err := table.Open(info.PPID)
	if err != nil {
		return nil, err
	}
	if err := isChild(child, parent); err != nil {
		parent.Close()
		return nil, err
	}
	return parent, nil
}

// isChild returns nil if parent, which is pinned, is the child's parent now.
// The number alone could be another process's: it is not while its owner lives.
func isChild(child, parent *peer.Process) error {
	info, err := child.Info()
	switch {
	case err != nil:
		return err
	case info.PPID != parent.PID(), parent.StartTime() > child.StartTime():
		return errMoved
	}
	return parent.Alive()
}

// adopters are the programs that make themselves the parent of orphans below
// them (PR_SET_CHILD_SUBREAPER), by the first part of their file's name. The
// kernel tells nobody but the process itself that it did, and a program that is
// missing here is believed to be the parent it seems to be. What is named here
// is refused wherever the file lies: refusing needs no proof.
var adopters = []string{
	"systemd", "init", "upstart", "runit", "runsv", "s6-", "openrc", "procd", "launchd", "dinit", // service managers
	"containerd", "dockerd", "docker", "conmon", "crio", "podman", "runc", "crun", "youki", "kata", "lxc", "buildkitd", // runtimes and shims
	"tini", "dumb-init", "catatonit", "pause", "bwrap", "firejail", // small inits
	"nomad", "slurmstepd", "condor_", "bazel", "process-wrapper",
}

// adopts reports whether the process is known to be given orphans: the first
// of its PID namespace, a service manager, a shim or a subreaper; or whether it
// is one of which nothing can be known.
func adopts(p *peer.Process) (bool, error) {
	status, err := p.ReadFile("status")
	if err != nil {
		return true, err
	}
	if firstOfNamespace(status) {
		return true, nil
	}
	switch foreign, err := p.ForeignUserNamespace(); {
	case errors.Is(err, fs.ErrPermission):
		return true, nil // we are no root, and it is another user's
	case foreign || err != nil:
		return true, err
	}
	link, err := p.Readlink("exe")
	if err != nil {
		return true, err
	}
	return adopter(link), nil
}

// adopter reports whether a file of this name adopts.
func adopter(link string) bool {
	name := path.Base(strings.TrimSuffix(link, deleted))
	for _, a := range adopters {
		if strings.HasPrefix(name, a) {
			return true
		}
	}
	return false
}

// firstOfNamespace reports whether the status is that of the first process of
// its PID namespace, or does not say.
func firstOfNamespace(status []byte) bool {
	for line := range bytes.Lines(status) {
		key, value, _ := bytes.Cut(line, []byte(":"))
		if string(key) != "NSpid" {
			continue
		}
		numbers := bytes.Fields(value) // from our namespace down to its own
		return len(numbers) == 0 || string(numbers[len(numbers)-1]) == "1"
	}
	return true
}
