package container

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/hashicorp/go-hclog"
	"golang.org/x/sync/singleflight"

	"github.com/deputy-id/deputy/attestor"
	"github.com/deputy-id/deputy/attestor/peer"
)

// DefaultSocket is where Docker listens unless it is told otherwise.
const DefaultSocket = "/run/docker.sock"

const (
	// queryTime bounds all that one look at a container asks of the engine.
	queryTime = 5 * time.Second
	// refreshTime bounds the look that only a changed name would be missed by.
	refreshTime = time.Second
	// fresh is how old a look at a known container may be: as old as evidence.
	fresh = time.Minute
	// retry is when an engine that did not answer about a known container is asked again.
	retry = 5 * time.Second
)

// Options of a Docker attestor.
type Options struct {
	Socket string       // absolute path; empty means DefaultSocket
	Env    []string     // names of the variables that may become docker:env selectors
	Table  *peer.Table  // pins the init processes of containers
	Log    hclog.Logger // nil discards
}

// Docker attests the containers of one Docker engine:
//
//	container:id, container:name, container:runtime:docker, container:path
//	image:digest, image:config_digest, image:repository, image:reference
//	docker:label, docker:env, docker:image_id, docker:image_config_digest
//	process:leader:true for the container's init itself
//
// What it found out about a container is kept for as long as the container's
// init process, pinned, lives; of what can change meanwhile (the name, further
// repositories of the image) it asks again once a minute. A container that the
// engine does not know has no selectors: another runtime's attestor may know it.
// It is safe for concurrent use.
type Docker struct {
	engine *engine
	env    []string
	table  *peer.Table

	flights singleflight.Group // by container ID

	mu     sync.Mutex
	known  map[string]*known // by container ID
	closed chan struct{}
	ends   sync.WaitGroup // goroutines that wait for the end of an init
}

// NewDocker returns the attestor. It does not connect: an engine that is not up
// yet makes its selectors unknown until it is.
func NewDocker(o Options) (*Docker, error) {
	if o.Socket == "" {
		o.Socket = DefaultSocket
	}
	if !filepath.IsAbs(o.Socket) {
		return nil, fmt.Errorf("docker socket %q is not an absolute path", o.Socket)
	}
	if o.Table == nil {
		return nil, errors.New("docker attestor needs a table of processes")
	}
	if o.Log == nil {
		o.Log = hclog.NewNullLogger()
	}
	return &Docker{
		engine: newEngine(socket{path: o.Socket}, o.Log),
		env:    slices.Clone(o.Env),
		table:  o.Table,
		known:  make(map[string]*known),
		closed: make(chan struct{}),
	}, nil
}

// Source is the attestor with the prefixes that are unknown when it fails.
func (d *Docker) Source() attestor.Source {
	return attestor.Source{Name: "docker", Prefixes: prefixes("docker"), Attestor: d}
}

// Close lets go of the processes that it held. No Attest may follow.
func (d *Docker) Close() error {
	d.mu.Lock()
	select {
	case <-d.closed:
	default:
		close(d.closed)
	}
	d.mu.Unlock()
	d.ends.Wait()
	d.engine.close()
	return nil
}

// Attest implements attestor.Attestor.
func (d *Docker) Attest(ctx context.Context, p *peer.Process) ([]attestor.Selector, error) {
	at, err := placeOf(p)
	if err != nil {
		return nil, fmt.Errorf("place process %d: %w", p.PID(), err)
	}
	if at.ID == "" || at.Runtime != "" && at.Runtime != "docker" {
		return nil, nil
	}
	k, err := d.container(ctx, at)
	switch {
	case errors.Is(err, errAbsent):
		return nil, nil
	case err != nil:
		return nil, fmt.Errorf("attest container %.12s: %w", at.ID, err)
	}
	if !d.hold(k) {
		return nil, fmt.Errorf("attest container %.12s: %w", at.ID, errEnded)
	}
	defer k.init.Close()
	out, unknown := k.attest(ctx, p)
	// What was said holds for a process that was in the container all the time,
	// and for as long as the container's init ran.
	if now, err := placeOf(p); err != nil || now != at {
		return nil, fmt.Errorf("attest container %.12s: process %d moved meanwhile", at.ID, p.PID())
	}
	attestor.RestOn(ctx, k.init.Hold())
	if err := k.init.Alive(); err != nil {
		return nil, fmt.Errorf("attest container %.12s: its init: %w", at.ID, errEnded)
	}
	return out, unknown
}

// errEnded says that a container's run ended while it was looked at.
var errEnded = errors.New("container stopped or started again meanwhile")

// container returns what is known of the container at this place, asking the
// engine if it must.
func (d *Docker) container(ctx context.Context, at place) (*known, error) {
	if k := d.lookup(at); k != nil && k.young() {
		return k, nil
	}
	// One question at a time for each container, whoever asks. It is not the
	// asker's to end: another may wait for the same answer.
	answer := d.flights.DoChan(at.ID, func() (any, error) {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), queryTime)
		defer cancel()
		return d.look(ctx, at)
	})
	select {
	case r := <-answer:
		if r.Err != nil {
			return nil, r.Err
		}
		if k := r.Val.(*known); k.at == at {
			return k, nil
		}
		return nil, errors.New("container of this ID is in another directory")
	case <-ctx.Done():
		return nil, fmt.Errorf("ask engine: %w", context.Cause(ctx))
	}
}

