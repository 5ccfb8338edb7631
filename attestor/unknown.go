package attestor

import (
	"errors"

	"github.com/deputy-id/deputy/attestor/peer"
)

// unknowns collects what one attestor could not find out.
type unknowns struct {
	prefixes []string
	errs     []error
}

// add notes that selectors with these prefixes are unknown because of err.
func (u *unknowns) add(err error, prefixes ...string) {
	u.prefixes = append(u.prefixes, prefixes...)
	u.errs = append(u.errs, err)
}

// err returns what was collected as an error: ErrGone if the process has
// ended, since that explains the rest, and nil if nothing is unknown.
func (u *unknowns) err(p *peer.Process) error {
	switch {
	case len(u.errs) == 0:
		return nil
	case errors.Is(p.Alive(), peer.ErrGone):
		return ErrGone
	}
	return &Unknown{Prefixes: u.prefixes, Err: errors.Join(u.errs...)}
}
