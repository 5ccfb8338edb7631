package claims

import (
	"context"
	"fmt"
	"io/fs"
	"os"
	"syscall"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/deputy-id/deputy/internal/bounded"
)

const (
	// maxFile is enough for a hundred thousand long rules.
	maxFile = 64 << 20 // bytes
	// readTime bounds the reading of a file, which on a network may hang.
	readTime = 10 * time.Second
	// joinTime bounds the search for rules that clash.
	joinTime = 10 * time.Second
)

// An origin is what rules were made of, to make them again.
type origin struct {
	source Source
	path   string // of the rules file; empty: none
	stamp  stamp
}

// Load reads rules and the rules file that they name. A zero trust domain is
// one that is not known: then a full ID in a pattern may name any, and the
// others must name the same.
//
// The error is a Problems if it is the content that is wrong.
func Load(ctx context.Context, src Source, td spiffeid.TrustDomain) (*Rules, error) {
	d := &decoder{trustDomain: td, known: !td.IsZero()}
	s := d.decode(&text{src}, false)
	o := origin{source: src, path: s.rulesFile.value}
	warning := ""
	if o.path != "" {
		content, stamp, err := readFile(ctx, o.path)
		if err != nil {
			d.add(s.rulesFile.text, s.rulesFile.at, "%s", err)
			return nil, errUnread{d.err().(Problems)} // there is one at least
		}
		o.stamp = stamp
		warning = stamp.warning(o.path)
		more := d.decode(&text{Source{Name: o.path, Text: content}}, true)
		for _, k := range []struct {
			name       string
			here, file *setting
		}{
			{"claim_name", &s.claimName, &more.claimName},
			{"unmapped", &s.unmapped, &more.unmapped},
			{"on_error", &s.onError, &more.onError},
		} {
			switch {
			case k.file.text == nil:
			case k.here.text == nil:
				*k.here = *k.file
			default:
				d.add(k.file.text, k.file.at, "%s is set in %s already", k.name, k.here.text.Name)
			}
		}
		s.rules = append(s.rules, more.rules...)
	}
	r := &Rules{
		name:        defaultName,
		denyUnknown: s.unmapped.value == "deny",
		omitOnError: s.onError.value == "omit",
		trustDomain: d.trustDomain,
		rules:       s.rules,
		origin:      o,
		warning:     warning,
	}
	if s.claimName.value != "" {
		r.name = s.claimName.value
	}
	err := d.join(ctx, r)
	if err := d.err(); err != nil {
		return nil, err
	}
	if err != nil {
		return nil, err
	}
	return r, nil
}

// LoadFile is Load of a whole file.
func LoadFile(ctx context.Context, path string, td spiffeid.TrustDomain) (*Rules, error) {
	content, stamp, err := readFile(ctx, path)
	if err != nil {
		return nil, err
	}
	r, err := Load(ctx, Source{Name: path, Text: content}, td)
	if err != nil {
		return nil, err
	}
	if r.warning == "" {
		r.warning = stamp.warning(path)
	}
	return r, nil
}

// join makes the index, and refuses rules of which nobody could say which
// counts.
func (d *decoder) join(ctx context.Context, r *Rules) error {
	r.index = newIndex(len(r.rules))
	for i := range r.rules {
		if same, ok := r.index.add(&r.rules[i].pattern, i); !ok {
			d.add(r.rules[i].text, r.rules[i].at, "the rule at %s has the same IDs", r.rules[same].where())
		}
	}
	ctx, cancel := context.WithTimeout(ctx, joinTime)
	defer cancel()
	return r.index.clashes(ctx, func(a, b int32) {
		d.add(r.rules[b].text, r.rules[b].at, "some IDs are in this rule and in the one at %s, and neither has all of the other's: nobody could say which counts", r.rules[a].where())
	})
}

// A stamp tells two states of a file apart.
type stamp struct {
	dev, ino    uint64
	size        int64
	mtim, ctime syscall.Timespec
	mode        fs.FileMode
}

// warning says what is doubtful about the file. Its mode alone keeps nothing
// from use, as in the daemon: how a file comes to a server is its operator's.
func (s stamp) warning(path string) string {
	if s.mode.Perm()&0o022 == 0 {
		return ""
	}
	return fmt.Sprintf("%s may be written by others than its owner (mode %04o), who could give any agent any claim", path, s.mode.Perm())
}

func stampOf(info fs.FileInfo) stamp {
	s, ok := info.Sys().(*syscall.Stat_t)
	if !ok {
		return stamp{size: info.Size(), mode: info.Mode()}
	}
	return stamp{uint64(s.Dev), s.Ino, s.Size, s.Mtim, s.Ctim, info.Mode()} //nolint:unconvert // Dev is 32 bits elsewhere
}

// A content is what a file holds.
type content struct {
	text  string
	stamp stamp
}

// readFile reads a file that does not change meanwhile, within a time.
func readFile(ctx context.Context, path string) (text string, _ stamp, err error) {
	c, err := within(ctx, path, func() (c content, err error) {
		c.text, c.stamp, err = readNow(path)
		return c, err
	})
	return c.text, c.stamp, err
}

// reading has room for the calls that have not come back from a file system.
// Each holds a thread, and a process that has too many of them is ended.
var reading = make(chan struct{}, 8)

// within waits for a call into a file system, which may hang, for readTime.
func within[T any](ctx context.Context, path string, call func() (T, error)) (value T, err error) {
	ctx, cancel := context.WithTimeout(ctx, readTime)
	defer cancel()
	select {
	case reading <- struct{}{}:
	case <-ctx.Done():
		return value, fmt.Errorf("read %s, with others under way: %w", path, ctx.Err())
	}
	type answer struct {
		value T
		err   error
	}
	done := make(chan answer, 1)
	go func() {
		defer func() { <-reading }()
		var a answer
		a.value, a.err = call()
		done <- a
	}()
	select {
	case a := <-done:
		return a.value, a.err
	case <-ctx.Done():
		return value, fmt.Errorf("read %s: %w", path, ctx.Err())
	}
}

func readNow(path string) (content string, s stamp, err error) {
	// Without O_NONBLOCK the opening of a FIFO waits for its writer.
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK|syscall.O_CLOEXEC, 0)
	if err != nil {
		return "", s, err
	}
	defer f.Close()
	before, err := f.Stat()
	switch {
	case err != nil:
		return "", s, err
	case !before.Mode().IsRegular():
		return "", s, fmt.Errorf("read %s: not a regular file", path)
	case before.Size() > maxFile:
		return "", s, fmt.Errorf("read %s: larger than %d MiB", path, maxFile>>20)
	}
	b, err := bounded.OpenFile(f, maxFile)
	if err != nil {
		return "", s, err
	}
	after, err := f.Stat()
	if err != nil {
		return "", s, err
	}
	if s = stampOf(after); s != stampOf(before) || int64(len(b)) != s.size {
		return "", s, fmt.Errorf("read %s: it is being written", path)
	}
	return string(b), s, nil
}

// errUnread is of rules whose file could not be read: it may be right.
type errUnread struct{ Problems }

func (e errUnread) Unwrap() error { return e.Problems }
