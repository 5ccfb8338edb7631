package endpoint

import (
	"slices"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Borrowers are those who may get the SVIDs of others.
type Borrowers struct {
	Delegates []spiffeid.ID // on the delegated socket
	Brokers   []Broker
}

// A Broker may use the Broker API.
type Broker struct {
	ID         spiffeid.ID
	References References // over a Unix socket
	OverTCP    References
}

// References are the ways to name a workload.
type References struct{ PID, Kubernetes bool }

// SetBorrowers puts other borrowers in the place of those that there are. Who is
// not among them any more is told so at once, on open streams, too. The caller
// must not change the slices afterwards.
func (s *Server) SetBorrowers(b Borrowers) { s.borrowers.Store(b) }

// brokers are those that there are now.
func (s *Server) brokers() []Broker {
	b, _ := s.borrowers.Load()
	return b.Brokers
}

// listed returns what is configured of a broker, nil if the ID is none's.
func (s *Server) listed(id spiffeid.ID) *Broker {
	all := s.brokers()
	if i := slices.IndexFunc(all, func(b Broker) bool { return b.ID == id }); i >= 0 {
		return &all[i]
	}
	return nil
}

// isDelegate reports whether the ID is a delegate's.
func (s *Server) isDelegate(id spiffeid.ID) bool {
	b, _ := s.borrowers.Load()
	return slices.Contains(b.Delegates, id)
}
