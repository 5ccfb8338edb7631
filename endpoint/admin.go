package endpoint

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math"
	"os"
	"slices"
	"strconv"
	"time"

	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	loggerv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/logger/v1"
	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	trustdomainv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/trustdomain/v1"
	"google.golang.org/grpc"

	"github.com/deputy-id/deputy/attestor"
	"github.com/deputy-id/deputy/attestor/peer"
	adminv1 "github.com/deputy-id/deputy/proto/deputy/admin/v1"
	"github.com/deputy-id/deputy/svid/registry"
)

// newAdmin returns the server of the administrators' socket. What they say is
// not counted, as their connections are not.
func (s *Server) newAdmin() *grpc.Server {
	g := s.newGate(&handshaker{s: s, accept: s.acceptAdmin}, s.admitAdmin, denyAdmin)
	g.most, g.still = maxBatch, s.guard
	entryv1.RegisterEntryServer(g, &entries{s: s})
	bundlev1.RegisterBundleServer(g, &bundles{s: s})
	svidv1.RegisterSVIDServer(g, &mint{s: s})
	trustdomainv1.RegisterTrustDomainServer(g, &relationships{s: s})
	adminv1.RegisterFederationServer(g, &relationships{s: s})
	loggerv1.RegisterLoggerServer(g, &levels{log: s.Log, launch: s.Log.GetLevel()})
	adminv1.RegisterAdminServer(g, &admin{s: s})
	return g.Server
}

// acceptAdmin decides at connect whether a peer may administer. One that may
// not is told so by every call, rather than cut off: it is a command that has
// something to print.
func (s *Server) acceptAdmin(l *link) error {
	l.refused = s.mayAdminister(l)
	if l.refused != nil {
		s.Log.Info("administrator refused", "pid", l.Process().PID(), "uid", l.uid, "reason", l.refused)
	}
	return nil
}

// mayAdminister fails closed: what cannot be found out refuses.
func (s *Server) mayAdminister(l *link) error {
	if l.uid != 0 && l.uid != uint32(os.Geteuid()) {
		in, err := s.inAdminGroup(l)
		if err != nil {
			return fmt.Errorf("%w: %v", errForeign, err)
		}
		if !in {
			return fmt.Errorf("%w: UID %d is neither root nor a member of the group", errForeign, l.uid)
		}
	}
	foreign, err := l.Process().ForeignUserNamespace()
	switch {
	case err != nil:
		return fmt.Errorf("%w: %v", errForeign, err)
	case foreign:
		return fmt.Errorf("%w: from another user namespace", errForeign)
	}
	return s.outsideContainers(l)
}

// outsideContainers lets in who shares our mount namespace (which, if we are
// in a container ourselves, is that container) or stands on the host as
// attested. Only the host's root can join our mount namespace.
func (s *Server) outsideContainers(l *link) error {
	theirs, err := l.Process().Namespace("mnt")
	if err != nil {
		return fmt.Errorf("%w: %v", errForeign, err)
	}
	ours, err := ownNamespace("mnt")
	if err != nil {
		return fmt.Errorf("%w: %v", errForeign, err)
	}
	if theirs == ours {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.Background(), challengeTime)
	defer cancel()
	ev, err := s.Attestors.Attest(ctx, l.Process())
	switch {
	case err != nil:
		return fmt.Errorf("%w: %v", errForeign, err)
	case !ev.Has(onHost):
		return fmt.Errorf("%w: from a container or another mount namespace", errForeign)
	}
	return nil
}

var onHost = attestor.Selector{Type: "process", Value: "host:true"}

// inAdminGroup looks at the group of the process and at its supplementary ones.
func (s *Server) inAdminGroup(l *link) (bool, error) {
	if s.AdminGroup < 0 {
		return false, nil
	}
	if l.Credentials().EGID == uint32(s.AdminGroup) {
		return true, nil
	}
	status, err := l.Process().ReadFile("status")
	if err != nil {
		return false, err
	}
	for line := range bytes.Lines(status) {
		if list, ok := bytes.CutPrefix(line, []byte("Groups:")); ok {
			return slices.ContainsFunc(bytes.Fields(list), func(f []byte) bool {
				return string(f) == strconv.Itoa(s.AdminGroup)
			}), nil
		}
	}
	return false, nil
}

// admitAdmin lets administrators in, and counts them for nobody.
func (s *Server) admitAdmin(ctx context.Context, _ string) (*account, error) {
	return nil, s.guard(ctx)
}

func (s *Server) guard(ctx context.Context) error {
	l := linkOf(ctx)
	switch {
	case l == nil:
		return errForeign
	case l.refused != nil:
		return l.refused
	}
	return s.check(l)
}

func denyAdmin(_ context.Context, _ string, err error) error { return adminStatus(err) }

// admin is our own API for administrators.
type admin struct {
	adminv1.UnimplementedAdminServer
	s *Server
}

// open pins the process that has this PID now.
func (a *admin) open(pid int32) (*peer.Process, error) {
	if pid <= 0 {
		return nil, invalid("PID %d is not one", pid)
	}
	p, err := a.s.Processes.Open(pid)
	if errors.Is(err, peer.ErrGone) || errors.Is(err, fs.ErrNotExist) {
		return nil, &fault{errNotFound, fmt.Sprintf("no process has the PID %d", pid)}
	}
	return p, err
}

