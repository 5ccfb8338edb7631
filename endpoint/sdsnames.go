package endpoint

import "slices"

// What one stream may ask for. Names that do not exist are remembered too:
// they may come to exist.
const (
	maxSecretNames = 1000
	maxSecretBytes = 32 << 10 // of all names together

	nameCost = 160 // bytes that a name takes beside its own: its places in a subscription and among the marks
)

// wildcard is the name of everything (xDS protocol, "How the client specifies
// what resources to return").
const wildcard = "*"

// A subscription is what a stream wants.
type subscription struct {
	names []string // sorted, each once
	bytes int      // of the names
	all   bool     // everything there is, beside the names
	named bool     // something was named: from now on no names are none, not all
}

func (s *subscription) has(name string) bool {
	_, ok := slices.BinarySearch(s.names, name)
	return ok
}

// cost is how many bytes the names take.
func (s *subscription) cost() int { return s.bytes + nameCost*len(s.names) }

func (s *subscription) wants(name string) bool { return s.all || s.has(name) }

// add subscribes to more names.
func (s *subscription) add(names []string) error {
	for _, name := range names {
		s.named = true
		if name == wildcard {
			s.all = true
			continue
		}
		at, ok := slices.BinarySearch(s.names, name)
		if ok {
			continue
		}
		switch {
		case len(s.names) >= maxSecretNames:
			return invalid("more than %d resource names", maxSecretNames)
		case s.bytes+len(name) > maxSecretBytes:
			return invalid("resource names are longer than %d bytes together", maxSecretBytes)
		}
		s.names = slices.Insert(s.names, at, name)
		s.bytes += len(name)
	}
	return nil
}

func (s *subscription) remove(name string) {
	if name == wildcard {
		s.all = false
	} else if at, ok := slices.BinarySearch(s.names, name); ok {
		s.names = slices.Delete(s.names, at, at+1)
		s.bytes -= len(name)
	}
}

// replace subscribes to these names instead of those before. It returns those
// that are new; the wildcard is one, said or not.
func (s *subscription) replace(names []string) (grown []string, err error) {
	next := subscription{named: s.named, names: make([]string, 0, min(len(names), maxSecretNames))}
	if err := next.add(names); err != nil {
		return nil, err
	}
	if !next.named {
		next.all = true
	}
	for _, name := range next.names {
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

// of returns the names, and all that are wanted of what is there; sorted, each
// once. The caller does not change them.
func (s *subscription) of(there []string) []string {
	if len(there) == 0 {
		return s.names
	}
	out := slices.Clone(s.names)
	for _, name := range there {
		if s.wants(name) {
			out = append(out, name)
		}
	}
	slices.Sort(out)
	return slices.Compact(out)
}
