package container

import (
	"github.com/deputy-id/deputy/attestor"
	"github.com/deputy-id/deputy/attestor/peer"
)

// A place is the container that the kernel says a process is in: its ID, and
// the cgroup directory, made by root, that carries it. Zero for none. Values
// compare with ==.
type place = attestor.ContainerRef

// placeOf looks at where the process is now.
func placeOf(p *peer.Process) (place, error) {
	at, err := attestor.PlaceOf(p)
	if err != nil || at.Container == nil {
		return place{}, err
	}
	return *at.Container, nil
}
