package endpoint

import (
	"maps"
	"slices"
)

// What one stream may ask for. Names that do not exist are remembered too:
// they may come to exist.
const (
	maxSecretNames = 1000
	maxSecretBytes = 32 << 10 // of all names together
)

// wildcard is the name of everything (xDS protocol, "How the client specifies
// what resources to return").
const wildcard = "*"

// A subscription is what a stream wants.
type subscription struct {
	names map[string]struct{}
	bytes int  // of the names
	all   bool // everything there is, beside the names
	named bool // something was named: from now on no names are none, not all
}

func (s *subscription) wants(name string) bool {
	_, ok := s.names[name]
	return ok || s.all
}

// add subscribes to one more name.
func (s *subscription) add(name string) error {
	s.named = true
	if name == wildcard {
		s.all = true
		return nil
	}
	if s.has(name) {
		return nil
	}
	switch {
	case len(s.names) >= maxSecretNames:
		return invalid("more than %d resource names", maxSecretNames)
	case s.bytes+len(name) > maxSecretBytes:
		return invalid("resource names are longer than %d bytes together", maxSecretBytes)
	}
	if s.names == nil {
		s.names = make(map[string]struct{})
	}
	s.names[name] = struct{}{}
	s.bytes += len(name)
	return nil
}

func (s *subscription) remove(name string) {
	if name == wildcard {
		s.all = false
	} else if _, ok := s.names[name]; ok {
		delete(s.names, name)
		s.bytes -= len(name)
	}
}

// replace subscribes to these names instead of those before. It returns those
// that are new; the wildcard is one, said or not.
func (s *subscription) replace(names []string) (grown []string, err error) {
	next := subscription{named: s.named}
	for _, name := range names {
		if err := next.add(name); err != nil {
			return nil, err
		}
	}
	if !next.named {
		next.all = true
	}
	for name := range next.names {
		if !s.has(name) {
			grown = append(grown, name)
		}
	}
	if next.all && !s.all {
		grown = append(grown, wildcard)
	}
	*s = next
	return grown, nil
}

func (s *subscription) has(name string) bool {
	_, ok := s.names[name]
	return ok
}

// of returns what is wanted of this, with the names that are wanted whether or
// not they are there; sorted, each once.
func (s *subscription) of(there []string) []string {
	out := slices.AppendSeq(make([]string, 0, len(s.names)+len(there)), maps.Keys(s.names))
	for _, name := range there {
		if s.wants(name) {
			out = append(out, name)
		}
	}
	slices.Sort(out)
	return slices.Compact(out)
}
