package endpoint

import (
	"context"
	"errors"
	"slices"
	"strings"

	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"

	"github.com/deputy-id/deputy/svid/registry"
)

// entries is SPIRE's entry API over the registry. What a SPIRE agent asks its
// server (GetAuthorizedEntries, SyncAuthorizedEntries) is not offered.
type entries struct {
	entryv1.UnimplementedEntryServer
	s *Server
}

func (a *entries) CountEntries(_ context.Context, in *entryv1.CountEntriesRequest) (*entryv1.CountEntriesResponse, error) {
	match, err := matcher(in.Filter, a.s.TrustDomain)
	if err != nil {
		return nil, adminStatus(err)
	}
	return &entryv1.CountEntriesResponse{Count: int32(len(a.list(match)))}, nil
}

// ListEntries pages by entry ID: entries that come and go between two pages
// move no other.
func (a *entries) ListEntries(_ context.Context, in *entryv1.ListEntriesRequest) (*entryv1.ListEntriesResponse, error) {
	match, err := matcher(in.Filter, a.s.TrustDomain)
	if err != nil {
		return nil, adminStatus(err)
	}
	found := a.list(match)
	out := &entryv1.ListEntriesResponse{}
	if in.PageSize > 0 {
		slices.SortFunc(found, func(x, y registry.Entry) int { return strings.Compare(x.ID, y.ID) })
		if in.PageToken != "" {
			at, exact := slices.BinarySearchFunc(found, in.PageToken, func(e registry.Entry, id string) int { return strings.Compare(e.ID, id) })
			if exact {
				at++
			}
			found = found[at:]
		}
		if n := int(in.PageSize); len(found) > n {
			found = found[:n]
			out.NextPageToken = found[n-1].ID
		}
	}
	for _, e := range found {
		out.Entries = append(out.Entries, maskEntry(spireEntry(e), in.OutputMask))
	}
	return out, nil
}

func (a *entries) GetEntry(ctx context.Context, in *entryv1.GetEntryRequest) (*types.Entry, error) {
	if in.Id == "" {
		return nil, adminStatus(invalid("missing ID"))
	}
	e, err := a.s.Registry.Get(ctx, in.Id)
	if err != nil {
		return nil, adminStatus(err)
	}
	return maskEntry(spireEntry(e), in.OutputMask), nil
}

func (a *entries) BatchCreateEntry(ctx context.Context, in *entryv1.BatchCreateEntryRequest) (*entryv1.BatchCreateEntryResponse, error) {
	out := &entryv1.BatchCreateEntryResponse{}
	for _, one := range in.Entries {
		r := &entryv1.BatchCreateEntryResponse_Result{}
		e, err := a.create(ctx, one)
		if err == nil || errors.Is(err, registry.ErrExists) && e.ID != "" {
			r.Entry = maskEntry(spireEntry(e), in.OutputMask)
		}
		r.Status = itemStatus(err)
		out.Results = append(out.Results, r)
	}
	return out, nil
}

func (a *entries) create(ctx context.Context, in *types.Entry) (registry.Entry, error) {
	var e registry.Entry
	if err := applySPIRE(&e, in, nil, a.s.TrustDomain); err != nil {
		return registry.Entry{}, err
	}
	if err := hopeless(e); err != nil {
		return registry.Entry{}, err
	}
	if err := a.federated(&e); err != nil {
		return registry.Entry{}, err
	}
	e.ID = in.Id
	e, err := a.s.Registry.Create(ctx, e)
	if err == nil {
		a.s.noteEntry("entry created", e)
	}
	return e, err
}

// federated refuses an entry that federates with a trust domain whose bundle
// is not here, as SPIRE does: the first thing to do is to set that.
func (a *entries) federated(e *registry.Entry) error {
	bundles, _ := a.s.Authority.Bundles()
	for _, td := range e.FederatesWith {
		if _, ok := bundles.Of(td); !ok {
			return &fault{errInUse, "unable to find federated bundle " + td.IDString()}
		}
	}
	return nil
}

func (a *entries) BatchUpdateEntry(ctx context.Context, in *entryv1.BatchUpdateEntryRequest) (*entryv1.BatchUpdateEntryResponse, error) {
	out := &entryv1.BatchUpdateEntryResponse{}
	for _, one := range in.Entries {
		r := &entryv1.BatchUpdateEntryResponse_Result{}
		e, err := a.s.Registry.Update(ctx, one.GetId(), func(e *registry.Entry) error {
			if err := applySPIRE(e, one, in.InputMask, a.s.TrustDomain); err != nil {
				return err
			}
			if m := in.InputMask; m == nil || m.Selectors || m.SpiffeId {
				if err := hopeless(*e); err != nil {
					return err
				}
			}
			if in.InputMask == nil || in.InputMask.FederatesWith {
				return a.federated(e)
			}
			return nil
		})
		if err == nil {
			r.Entry = maskEntry(spireEntry(e), in.OutputMask)
			a.s.noteEntry("entry updated", e)
		}
		r.Status = itemStatus(err)
		out.Results = append(out.Results, r)
	}
	return out, nil
}

func (a *entries) BatchDeleteEntry(ctx context.Context, in *entryv1.BatchDeleteEntryRequest) (*entryv1.BatchDeleteEntryResponse, error) {
	out := &entryv1.BatchDeleteEntryResponse{}
	for _, id := range in.Ids {
		var err error
		if id == "" {
			err = invalid("missing entry ID")
		} else if _, err = a.s.Registry.Delete(ctx, id); err == nil {
			a.s.Log.Info("entry deleted", "entry", id)
		}
		out.Results = append(out.Results, &entryv1.BatchDeleteEntryResponse_Result{Id: id, Status: itemStatus(err)})
	}
	return out, nil
}

func (a *entries) list(match func(*registry.Entry) bool) []registry.Entry {
	set, _ := a.s.Registry.Set()
	return slices.DeleteFunc(set.Entries(), func(e registry.Entry) bool { return !match(&e) })
}
