package endpoint

import (
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/deputy-id/deputy/svid/registry"
)

// A filter is what SPIRE's list and count requests share, under two names.
type filter interface {
	GetBySpiffeId() *types.SPIFFEID
	GetByParentId() *types.SPIFFEID
	GetBySelectors() *types.SelectorMatch
	GetByFederatesWith() *types.FederatesWithMatch
	GetByHint() *wrapperspb.StringValue
	GetByDownstream() *wrapperspb.BoolValue
}

// matcher returns the test that all parts of the filter make together.
func matcher(f filter, td spiffeid.TrustDomain) (func(*registry.Entry) bool, error) {
	var tests []func(*registry.Entry) bool
	if in := f.GetBySpiffeId(); in != nil {
		id, err := workloadID(in, td)
		if err != nil {
			return nil, invalid("malformed SPIFFE ID filter: %v", err)
		}
		tests = append(tests, func(e *registry.Entry) bool { return e.Path == id.Path() })
	}
	if in := f.GetByParentId(); in != nil {
		id, err := memberID(in, td)
		if err != nil {
			return nil, invalid("malformed parent ID filter: %v", err)
		}
		tests = append(tests, func(e *registry.Entry) bool { return e.ParentID == id })
	}
	if in := f.GetBySelectors(); in != nil {
		selectors, err := readSelectors(in.Selectors)
		if err != nil {
			return nil, invalid("malformed selectors filter: %v", err)
		}
		fits, err := compare(selectors, int32(in.Match))
		if err != nil {
			return nil, invalid("malformed selectors filter: %v", err)
		}
		tests = append(tests, func(e *registry.Entry) bool { return fits(e.Selectors) })
	}
	if in := f.GetByFederatesWith(); in != nil {
		var tds []spiffeid.TrustDomain
		for _, name := range in.TrustDomains {
			other, err := spiffeid.TrustDomainFromString(name)
			if err != nil {
				return nil, invalid("malformed federates with filter: %v", err)
			}
			tds = append(tds, other)
		}
		fits, err := compare(tds, int32(in.Match))
		if err != nil {
			return nil, invalid("malformed federates with filter: %v", err)
		}
		tests = append(tests, func(e *registry.Entry) bool { return fits(e.FederatesWith) })
	}
	if in := f.GetByHint(); in.GetValue() != "" {
		tests = append(tests, func(e *registry.Entry) bool { return e.Hint == in.Value })
	}
	if in := f.GetByDownstream(); in.GetValue() {
		tests = append(tests, func(*registry.Entry) bool { return false }) // none is kept here
	}
	return func(e *registry.Entry) bool {
		for _, fits := range tests {
			if !fits(e) {
				return false
			}
		}
		return true
	}, nil
}

// compare returns the test of one of SPIRE's four ways to match a set with the
// wanted one. Selectors and trust domains number them alike.
func compare[T comparable](wanted []T, mode int32) (func([]T) bool, error) {
	if len(wanted) == 0 {
		return nil, invalid("empty set")
	}
	want := make(map[T]bool, len(wanted))
	for _, w := range wanted {
		want[w] = true
	}
	common := func(has []T) int {
		n, seen := 0, make(map[T]bool, len(has))
		for _, h := range has {
			if want[h] && !seen[h] {
				n++
			}
			seen[h] = true
		}
		return n
	}
	within := func(has []T) bool {
		for _, h := range has {
			if !want[h] {
				return false
			}
		}
		return len(has) > 0
	}
	switch types.SelectorMatch_MatchBehavior(mode) {
	case types.SelectorMatch_MATCH_EXACT:
		return func(has []T) bool { return within(has) && common(has) == len(want) }, nil
	case types.SelectorMatch_MATCH_SUBSET:
		return within, nil
	case types.SelectorMatch_MATCH_SUPERSET:
		return func(has []T) bool { return common(has) == len(want) }, nil
	case types.SelectorMatch_MATCH_ANY:
		return func(has []T) bool { return common(has) > 0 }, nil
	}
	return nil, invalid("unknown match behavior %d", mode)
}
