package endpoint

import (
	"context"
	"errors"

	"github.com/deputy-id/deputy/attestor"
	"github.com/deputy-id/deputy/attestor/peer"
	adminv1 "github.com/deputy-id/deputy/proto/deputy/admin/v1"
	"github.com/deputy-id/deputy/svid/registry"
)

// names keeps which process was registered under which name, as long as it lives.
type names interface {
	Register(p *peer.Process, name string) error
}

// RegisterExec gives a process a name, and an entry that ends with it.
func (a *admin) RegisterExec(ctx context.Context, in *adminv1.RegisterExecRequest) (*adminv1.RegisterExecResponse, error) {
	if a.s.Names == nil {
		return nil, adminStatus(errElsewhere)
	}
	if err := attestor.CheckSelector(attestor.Selector{Type: "process", Value: "exec:" + in.Name}); err != nil {
		return nil, adminStatus(invalid("%v", err))
	}
	p, err := a.open(in.Pid)
	if err != nil {
		return nil, adminStatus(err)
	}
	out := &adminv1.RegisterExecResponse{}
	if in.Entry != nil {
		e, err := a.create(ctx, in.Entry, a.s.Registry.CreateTransient)
		if err != nil {
			p.Close()
			return nil, adminStatus(err)
		}
		out.EntryId = e.ID
	}
	if err := a.s.Names.Register(p, in.Name); err != nil {
		a.removeEntry(out.EntryId)
		p.Close()
		return nil, adminStatus(err)
	}
	a.s.Log.Info("process registered", "pid", in.Pid, "name", in.Name, "entry", out.EntryId)
	go func() {
		// The hold on the process ends with it, and so does its entry.
		<-p.Done()
		a.removeEntry(out.EntryId)
		p.Close()
	}()
	return out, nil
}

func (a *admin) removeEntry(id string) {
	if id == "" {
		return
	}
	// A transient entry lives in memory: there is nothing to wait for.
	if _, err := a.s.Registry.Delete(context.Background(), id); err != nil && !errors.Is(err, registry.ErrNotFound) {
		a.s.Log.Error("entry of an ended process stays", "entry", id, "error", err)
	}
}
