package attestor

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"math"
	"strconv"
	"strings"
	"sync"
	"time"
	"unicode/utf8"

	"golang.org/x/sys/unix"

	"github.com/deputy-id/deputy/internal/bounded"
)

// accounts are the names of users or groups by their number, from a file in
// the form of /etc/passwd or /etc/group. It is read again when it has changed.
type accounts struct {
	path string
	host *Host

	mu      sync.Mutex
	version fileVersion
	names   map[uint32]string
	kept    bool // names are those of version
}

// maxAccounts bounds the size of the file in bytes: a hundred thousand users.
const maxAccounts = 16 << 20

// current returns the names by number. The map is shared: nobody may change
// it. A host without the file has no names.
func (a *accounts) current() (map[uint32]string, error) {
	f, err := a.host.file(a.path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return nil, fmt.Errorf("stat %s: %w", f.Name(), err)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		return nil, fmt.Errorf("read %s: not a regular file", f.Name())
	}
	version := versionOf(&st)
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.kept && a.version == version {
		return a.names, nil
	}
	now := time.Now()
	b, err := bounded.OpenFile(f, maxAccounts)
	switch {
	case err != nil:
		return nil, err
	case int64(len(b)) != st.Size:
		return nil, fmt.Errorf("read %s: it is being written", f.Name())
	}
	a.names, a.version = parseAccounts(b), version
	// A second change within a tick of the clock would not show in the times.
	a.kept = now.Sub(time.Unix(st.Ctim.Unix())) >= settled
	return a.names, nil
}

// parseAccounts reads lines of name:password:number. Of several names for one
// number the first counts, as it does for getpwuid(3). A line that is not of
// this form is passed over; so are the "+" and "-" of NIS.
func parseAccounts(b []byte) map[uint32]string {
	names := make(map[uint32]string)
	for line := range bytes.Lines(b) {
		name, rest, ok := strings.Cut(strings.TrimRight(string(line), "\r\n"), ":")
		if !ok || !accountName(name) {
			continue
		}
		_, rest, _ = strings.Cut(rest, ":")
		number, _, ok := strings.Cut(rest, ":")
		if !ok {
			continue
		}
		id, err := strconv.ParseUint(number, 10, 32)
		if err != nil || id == math.MaxUint32 { // (uid_t)-1 is nobody's
			continue
		}
		if _, taken := names[uint32(id)]; !taken {
			names[uint32(id)] = name
		}
	}
	return names
}

func accountName(s string) bool {
	return s != "" && len(s) <= 256 && utf8.ValidString(s) && !strings.ContainsAny(s[:1], "#+-") &&
		!strings.ContainsFunc(s, func(r rune) bool { return r <= ' ' || r == 0x7f })
}
