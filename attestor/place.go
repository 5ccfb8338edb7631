package attestor

import (
	"bytes"
	"errors"
	"fmt"
	"path"
	"slices"
	"strconv"
	"strings"
)

// A Place is where a process stands in the host's tree of control groups, and
// how much of that is evidence. Whoever may make a directory there may name it
// like a unit or a container; so a component counts only as long as root alone
// could have made it and put the process in.
type Place struct {
	Path    string // all of it, as the kernel writes it; "/" is the root
	Trusted string // the deepest directory on it that counts; "/" when none does
	FromV1  bool   // the names are (or would be) v1's: the v2 cgroup ID does not see them change

	// The outermost that count; zero where there is none.
	Container *ContainerRef
	Unit      string
	Slice     string

	// Owner is whose budget the process draws on: the outermost container, unit
	// or user slice that counts, else its real UID.
	Owner string
}

// A ContainerRef is a container as the kernel names it. Which container that
// is, and whether it runs, is for its runtime to say.
type ContainerRef struct {
	ID      string // 64 hexadecimal digits
	Runtime string // docker, containerd, podman or cri-o; "" where the directory does not tell
	Pod     string // UID of its Kubernetes pod; "" outside of Kubernetes
	Dir     string // the directory that carries the ID
	FromV1  bool   // Dir is of v1's hierarchy
}

// In reports whether the place is the container's directory or below it.
func (p Place) In(c *ContainerRef) bool {
	return p.FromV1 == c.FromV1 && (p.Path == c.Dir || strings.HasPrefix(p.Path, c.Dir+"/"))
}

// Ancestors returns the directories that count above the trusted one, outermost
// first, without the root.
func (p Place) Ancestors() []string {
	var up []string
	for i := 1; i < len(p.Trusted); i++ {
		if p.Trusted[i] == '/' {
			up = append(up, p.Trusted[:i])
		}
	}
	return up
}

// Whose a delegated directory is.
type delegation int

const (
	notDelegated    delegation = iota
	delegatedToUs              // to a UID that counts as root
	delegatedToSome            // to anybody else
)

// A directory is what the checks want to know of one cgroup directory.
type directory struct {
	closed    bool // only root may make directories in it
	guarded   bool // only root may write to the files in it that move processes
	delegated delegation
}

// directories looks at the directories of a hierarchy. v1 tells which; the path
// is absolute, below the root of what the daemon sees.
type directories interface {
	look(v1 bool, path string) (directory, error)
}

// placeIn works out the place from the text of /proc/PID/cgroup.
func placeIn(text []byte, dirs directories) (Place, error) {
	lines, err := parseCgroup(text)
	if err != nil {
		return Place{}, err
	}
	line, ok := lines.counting()
	if !ok {
		return Place{}, errors.New("no line of a v2 or name=systemd hierarchy")
	}
	if err := lines.agree(line); err != nil {
		return Place{}, err
	}
	return walk(line, dirs)
}

// walk follows the line's path from the root for as long as it can be trusted.
func walk(line cgroupLine, dirs directories) (Place, error) {
	place := Place{Path: line.path, Trusted: "/", FromV1: line.v1}
	if line.path == "/" {
		return place, nil
	}
	names := strings.Split(line.path[1:], "/")
	if line.v1 {
		// On v1 whoever may write to a directory's tasks gets in, from
		// anywhere: one such on the way, however deep, and nothing above it
		// says how the process came there.
		if kept, err := guarded(names, dirs); err != nil || !kept {
			return place, err
		}
	}
	parent, err := dirs.look(line.v1, "/")
	if err != nil {
		return Place{}, err
	}
	// On v2 who moves a process needs the right to write to cgroup.procs of the
	// common ancestor as well. So a directory's own files do not matter, and all
	// those above it do.
	for i, name := range names {
		if !parent.closed || !parent.guarded || !printable(name) {
			break
		}
		at := "/" + strings.Join(names[:i+1], "/")
		dir, err := dirs.look(line.v1, at)
		if err != nil {
			return Place{}, err
		}
		place.Trusted = at
		if c := containerAt(names[:i+1]); c != nil {
			c.Dir, c.FromV1 = at, line.v1
			place.Container = c
			place.own("container:" + c.ID)
			place.nameUnit(name) // docker-ID.scope is a unit as well
			break                // what is below is named inside of it
		}
		switch {
		case isSlice(name):
			if place.Slice == "" {
				place.Slice = name
			}
			if userSlice(name) {
				place.own("slice:" + name)
			}
		case unitName(name):
			place.nameUnit(name)
			place.own("unit:" + name)
		}
		switch dir.delegated {
		case delegatedToSome:
			return place, nil // what is below is named by whom it was given to
		case delegatedToUs:
			// Our own service manager's tree: the units that mean something
			// to its user are the ones below.
			place.Unit, place.Slice, place.Owner = "", "", ""
		}
		parent = dir
	}
	return place, nil
}

