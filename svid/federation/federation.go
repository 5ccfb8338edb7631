// Package federation exchanges trust bundles with other trust domains, as the
// SPIFFE Federation standard says: an Endpoint serves our own bundle, and a
// Follower fetches those of others and keeps them fresh.
//
// It defends against an endpoint that is not the one that was configured, that
// answers without end or not at all, that leads elsewhere, or that serves an old
// copy; what cannot be believed leaves the last good bundle in force. A bundle
// that is believed replaces the one before whole, however much less it trusts:
// taking keys away is how a trust domain revokes them. Bundles are never merged,
// and nothing in a bundle says whose it is: that is the configuration's alone.
//
// A bundle may hold keys of a third trust domain. That makes the third one able
// to speak for the one whose bundle it is, by that one's own word, and not the
// other way round; nothing here forbids it, since whoever copied another's keys
// could otherwise stop that other's updates. One that is our own has come from a
// wrong URL, and is refused (svid.Bundle.CheckForeign).
//
// It does not defend against an endpoint whose keys, or whose server's, are in
// the hands of an attacker: he is that trust domain.
//
// A caller owes the Follower a Run and the Endpoint a Serve, each until its
// context ends.
package federation

import (
	"errors"
	"fmt"
	"net/url"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/deputy-id/deputy/svid"
)

// What a caller may branch on.
var (
	ErrNotFollowed = errors.New("no relationship with that trust domain")
	ErrWrongServer = errors.New("server is not the bundle endpoint that is configured")
	ErrOlder       = errors.New("bundle is older than the one there is")
	ErrNoTrust     = errors.New("no bundle to verify the endpoint with")
)

// How often an endpoint is asked (SPIFFE Federation §4.1).
const (
	// defaultHint is for bundles that have none.
	defaultHint = 5 * time.Minute
	// minHint is below what a trust domain whose keys live for the shortest
	// time that we allow, 30 s, asks for (2 s), and costs both a handshake a second.
	minHint = time.Second
	// maxHint bounds how long a key that was taken out of a bundle is believed
	// here, whatever its publisher thinks of it.
	maxHint = time.Hour
	// retryFirst is how soon a relationship that has not been established is
	// tried again, doubled each time: the other side may be starting, too. One
	// that was is not tried before its next turn (§6.2).
	retryFirst = 5 * time.Second
	// pause is the least time between two changes of one bundle that are taken
	// without being asked for: each wakes every stream of the host. It is half
	// of what the shortest life of keys leaves to see a new one.
	pause = 5 * time.Second
	// staleAfter is how many turns in a row may fail before a person has to look:
	// a key may sign three to five turns after it was published.
	staleAfter = 5
)

// A Relationship says where the bundle of another trust domain comes from.
type Relationship struct {
	TrustDomain spiffeid.TrustDomain
	URL         string      // https
	EndpointID  spiffeid.ID // of the server, for the profile https_spiffe; zero: https_web
	Roots       string      // https_web: a PEM file of CAs, read at each fetch; empty: the system's
	Bootstrap   *svid.Bundle
	// Bootstrap is put in force if there is no bundle yet; nil: none.
}

// Profile is the name of the endpoint profile.
func (r Relationship) Profile() string {
	if r.EndpointID.IsZero() {
		return "https_web"
	}
	return "https_spiffe"
}

// where is the URL as logs have it: without its query, which may be a secret.
func (r Relationship) where() string {
	u, err := url.Parse(r.URL)
	if err != nil {
		return ""
	}
	return (&url.URL{Scheme: u.Scheme, Host: u.Host, Path: u.Path, RawPath: u.RawPath}).String()
}

func (r Relationship) same(o Relationship) bool {
	return r.TrustDomain == o.TrustDomain && r.URL == o.URL && r.EndpointID == o.EndpointID && r.Roots == o.Roots &&
		r.Bootstrap.Equal(o.Bootstrap)
}

// trust returns the bundle that the server of the endpoint is verified with,
// nil if it is not there; for https_web it never is. For an endpoint that serves
// the bundle of its own trust domain that is the latest one of that domain, which
// is the bootstrap bundle at first (§5.2.2.4).
func (r Relationship) trust(all *svid.Bundles) *svid.Bundle {
	if r.EndpointID.IsZero() || all == nil {
		return nil
	}
	b, _ := all.Of(r.EndpointID.TrustDomain())
	return b
}

// interval is the time between two fetches; b may be nil.
func interval(b *svid.Bundle) time.Duration {
	if b == nil || b.RefreshHint <= 0 {
		return defaultHint
	}
	return min(max(b.RefreshHint, minHint), maxHint)
}

// checkURL refuses what is no URL of a bundle endpoint (§5.2.1.1, §5.2.2.1),
// which holds for the target of a redirect, too. Errors quote no more than the
// host: the rest may be a stranger's, or a secret of his.
func checkURL(u *url.URL) error {
	switch {
	case u.Scheme != "https":
		return fmt.Errorf("URL at host %.100q is not https", u.Host)
	case u.Hostname() == "":
		return errors.New("URL has no host")
	case u.User != nil:
		return fmt.Errorf("URL at host %.100q has a user in it", u.Host)
	}
	return nil
}
