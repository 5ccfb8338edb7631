package endpoint

import (
	"context"
	"fmt"
	"slices"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/deputy-id/deputy/svid"
	"github.com/deputy-id/deputy/svid/registry"
)

// errNoWIT is for a client that then does not ask again (Workload API §7).
var errNoWIT = status.Error(codes.Unimplemented, "WIT-SVIDs are not offered")

// A witMessage is a snapshot of WIT-SVIDs as its streams send it.
type witMessage struct {
	ctx  *svid.WITContext
	view *view
	body encoded
}

// fetchWITSVID is fetchX509SVID for WIT-SVIDs: of all of the process's IDs, or
// of the one that it names.
func (s *Server) fetchWITSVID(ctx context.Context, l *link, in *workload.WITSVIDRequest, st grpc.ServerStream) error {
	if !s.WIT {
		return errNoWIT
	}
	var id spiffeid.ID
	if in.SpiffeId != "" {
		var err error
		if id, err = spiffeid.FromString(in.SpiffeId); err != nil {
			return invalid("invalid SPIFFE ID: %v", err)
		}
	}
	return s.stream(ctx, l, st, func(ctx context.Context, l *link, has *state) (*state, error) {
		return s.witState(ctx, l, has, id)
	})
}

func (s *Server) fetchWITBundles(ctx context.Context, l *link, st grpc.ServerStream) error {
	if !s.WIT {
		return errNoWIT
	}
	return s.stream(ctx, l, st, func(ctx context.Context, l *link, has *state) (*state, error) {
		return s.bundleState(ctx, l, has, func(m *bundleMessage) encoded { return m.wit })
	})
}

// witState returns the WIT-SVIDs that the process is entitled to now. While
// one of those that the client has is in doubt it keeps them as they are.
func (s *Server) witState(ctx context.Context, l *link, has *state, id spiffeid.ID) (*state, error) {
	v, entries, err := s.identify(ctx, l, l.session.witDue())
	if err != nil {
		return nil, err
	}
	if has != nil && v.doubts(has.wits) {
		return nil, errUnknown
	}
	if err := v.verdict(); err != nil {
		return nil, err
	}
	if !id.IsZero() && !slices.ContainsFunc(v.Entries, func(e registry.Entry) bool { return e.SPIFFEID == id }) {
		if len(v.Unknown) > 0 {
			return nil, errUnknown // one that depends on what is unknown might do
		}
		return nil, &fault{errNoIdentity, "SPIFFE ID is not held"}
	}
	before := l.session.wit.Load()
	if before == nil || before.view != v || closed(before.ctx.Stale()) {
		if err := l.seat.account().mint(ctx, len(v.Entries), has != nil); err != nil {
			return nil, err
		}
	}
	snapshot, err := s.Keeper.WIT(ctx, l.session.holder, v.Entries)
	if err != nil {
		return nil, err
	}
	if before == nil || before.ctx != snapshot {
		// Signing may have waited: whoever reads the answer is still the one.
		if err := s.check(l); err != nil {
			return nil, err
		}
	}
	m, err := l.session.witMessage(snapshot, v)
	if err != nil {
		return nil, err
	}
	next := &state{
		view: v, entries: entries, stale: snapshot.Stale(), again: len(v.Unknown) > 0,
		wits: snapshot.SVIDs, body: m.body,
	}
	if !id.IsZero() {
		next.wits = slices.DeleteFunc(slices.Clone(snapshot.SVIDs), func(w svid.WIT) bool { return w.Entry.SPIFFEID != id })
		next.body, err = encodeWIT(next.wits)
	}
	return next, err
}

// witDue returns the last snapshot if one of its SVIDs wants renewal.
func (c *session) witDue() any {
	if m := c.wit.Load(); m != nil && closed(m.ctx.Stale()) {
		return m.ctx
	}
	return nil
}

// doubts reports whether the evidence neither confirms nor rules out one of the
// SVIDs: its entry is still there, and it does not match for now.
func (v *view) doubts(wits []svid.WIT) bool {
	return slices.ContainsFunc(wits, func(w svid.WIT) bool {
		if slices.ContainsFunc(v.Entries, func(e registry.Entry) bool { return e.ID == w.Entry.ID }) {
			return false
		}
		e, ok := v.set.Entry(w.Entry.ID)
		return ok && e.Revision == w.Entry.Revision && (len(v.Unknown) > 0 || v.Traced)
	})
}

// witMessage returns the message for a snapshot: made once, whatever the
// number of streams.
func (c *session) witMessage(snapshot *svid.WITContext, v *view) (*witMessage, error) {
	if m := c.wit.Load(); m != nil && m.ctx == snapshot && m.view == v {
		return m, nil
	}
	body, err := encodeWIT(snapshot.SVIDs)
	if err != nil {
		return nil, err
	}
	m := &witMessage{ctx: snapshot, view: v, body: body}
	if !closed(c.proc.Done()) { // else nobody would drop the keys
		c.wit.Store(m)
	}
	return m, nil
}

func encodeWIT(wits []svid.WIT) (encoded, error) {
	out := &workload.WITSVIDResponse{Svids: make([]*workload.WITSVID, 0, len(wits))}
	for _, w := range wits {
		key, err := w.KeyJWK()
		if err != nil {
			return nil, fmt.Errorf("encode key of %s: %w", w.Entry.SPIFFEID, err)
		}
		out.Svids = append(out.Svids, &workload.WITSVID{
			SpiffeId:   w.Entry.SPIFFEID.String(),
			WitSvid:    w.Token,
			WitSvidKey: string(key),
			Hint:       w.Entry.Hint,
		})
	}
	body, err := deterministic.Marshal(out)
	if err != nil {
		return nil, fmt.Errorf("encode WIT-SVIDs: %w", err)
	}
	return body, nil
}
