package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"reflect"
	"syscall"
	"time"

	"github.com/fsnotify/fsnotify"

	"github.com/deputy-id/deputy/conf"
)

// settle is how long a file must have been left alone before it is read: an
// editor writes in several steps. In a directory where something happens all
// the time nobody waits for that longer than patience.
const (
	settle   = 100 * time.Millisecond
	patience = time.Second
)

// reloads are the occasions to read the file again: SIGHUP, and changes in its
// directory, since an editor puts a new file in the place of the old.
type reloads struct {
	file    string
	content []byte // as it was read last
	hup     chan os.Signal
	watcher *fsnotify.Watcher // nil without a file
	blind   error             // why the file is not watched
}

func newReloads(file string) *reloads {
	r := &reloads{file: file, hup: make(chan os.Signal, 1)}
	if file != "" {
		if r.watcher, r.blind = fsnotify.NewWatcher(); r.blind == nil {
			r.blind = r.watch()
		}
		r.content, _ = os.ReadFile(file)
	}
	signal.Notify(r.hup, syscall.SIGHUP)
	return r
}

// watch watches the file's directory and, where the file is a link, that of
// what it leads to, which may be another one after each change.
func (r *reloads) watch() error {
	if err := r.watcher.Add(filepath.Dir(r.file)); err != nil {
		return err
	}
	target, err := filepath.EvalSymlinks(r.file)
	if err != nil {
		return nil // who reads the file says what is wrong with it
	}
	return r.watcher.Add(filepath.Dir(target))
}

func (r *reloads) Close() error {
	signal.Stop(r.hup)
	if r.watcher == nil {
		return nil
	}
	return r.watcher.Close()
}

// changed reports whether the content is another than when it was read last.
// A file that is not there now is about to come back: no change.
func (r *reloads) changed() bool {
	content, err := os.ReadFile(r.file)
	if err != nil || bytes.Equal(content, r.content) {
		return false
	}
	r.content = content
	return true
}

// follow reloads on each occasion until the context ends.
func (d *daemon) follow(ctx context.Context, r *reloads) error {
	var events chan fsnotify.Event
	var lost chan error
	if r.watcher != nil {
		events, lost = r.watcher.Events, r.watcher.Errors
	}
	quiet := time.NewTimer(0)
	if !quiet.Stop() {
		<-quiet.C
	}
	var since time.Time // of the first event that is waited after; zero: none
	wait := func() {
		if since.IsZero() {
			since = time.Now()
		}
		quiet.Reset(min(settle, max(patience-time.Since(since), 0)))
	}
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-r.hup:
			if r.file == "" {
				d.log.Info("nothing to reload without a configuration file")
				continue
			}
			r.changed()
			d.reload()
		case <-events:
			wait()
		case err := <-lost:
			d.log.Warn("changes of the configuration file may be missed", "error", err)
			wait()
		case <-quiet.C:
			since = time.Time{}
			if err := r.watch(); err != nil {
				d.log.Warn("changes of the configuration file may be missed", "error", err)
			}
			if r.changed() {
				d.reload()
			}
		}
	}
}

// reload puts in force what the file has of entries, claims, borrowers,
// relationships with other trust domains, and log level. A file with a mistake
// changes nothing: taking identities away because of one would stop every agent
// of the host.
func (d *daemon) reload() {
	next, err := load(d.file)
	var problems conf.Problems
	switch {
	case errors.As(err, &problems):
		for _, p := range problems {
			d.log.Error("configuration is not reloaded, the last good one stays", "at", position(p), "reason", p.Reason)
		}
		return
	case err != nil:
		d.log.Error("configuration is not reloaded, the last good one stays", "error", err)
		return
	}
	d.warn(next.warnings)
	d.warn(next.bundleless(d.here))
	if was, is := d.settings.TrustDomain.Value, next.TrustDomain.Value; was != is {
		// Its entries would be another trust domain's.
		d.log.Error("configuration is not reloaded: another trust domain needs a restart", "trust_domain", was.Name(), "file", is.Name())
		return
	}
	if err := d.store.ReplaceFile(next.entries); err != nil {
		d.log.Error("configuration is not reloaded, the last good one stays", "error", err)
		return
	}
	d.book.Put(next.claims)
	d.follower.Follow(next.relationships)
	d.server.SetBorrowers(borrowers(next.Config))
	for _, key := range needRestart(d.settings.Config, next.Config) {
		d.log.Warn("changed setting needs a restart", "setting", key)
	}
	// A level that an operator set meanwhile stays until the file has another.
	if next.LogLevel.Value != d.settings.LogLevel.Value {
		d.log.SetLevel(next.LogLevel.Value)
	}
	d.settings.entries, d.settings.LogLevel = next.entries, next.LogLevel
	d.log.Info("configuration reloaded", "entries", len(next.entries), "claims", next.claims.Len())
}

// needRestart lists the settings that differ and that only a start reads.
func needRestart(was, is *conf.Config) []string {
	var keys []string
	differ := func(key string, a, b any) {
		if !reflect.DeepEqual(a, b) {
			keys = append(keys, key)
		}
	}
	differ("data_dir", was.DataDir.Value, is.DataDir.Value)
	differ("log_format", was.LogFormat.Value, is.LogFormat.Value)
	differ("workload_socket", was.WorkloadSocket.Path.Value, is.WorkloadSocket.Path.Value)
	differ("admin_socket", []string{was.AdminSocket.Path.Value, was.AdminSocket.Group.Value}, []string{is.AdminSocket.Path.Value, is.AdminSocket.Group.Value})
	differ("authority", authorityValues(was), authorityValues(is))
	differ("bundle_endpoint", endpointValues(was), endpointValues(is))
	differ("experimental", was.Experimental.WITSVID.Value, is.Experimental.WITSVID.Value)
	differ("oidc_discovery", discoveryValues(was), discoveryValues(is))
	wasDelegated, wasBroker := lendingValues(was)
	isDelegated, isBroker := lendingValues(is)
	differ("delegated_identity", wasDelegated, isDelegated)
	differ("broker", wasBroker, isBroker)
	differ("attestor docker", dockerValues(was), dockerValues(is))
	differ("attestor systemd", was.Systemd != nil, is.Systemd != nil)
	differ("sds", []any{secretNames(was), was.SDS.DisableSPIFFECertValidation.Value}, []any{secretNames(is), is.SDS.DisableSPIFFECertValidation.Value})
	return keys
}

func authorityValues(c *conf.Config) any {
	o := authorityOptions(c, nil)
	o.DataDir, o.RefreshHint = "", 0 // have lines of their own
	return []any{o, c.Authority.WorkloadKeyType.Value}
}

func dockerValues(c *conf.Config) []string {
	if c.Docker == nil {
		return nil
	}
	return append([]string{c.Docker.Socket.Value}, values(c.Docker.Env)...)
}

// position is FILE:LINE:COL.
func position(p conf.Problem) string {
	return fmt.Sprintf("%s:%d:%d", p.Range.Filename, p.Range.Start.Line, p.Range.Start.Column)
}
