// Package delegation is the vocabulary in which Deputy says whom an agent acts
// for. It holds what goes into a token; who may say it is its callers' affair.
//
// It defends against a claim that changes its meaning on the way: the object
// that a JWT-SVID carries passes through a protobuf Struct, where every number
// is a float, so times are strings and numbers stay small.
package delegation

import "time"

const (
	// Version is the v of every object that is written.
	Version = 1
	// MaxDepth is the longest chain that anybody may write or accept.
	MaxDepth = 8
	// MaxNumber is the largest number in the object: above it a float is
	// printed with an exponent, which decoders of integers refuse.
	MaxNumber = 999_999
)

// Claims is the one private object of a JWT-SVID: whom the SVID's subject acts
// for, through whom, and how far. It is context that an issuer vouches for at
// the time of issue; nobody exercises authority with it.
//
// What is empty is left out of the object.
type Claims struct {
	Version     int          `json:"v"`
	ChainID     string       `json:"chain_id,omitempty"` // of live grants, as ID and Principal are
	ID          string       `json:"id,omitempty"`
	Depth       int          `json:"depth"`               // actors in Act
	MaxDepth    int          `json:"max_depth,omitempty"` // actors that there may be at most
	Issuer      string       `json:"iss,omitempty"`       // who vouches for Subject
	Subject     string       `json:"sub,omitempty"`       // the human or system at the root
	Act         *Actor       `json:"act,omitempty"`       // the SVID's subject outermost
	MayAct      []string     `json:"may_act,omitempty"`   // SPIFFE IDs that it may delegate to
	Scopes      []string     `json:"scopes,omitempty"`
	Constraints *Constraints `json:"constraints,omitempty"`
	NotAfter    time.Time    `json:"not_after,omitzero"` // whole seconds, UTC
	Principal   string       `json:"principal,omitempty"`
	Owner       string       `json:"owner,omitempty"`
	AgentType   string       `json:"agent_type,omitempty"`
	Purpose     string       `json:"purpose,omitempty"`
}

// An Actor is one link of a chain, with the one that delegated to it inside
// (RFC 8693 §4.1).
type Actor struct {
	Subject string `json:"sub"` // a SPIFFE ID
	Act     *Actor `json:"act,omitempty"`
}

// Constraints bound how the delegation may be used.
type Constraints struct {
	Rate *Rate `json:"rate,omitempty"`
}

// A Rate is so many uses in each window.
type Rate struct {
	Limit  int `json:"limit"`
	Window int `json:"window"` // seconds
}

// Chain nests actors: the first is the outermost.
func Chain(actors ...string) *Actor {
	var act *Actor
	for i := len(actors) - 1; i >= 0; i-- {
		act = &Actor{Subject: actors[i], Act: act}
	}
	return act
}

// Map is the object as a protobuf Struct takes it: nothing but strings, ints,
// lists and maps. It encodes to the JSON that Claims itself does.
func (c *Claims) Map() map[string]any {
	m := map[string]any{"v": c.Version, "depth": c.Depth}
	text := func(key, value string) {
		if value != "" {
			m[key] = value
		}
	}
	text("chain_id", c.ChainID)
	text("id", c.ID)
	if c.MaxDepth != 0 {
		m["max_depth"] = c.MaxDepth
	}
	text("iss", c.Issuer)
	text("sub", c.Subject)
	if c.Act != nil {
		m["act"] = c.Act.asMap()
	}
	list := func(key string, values []string) {
		if len(values) == 0 {
			return
		}
		all := make([]any, len(values))
		for i, v := range values {
			all[i] = v
		}
		m[key] = all
	}
	list("may_act", c.MayAct)
	list("scopes", c.Scopes)
	if c.Constraints != nil {
		bounds := make(map[string]any)
		if r := c.Constraints.Rate; r != nil {
			bounds["rate"] = map[string]any{"limit": r.Limit, "window": r.Window}
		}
		m["constraints"] = bounds
	}
	if !c.NotAfter.IsZero() {
		m["not_after"] = c.NotAfter.Format(time.RFC3339)
	}
	text("principal", c.Principal)
	text("owner", c.Owner)
	text("agent_type", c.AgentType)
	text("purpose", c.Purpose)
	return m
}

func (a *Actor) asMap() map[string]any {
	m := map[string]any{"sub": a.Subject}
	if a.Act != nil {
		m["act"] = a.Act.asMap()
	}
	return m
}
