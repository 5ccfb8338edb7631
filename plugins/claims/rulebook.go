package claims

import (
	"context"
	"errors"
	"os"
	"sync"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/deputy-id/deputy/internal/watch"
)

// lookEvery is how often the rules file is looked at. A file counts as written
// when two looks find the same.
const lookEvery = 500 * time.Millisecond

// A Rulebook holds the rules in force, and follows their file. It is safe for
// concurrent use.
type Rulebook struct {
	log     hclog.Logger
	current *watch.Value[*Rules]

	mu       sync.Mutex // guards what follows, and the order of stores
	reloads  int
	failures int
}

// NewRulebook returns a book whose rules map nothing.
func NewRulebook(log hclog.Logger) *Rulebook {
	if log == nil {
		log = hclog.NewNullLogger()
	}
	return &Rulebook{log: log, current: watch.New(&Rules{name: defaultName})}
}

// Rules returns the rules in force, and the channel that closes when others are.
func (b *Rulebook) Rules() (*Rules, <-chan struct{}) { return b.current.Load() }

// Put puts rules in force. Those of the same text and file are in force already.
func (b *Rulebook) Put(r *Rules) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if now, _ := b.current.Load(); now.origin == r.origin && now.trustDomain == r.trustDomain {
		return
	}
	b.store(r)
}

// store needs mu.
func (b *Rulebook) store(r *Rules) {
	b.current.Store(r)
	if r.warning != "" {
		b.log.Warn("rules are doubtful", "why", r.warning)
	}
}

// Claims are the private claims of an ID's token, by name.
func (b *Rulebook) Claims(id spiffeid.ID, now time.Time) (map[string]any, error) {
	rules, _ := b.current.Load()
	c, err := rules.Claims(id, now)
	switch {
	case err != nil && rules.omitOnError && !errors.Is(err, ErrDenied):
		b.log.Warn("token goes without its claim", "spiffe_id", id.String(), "error", err)
		return nil, nil
	case err != nil:
		return nil, err
	case c == nil:
		return nil, nil
	}
	return map[string]any{rules.name: c}, nil
}

// Run follows the rules file, whichever the rules name, until the context ends.
// A file that is broken, or gone, changes nothing.
func (b *Rulebook) Run(ctx context.Context) error {
	tick := time.NewTicker(lookEvery)
	defer tick.Stop()
	var w watcher
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-tick.C:
			b.look(ctx, &w)
		}
	}
}

// A watcher is what Run knows of the file.
type watcher struct {
	path    string
	seen    stamp // at the last look
	refused stamp // was read, and is wrong
	said    stamp // whose failure was logged
	lost    bool  // and it was said
}

func (b *Rulebook) look(ctx context.Context, w *watcher) {
	rules, stale := b.current.Load()
	o := rules.origin
	if o.path != w.path {
		*w = watcher{path: o.path, seen: o.stamp}
	}
	if o.path == "" {
		return
	}
	now, err := statFile(ctx, o.path)
	if err != nil {
		if !w.lost {
			w.lost = true
			b.failed(err)
		}
		return
	}
	w.lost = false
	settled := now == w.seen
	w.seen = now
	if !settled || now == o.stamp || now == w.refused {
		return
	}
	next, err := Load(ctx, o.source, rules.trustDomain)
	if err != nil {
		// What is wrong stays wrong. What could not be read, or not in time, may
		// be another time.
		var problems Problems
		var unread errUnread
		if errors.As(err, &problems) && !errors.As(err, &unread) {
			w.refused = now
		}
		if w.said != now {
			w.said = now
			b.failed(err)
		}
		return
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	select {
	case <-stale: // others were put in force meanwhile
		return
	default:
	}
	b.reloads++
	b.store(next)
	b.log.Info("rules reloaded", "rules", next.Len(), "reloads", b.reloads)
}

// failed says that the last good rules stay, with the number of times that
// this happened for who counts log lines.
func (b *Rulebook) failed(err error) {
	b.mu.Lock()
	b.failures++
	n := b.failures
	b.mu.Unlock()
	var problems Problems
	if !errors.As(err, &problems) {
		b.log.Warn("rules are not reloaded, the last good ones stay", "error", err, "failed_reloads", n)
		return
	}
	for i, p := range problems {
		if i == 10 {
			b.log.Warn("rules have more problems", "problems", len(problems))
			return
		}
		b.log.Warn("rules are not reloaded, the last good ones stay", "error", p.String(), "failed_reloads", n)
	}
}

// statFile is os.Stat within a time.
func statFile(ctx context.Context, path string) (stamp, error) {
	return within(ctx, path, func() (stamp, error) {
		info, err := os.Stat(path)
		if err != nil {
			return stamp{}, err
		}
		return stampOf(info), nil
	})
}
