// Package claims maps SPIFFE IDs to delegation claims by rules that an operator
// writes, and is the CredentialComposer that puts them into what a SPIRE server
// signs.
//
// It defends against an ID that is made up so that it gets another team's
// claims (a segment is data and stands for one segment, two rules that could
// both be meant are refused), against a rule that is misspelt and so not in
// force, and against a file that breaks while the server runs: the last good
// rules stay. Nothing in it may panic or wait: a composer that dies stops the
// server from signing.
//
// Rules are immutable and map as a pure function; who keeps them up to date is
// the Rulebook.
package claims

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/deputy-id/deputy/delegation"
)

// ErrDenied says that the rules want no token for an ID.
var ErrDenied = errors.New("the rules deny a token")

// Rules say which claims an ID gets. They are immutable.
type Rules struct {
	name        string // of the claim
	denyUnknown bool   // no rule, no token
	omitOnError bool
	trustDomain spiffeid.TrustDomain // zero: not known, and full IDs agree on one
	rules       []rule
	index       index
	origin      origin
	warning     string
}

// A rule is one rule block.
type rule struct {
	text *text
	at   pos
	pattern

	subject, issuer, owner, agentType, purpose template
	scopes, chain, mayAct                      []template
	maxDepth                                   int
	rate                                       *delegation.Rate
	expires                                    time.Time
	x509                                       *certificate
}

// where is FILE:LINE, for other rules' messages.
func (r *rule) where() string {
	line, _ := r.text.place(r.at)
	return fmt.Sprintf("%s:%d", r.text.Name, line)
}

// Len is the number of rules.
func (r *Rules) Len() int { return len(r.rules) }

// ClaimName is the name of the claim.
func (r *Rules) ClaimName() string { return r.name }

// Warning is what is doubtful about the rules' file, though they may be used;
// empty: nothing.
func (r *Rules) Warning() string { return r.warning }

// OmitOnError reports whether a token is to be signed without the claim when
// Claims returns an error.
func (r *Rules) OmitOnError() bool { return r.omitOnError }

// Claims returns what the token of an ID carries, or nil if it carries nothing.
// The error is ErrDenied if there is to be no token, and another one if the
// claims cannot be made of the rule that the ID has.
func (r *Rules) Claims(id spiffeid.ID, now time.Time) (*delegation.Claims, error) {
	rule, segments, err := r.match(id)
	if err != nil {
		return nil, err
	}
	if rule == nil || rule.expired(now) {
		if r.denyUnknown {
			return nil, fmt.Errorf("no rule in force for %s: %w", id, ErrDenied)
		}
		return nil, nil
	}
	c, err := rule.claims(id, segments)
	if err != nil {
		return nil, fmt.Errorf("claims of %s by the rule at %s: %w", id, rule.where(), err)
	}
	return c, nil
}

// match finds the most specific rule of an ID.
func (r *Rules) match(id spiffeid.ID) (*rule, []string, error) {
	switch {
	case !r.trustDomain.IsZero() && !id.MemberOf(r.trustDomain):
		return nil, nil, fmt.Errorf("claims of %q: not of trust domain %s", id, r.trustDomain)
	case len(id.TrustDomain().Name())+len(id.Path())+len("spiffe://") > maxID:
		return nil, nil, fmt.Errorf("claims of an ID that is longer than %d bytes", maxID)
	case id.Path() == "":
		return nil, nil, nil
	}
	segments := strings.Split(id.Path()[1:], "/")
	n := r.index.find(segments)
	if n < 0 || segments[0] == "spire" { // those are SPIRE's own
		return nil, nil, nil
	}
	return &r.rules[n], segments, nil
}

func (r *rule) expired(now time.Time) bool { return !r.expires.IsZero() && !now.Before(r.expires) }

func (r *rule) claims(id spiffeid.ID, segments []string) (*delegation.Claims, error) {
	c := &delegation.Claims{
		Version:   delegation.Version,
		Depth:     1 + len(r.chain),
		MaxDepth:  r.maxDepth,
		Issuer:    r.issuer.expand(segments),
		Subject:   r.subject.expand(segments),
		NotAfter:  r.expires,
		Owner:     r.owner.expand(segments),
		AgentType: r.agentType.expand(segments),
		Purpose:   r.purpose.expand(segments),
	}
	actors := make([]string, 1, c.Depth)
	actors[0] = id.String()
	for i := range r.chain {
		actor, err := expandID(&r.chain[i], id.TrustDomain(), segments)
		if err != nil {
			return nil, fmt.Errorf("chain: %w", err)
		}
		if slices.Contains(actors, actor) {
			return nil, fmt.Errorf("chain: %s would act for itself", actor)
		}
		actors = append(actors, actor)
	}
	c.Act = delegation.Chain(actors...)
	for i := range r.mayAct {
		actor, err := expandID(&r.mayAct[i], id.TrustDomain(), segments)
		if err != nil {
			return nil, fmt.Errorf("may_act: %w", err)
		}
		c.MayAct = append(c.MayAct, actor)
	}
	for i := range r.scopes {
		c.Scopes = append(c.Scopes, r.scopes[i].expand(segments))
	}
	if r.rate != nil {
		rate := *r.rate
		c.Constraints = &delegation.Constraints{Rate: &rate}
	}
	return c, nil
}

// expandID makes a full SPIFFE ID of a path or a SPIFFE ID with segments in it.
func expandID(t *template, td spiffeid.TrustDomain, segments []string) (string, error) {
	s := t.expand(segments)
	if s[0] == '/' {
		s = td.IDString() + s
	}
	id, err := spiffeid.FromString(s)
	switch {
	case err != nil:
		return "", fmt.Errorf("%q: %w", s, err)
	case id.Path() == "":
		return "", fmt.Errorf("%q is a trust domain and no agent", s)
	case len(s) > maxID:
		return "", fmt.Errorf("an ID is longer than %d bytes", maxID)
	}
	return s, nil
}