// lookup returns what is known of the container, if its init still runs.
func (d *Docker) lookup(at place) *known {
	d.mu.Lock()
	defer d.mu.Unlock()
	k := d.known[at.ID]
	if k == nil || k.at != at || k.init.Alive() != nil {
		return nil
	}
	return k
}

// hold holds the container's init, which is the caller's to close, unless the
// container was let go of meanwhile.
func (d *Docker) hold(k *known) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.known[k.at.ID] != k {
		return false
	}
	k.init.Hold()
	return true
}

// look asks the engine about the container at this place.
func (d *Docker) look(ctx context.Context, at place) (*known, error) {
	if k := d.lookup(at); k != nil {
		if k.young() {
			return k, nil
		}
		if err := d.refresh(ctx, k); !errors.Is(err, errEnded) {
			return k, nil
		}
	}
	k, err := d.verify(ctx, at)
	if err != nil {
		return nil, err
	}
	return k, d.keep(k)
}

// verify asks what the container is and holds the answer against the kernel:
// the process that the engine calls its init, pinned, is in the directory that
// carries the container's ID, and the engine says the same once it is pinned.
// Anything else is an error, so that nothing is granted.
func (d *Docker) verify(ctx context.Context, at place) (*known, error) {
	first, err := d.engine.inspect(ctx, at.ID)
	if err != nil {
		return nil, err
	}
	if !first.running {
		return nil, errors.New("engine says that it does not run")
	}
	init, err := d.table.Open(first.pid)
	if err != nil {
		return nil, fmt.Errorf("pin init process: %w", err)
	}
	k, err := d.verifyInit(ctx, at, first, init)
	if err != nil {
		init.Close()
		return nil, err
	}
	return k, nil
}

func (d *Docker) verifyInit(ctx context.Context, at place, first inspected, init *peer.Process) (*known, error) {
	im, err := d.engine.image(ctx, first.imageID)
	if err != nil && !errors.Is(err, errAbsent) { // an image may be removed under its container
		return nil, err
	}
	second, err := d.engine.inspect(ctx, at.ID)
	if err != nil {
		return nil, err
	}
	if !second.sameRun(first) {
		return nil, errEnded
	}
	if err := stands(init, at); err != nil {
		return nil, err
	}
	k := newKnown(at, init)
	k.set(&facts{
		selectors: second.selectors("docker", im, d.env),
		image:     im,
		name:      second.name,
		run:       second,
		asked:     time.Now(),
	})
	return k, nil
}

// stands says whether the init process, alive, is at the container's place.
func stands(init *peer.Process, at place) error {
	now, err := placeOf(init)
	if err != nil {
		return fmt.Errorf("place init process: %w", err)
	}
	if now != at {
		return errors.New("the process that the engine calls its init is not in its cgroup")
	}
	if init.Alive() != nil {
		return errEnded
	}
	return nil
}

// refresh asks again what can change of a container while it runs. errEnded
// means that it does not run as it did. Any other failure costs no more than
// what it was to find out, because the init process is pinned and alive.
func (d *Docker) refresh(ctx context.Context, k *known) error {
	ctx, cancel := context.WithTimeout(ctx, refreshTime)
	defer cancel()
	was := k.facts()
	now, err := d.engine.inspect(ctx, k.at.ID)
	switch {
	case errors.Is(err, errAbsent):
		return errEnded
	case err == nil && (!now.sameRun(was.run) || stands(k.init, k.at) != nil):
		return errEnded
	}
	if err != nil {
		k.set(&facts{
			selectors: was.selectors,
			image:     was.image,
			run:       was.run,
			nameErr:   err,
			asked:     time.Now().Add(retry - fresh),
		})
		return err
	}
	im, err := d.engine.image(ctx, now.imageID)
	if err != nil {
		im = was.image // a digest that was true of this image stays so
	}
	k.set(&facts{
		selectors: now.selectors("docker", im, d.env),
		image:     im,
		name:      now.name,
		run:       now,
		asked:     time.Now(),
	})
	return nil
}

// keep remembers the container until its init process ends.
func (d *Docker) keep(k *known) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	select {
	case <-d.closed:
		k.init.Close()
		return errors.New("attestor is closed")
	default:
	}
	if old := d.known[k.at.ID]; old != nil {
		close(old.dropped)
	}
	d.known[k.at.ID] = k
	d.ends.Add(1)
	go func() {
		defer d.ends.Done()
		select {
		case <-k.init.Done():
		case <-k.dropped:
		case <-d.closed:
		}
		d.mu.Lock()
		if d.known[k.at.ID] == k {
			delete(d.known, k.at.ID)
		}
		d.mu.Unlock()
		k.init.Close()
	}()
	return nil
}