// guarded reports whether only root may enter any directory of a v1 path.
func guarded(names []string, dirs directories) (bool, error) {
	for i := range names {
		dir, err := dirs.look(true, "/"+strings.Join(names[:i+1], "/"))
		if err != nil || !dir.guarded {
			return false, err
		}
	}
	return true, nil
}

func (p *Place) own(by string) {
	if p.Owner == "" {
		p.Owner = by
	}
}

func (p *Place) nameUnit(name string) {
	if p.Unit == "" && unitName(name) {
		p.Unit = name
	}
}

// A cgroupLine is one line of /proc/PID/cgroup that is about a hierarchy.
type cgroupLine struct {
	v1   bool
	path string
}

type cgroupLines struct {
	unified, systemd string // paths; "" where there is no such line
	all              []string
}

// maxCgroupText bounds the file; a path in it is at most 4096 bytes long, and
// there are a dozen hierarchies.
const maxCgroupText = 128 << 10

// parseCgroup reads /proc/PID/cgroup, cgroups(7): "ID:CONTROLLERS:PATH". The
// kernel makes no cgroup with a line break in its name, so a line is a line;
// any other byte may be in one.
func parseCgroup(text []byte) (cgroupLines, error) {
	var lines cgroupLines
	if len(text) > maxCgroupText {
		return lines, fmt.Errorf("longer than %d bytes", maxCgroupText)
	}
	if !bytes.HasSuffix(text, []byte("\n")) {
		return lines, errors.New("cut off")
	}
	seen := make(map[string]bool)
	for line := range strings.Lines(string(text)) {
		line = strings.TrimSuffix(line, "\n")
		id, rest, _ := strings.Cut(line, ":")
		controllers, at, ok := strings.Cut(rest, ":")
		n, err := strconv.ParseUint(id, 10, 31)
		switch {
		case !ok || err != nil || id != strconv.FormatUint(n, 10):
			return cgroupLines{}, fmt.Errorf("line %q is not ID:CONTROLLERS:PATH", line)
		case seen[id]:
			return cgroupLines{}, fmt.Errorf("hierarchy %s comes twice", id)
		case (n == 0) != (controllers == ""):
			return cgroupLines{}, fmt.Errorf("line %q names no hierarchy", line)
		}
		seen[id] = true
		if err := checkCgroupPath(at); err != nil {
			return cgroupLines{}, err
		}
		lines.all = append(lines.all, at)
		switch controllers {
		case "":
			lines.unified = at
		case "name=systemd":
			if lines.systemd != "" {
				return cgroupLines{}, errors.New("hierarchy name=systemd comes twice")
			}
			lines.systemd = at
		}
	}
	return lines, nil
}

func checkCgroupPath(at string) error {
	switch {
	case !strings.HasPrefix(at, "/"):
		return fmt.Errorf("path %q is not absolute", at)
	case at == "/":
		return nil
	}
	for name := range strings.SplitSeq(at[1:], "/") {
		switch name {
		case "..":
			// The kernel writes this for what is outside of the reader's namespace.
			return fmt.Errorf("path %q is outside of this cgroup namespace; run deputy with the cgroup namespace of the host", at)
		case "", ".":
			return fmt.Errorf("path %q is not clean", at)
		}
	}
	return nil
}

