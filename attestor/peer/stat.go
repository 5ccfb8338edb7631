package peer

import (
	"bytes"
	"errors"
	"fmt"
	"strconv"
)

// stat is what we read of /proc/PID/stat.
type stat struct {
	state byte   // field 3
	start uint64 // field 22, clock ticks since boot
}

var errStat = errors.New("stat is not in the kernel's format")

// parseStat reads /proc/PID/stat. The command in field 2 is the workload's to
// choose, parentheses and newlines included; the last ")" ends it, since all
// that follows are numbers and one letter.
func parseStat(b []byte) (stat, error) {
	i := bytes.LastIndexByte(b, ')')
	if i < 0 {
		return stat{}, errStat
	}
	fields := bytes.Fields(b[i+1:]) // from field 3 on
	if len(fields) < 20 || len(fields[0]) != 1 {
		return stat{}, errStat
	}
	start, err := strconv.ParseUint(string(fields[19]), 10, 64)
	if err != nil {
		return stat{}, errStat
	}
	return stat{state: fields[0][0], start: start}, nil
}

// parseStatus reads the IDs and the parent from /proc/PID/status. The kernel
// escapes newlines in Name, the one field that the workload writes, so a line
// is the kernel's own; one that comes twice is an error all the same.
func parseStatus(b []byte) (Info, error) {
	var info Info
	var uid, gid, ppid bool
	for line := range bytes.Lines(b) {
		key, value, _ := bytes.Cut(line, []byte(":"))
		switch string(key) {
		case "Uid":
			ids, err := fourIDs(value)
			if err != nil || uid {
				return Info{}, fmt.Errorf("parse Uid of status: %w", errors.Join(err, twice(uid)))
			}
			info.UID, info.EUID, info.SUID, info.FSUID, uid = ids[0], ids[1], ids[2], ids[3], true
		case "Gid":
			ids, err := fourIDs(value)
			if err != nil || gid {
				return Info{}, fmt.Errorf("parse Gid of status: %w", errors.Join(err, twice(gid)))
			}
			info.GID, info.EGID, info.SGID, info.FSGID, gid = ids[0], ids[1], ids[2], ids[3], true
		case "PPid":
			n, err := strconv.ParseInt(string(bytes.TrimSpace(value)), 10, 32)
			if err != nil || n < 0 || ppid {
				return Info{}, errors.New("parse PPid of status: no number")
			}
			info.PPID, ppid = int32(n), true
		}
	}
	if !uid || !gid || !ppid {
		return Info{}, errors.New("status lacks Uid, Gid or PPid")
	}
	return info, nil
}

func twice(seen bool) error {
	if seen {
		return errors.New("line comes twice")
	}
	return nil
}

func fourIDs(b []byte) ([4]uint32, error) {
	var out [4]uint32
	fields := bytes.Fields(b)
	if len(fields) != len(out) {
		return out, fmt.Errorf("%d IDs, not four", len(fields))
	}
	for i, f := range fields {
		n, err := strconv.ParseUint(string(f), 10, 32)
		if err != nil {
			return out, errors.New("ID is not a number")
		}
		out[i] = uint32(n)
	}
	return out, nil
}
