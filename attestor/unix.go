package attestor

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"strconv"

	"github.com/deputy-id/deputy/attestor/peer"
)

// Unix attests what every process has: its effective user and group, its
// supplementary groups, and the file it runs. The selectors are spelled as
// SPIRE spells them. Names come from the host's /etc/passwd and /etc/group
// alone; a number without a name there has no selector for it.
type Unix struct {
	executables   *Executables
	demand        func() Demand
	users, groups accounts
}

// NewUnix returns the attestor. demand is asked each time whether a digest is
// wanted; nil wants it.
func NewUnix(host *Host, executables *Executables, demand func() Demand) *Unix {
	return &Unix{
		executables: executables,
		demand:      orAll(demand),
		users:       accounts{path: "/etc/passwd", host: host},
		groups:      accounts{path: "/etc/group", host: host},
	}
}

// orAll stands in for a demand that is nil.
func orAll(demand func() Demand) func() Demand {
	if demand != nil {
		return demand
	}
	return func() Demand { return Demand{ExecutableDigest: true, ParentDigest: true} }
}

// Source is the attestor with the prefixes of what it gives.
func (u *Unix) Source() Source {
	return Source{Name: "unix", Prefixes: []string{"unix:"}, Attestor: u}
}

// Attest implements Attestor.
func (u *Unix) Attest(ctx context.Context, p *peer.Process) ([]Selector, error) {
	var out []Selector
	add := func(kind, value string) {
		if s := (Selector{Type: "unix", Value: kind + ":" + value}); selectable(s.String()) {
			out = append(out, s)
		}
	}
	var unknown unknowns

	ids, err := readIdentity(p)
	if err != nil {
		unknown.add(err, "unix:uid:", "unix:gid:", "unix:supplementary_gid:",
			"unix:user:", "unix:group:", "unix:supplementary_group:")
	} else {
		add("uid", decimal(ids.uid))
		add("gid", decimal(ids.gid))
		for _, g := range ids.groups {
			add("supplementary_gid", decimal(g))
		}
		if users, err := u.users.current(); err != nil {
			unknown.add(err, "unix:user:")
		} else if name, ok := users[ids.uid]; ok {
			add("user", name)
		}
		if groups, err := u.groups.current(); err != nil {
			unknown.add(err, "unix:group:", "unix:supplementary_group:")
		} else {
			if name, ok := groups[ids.gid]; ok {
				add("group", name)
			}
			for _, g := range ids.groups {
				if name, ok := groups[g]; ok {
					add("supplementary_group", name)
				}
			}
		}
	}

	digest := u.demand().ExecutableDigest
	x, err := u.executables.look(ctx, p, digest)
	if err != nil {
		x = executable{pathErr: err}
		if digest {
			x.sumErr = err
		}
	}
	if x.pathErr != nil {
		unknown.add(x.pathErr, "unix:path:")
	} else if x.path != "" {
		add("path", x.path)
	}
	if x.sumErr != nil {
		unknown.add(x.sumErr, "unix:sha256:")
	} else if x.sum != "" {
		add("sha256", x.sum)
	}
	return out, unknown.err(p)
}

func decimal(id uint32) string { return strconv.FormatUint(uint64(id), 10) }

// An identity is what /proc/PID/status says of a process's user and groups, in
// one look.
type identity struct {
	uid, gid uint32 // effective
	groups   []uint32
}

func readIdentity(p *peer.Process) (identity, error) {
	b, err := p.ReadFile("status")
	if err != nil {
		return identity{}, err
	}
	id, err := parseIdentity(b)
	if err != nil {
		return identity{}, fmt.Errorf("read status of %d: %w", p.PID(), err)
	}
	return id, nil
}

// parseIdentity reads Uid, Gid and Groups. The kernel escapes line breaks in
// the process's name, so that each line is the kernel's; a line that is there
// twice is refused all the same.
func parseIdentity(status []byte) (identity, error) {
	var id identity
	seen := make(map[string]bool, 3)
	for line := range bytes.Lines(status) {
		key, value, _ := bytes.Cut(line, []byte(":"))
		name := string(key)
		if name != "Uid" && name != "Gid" && name != "Groups" {
			continue
		}
		if seen[name] {
			return identity{}, fmt.Errorf("%s comes twice", name)
		}
		seen[name] = true
		fields := bytes.Fields(value)
		numbers := make([]uint32, len(fields))
		for i, f := range fields {
			n, err := strconv.ParseUint(string(f), 10, 32)
			if err != nil {
				return identity{}, fmt.Errorf("%s is no list of numbers", name)
			}
			numbers[i] = uint32(n)
		}
		if name == "Groups" {
			id.groups = numbers
			continue
		}
		if len(numbers) != 4 { // real, effective, saved, of the file system
			return identity{}, fmt.Errorf("%s has %d numbers, not four", name, len(numbers))
		}
		if name == "Uid" {
			id.uid = numbers[1]
		} else {
			id.gid = numbers[1]
		}
	}
	if len(seen) != 3 {
		return identity{}, errors.New("no line for each of Uid, Gid and Groups")
	}
	return id, nil
}