// counting returns the line whose names count: v2's unless the process is in
// its root, as on a host where systemd or the runtime still uses v1 alone.
func (l cgroupLines) counting() (cgroupLine, bool) {
	switch {
	case l.unified != "" && l.unified != "/", l.unified != "" && l.systemd == "":
		return cgroupLine{path: l.unified}, true
	case l.systemd != "":
		return cgroupLine{v1: true, path: l.systemd}, true
	}
	return cgroupLine{}, false
}

// agree refuses a process whose lines name different containers, or one that
// the counting line leaves out: runtimes put a container into one place in all
// hierarchies, and which of two to believe would be a guess.
func (l cgroupLines) agree(counting cgroupLine) error {
	want := containerID(counting.path)
	for _, at := range l.all {
		if id := containerID(at); id != "" && id != want {
			return fmt.Errorf("lines disagree about the container: %q and %q", counting.path, at)
		}
	}
	return nil
}

// containerID returns the ID of the outermost container that a path names.
func containerID(at string) string {
	names := strings.Split(at[1:], "/")
	for i := range names {
		if c := containerAt(names[:i+1]); c != nil {
			return c.ID
		}
	}
	return ""
}

// scopes are the prefixes that runtimes put before an ID under systemd, and
// some without it.
var scopes = []struct{ prefix, runtime string }{
	{"docker-", "docker"},
	{"cri-containerd-", "containerd"},
	{"nerdctl-", "containerd"},
	{"crio-", "cri-o"},
	{"libpod-", "podman"},
}

// containerAt returns the container whose directory the last name is, if the
// name is one that runtimes give: an ID of 64 hexadecimal digits, alone or
// after a runtime's prefix. Other names, as containerd's own clients choose
// them, tell nothing.
func containerAt(names []string) *ContainerRef {
	name := names[len(names)-1]
	id, runtime := strings.TrimSuffix(name, ".scope"), ""
	for _, s := range scopes {
		if rest, ok := strings.CutPrefix(id, s.prefix); ok {
			id, runtime = rest, s.runtime
			break
		}
	}
	if !hexID(id) || runtime == "" && id != name {
		return nil
	}
	c := &ContainerRef{ID: id, Runtime: runtime}
	if len(names) > 1 {
		above := names[len(names)-2]
		if above == "docker" && runtime == "" {
			c.Runtime = "docker"
		}
		if slices.ContainsFunc(names[:len(names)-1], func(n string) bool { return n == "kubepods" || n == "kubepods.slice" }) {
			c.Pod = podUID(above)
		}
	}
	return c
}

// podUID reads a pod's directory: podUID under cgroupfs, under systemd
// kubepods-QOS-podUID.slice with the dashes of the UID written as underscores.
func podUID(name string) string {
	if uid, ok := strings.CutPrefix(name, "pod"); ok {
		return uid
	}
	slice, ok := strings.CutSuffix(name, ".slice")
	i := strings.LastIndex(slice, "-pod")
	if !ok || i < 0 {
		return ""
	}
	return strings.ReplaceAll(slice[i+len("-pod"):], "_", "-")
}

func hexID(s string) bool {
	return len(s) == 64 && strings.Trim(s, "0123456789abcdef") == ""
}

// unitName reports whether systemd may call a unit so that has processes.
func unitName(name string) bool {
	switch path.Ext(name) {
	case ".service", ".scope", ".socket", ".mount", ".swap":
		return len(name) > len(path.Ext(name)) && len(name) < 256 && strings.Trim(name, unitChars) == ""
	}
	return false
}

// unitChars are those of systemd.unit(5).
const unitChars = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789:-_.\\@"

// userSlice reports whether the name is of the slice that systemd-logind makes
// for one user.
func userSlice(name string) bool {
	uid, ok := strings.CutPrefix(strings.TrimSuffix(name, ".slice"), "user-")
	return ok && uid != "" && strings.Trim(uid, "0123456789") == ""
}

// printable reports whether the name can stand in a selector.
func printable(name string) bool {
	_, err := ParseSelector("cgroup:" + name)
	return err == nil
}