// AttestProcess gathers anew: who asks wants to know what holds now.
func (a *admin) AttestProcess(ctx context.Context, in *adminv1.AttestProcessRequest) (*adminv1.AttestProcessResponse, error) {
	p, err := a.open(in.Pid)
	if err != nil {
		return nil, adminStatus(err)
	}
	defer p.Close()
	set, _ := a.s.Registry.Set()
	ev, err := a.s.Attestors.Refresh(ctx, p)
	if err != nil {
		return nil, adminStatus(err)
	}
	out := &adminv1.AttestProcessResponse{Selectors: spireSelectors(ev.Selectors), Traced: ev.Traced}
	for _, u := range ev.Unknown {
		out.Unknown = append(out.Unknown, &adminv1.Unknown{Prefixes: u.Prefixes, Reason: u.Err.Error()})
	}
	m := set.Match(ev)
	for _, e := range uniqueHints(m.Entries) {
		out.SpiffeIds = append(out.SpiffeIds, e.SPIFFEID.String())
	}
	for _, u := range m.Unfilled {
		out.Unfilled = append(out.Unfilled, &adminv1.Unfilled{EntryId: u.ID, Path: u.Path, Reason: u.Reason})
	}
	return out, nil
}

func (a *admin) ListEntries(_ context.Context, in *adminv1.ListEntriesRequest) (*adminv1.ListEntriesResponse, error) {
	set, _ := a.s.Registry.Set()
	if in.Id != "" {
		e, ok := set.Entry(in.Id)
		if !ok {
			return nil, adminStatus(registry.ErrNotFound)
		}
		return &adminv1.ListEntriesResponse{Entries: []*adminv1.Entry{ourEntry(e)}}, nil
	}
	want, err := readSelectors(in.Selectors)
	if err != nil {
		return nil, adminStatus(err)
	}
	out := &adminv1.ListEntriesResponse{}
	for _, e := range set.Entries() {
		if in.SpiffeId != "" && a.s.TrustDomain.IDString()+e.Path != in.SpiffeId {
			continue
		}
		if slices.ContainsFunc(want, func(s attestor.Selector) bool { return !slices.Contains(e.Selectors, s) }) {
			continue
		}
		out.Entries = append(out.Entries, ourEntry(e))
	}
	return out, nil
}

func (a *admin) CreateEntry(ctx context.Context, in *adminv1.CreateEntryRequest) (*adminv1.CreateEntryResponse, error) {
	e, err := a.create(ctx, in.Entry, a.s.Registry.Create)
	if err != nil {
		return nil, adminStatus(err)
	}
	return &adminv1.CreateEntryResponse{Entry: ourEntry(e), LongestTtl: a.s.longestTTL()}, nil
}

// create stores an entry. Without a parent it is this node's.
func (a *admin) create(ctx context.Context, in *adminv1.Entry, store func(context.Context, registry.Entry) (registry.Entry, error)) (registry.Entry, error) {
	e, err := a.read(in)
	if err != nil {
		return registry.Entry{}, err
	}
	e.ID = in.Entry.Id
	if e, err = store(ctx, e); err != nil {
		return registry.Entry{}, err
	}
	a.s.noteEntry("entry created", e)
	return e, nil
}

// noteEntry logs a change, and warns of an entry that says too little.
func (s *Server) noteEntry(message string, e registry.Entry) {
	s.Log.Info(message, "entry", e.ID, "path", e.Path)
	if why := registry.Weak(e); why != "" {
		s.Log.Warn("weak entry", "entry", e.ID, "reason", why)
	}
}

// longestTTL is in seconds; 0 where the authority is elsewhere.
func (s *Server) longestTTL() int32 {
	if s.Minter == nil {
		return 0
	}
	return int32(min(s.Minter.LongestTTL()/time.Second, math.MaxInt32))
}

func (a *admin) read(in *adminv1.Entry) (registry.Entry, error) {
	var e registry.Entry
	if in.GetEntry() == nil {
		return e, invalid("missing entry")
	}
	if in.Entry.ParentId == nil {
		in.Entry.ParentId = spireID(registry.NodeID(a.s.TrustDomain))
	}
	if err := applySPIRE(&e, in.Entry, nil, a.s.TrustDomain); err != nil {
		return e, err
	}
	applyOurs(&e, in)
	return e, hopeless(e)
}

// hopeless refuses an entry that no process could ever match, though the types
// of its selectors are ours: it is misspelt.
func hopeless(e registry.Entry) error {
	if f := registry.Hopeless(e, false); len(f) > 0 {
		return f
	}
	return nil
}

func (a *admin) UpdateEntry(ctx context.Context, in *adminv1.UpdateEntryRequest) (*adminv1.UpdateEntryResponse, error) {
	next, err := a.read(in.Entry)
	if err != nil {
		return nil, adminStatus(err)
	}
	e, err := a.s.Registry.Update(ctx, in.Entry.Entry.Id, func(e *registry.Entry) error {
		*e = next
		return nil
	})
	if err != nil {
		return nil, adminStatus(err)
	}
	a.s.noteEntry("entry updated", e)
	return &adminv1.UpdateEntryResponse{Entry: ourEntry(e), LongestTtl: a.s.longestTTL()}, nil
}
