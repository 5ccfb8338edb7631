package endpoint

import (
	"cmp"
	"crypto/sha256"
	"maps"
	"slices"
	"strconv"
	"strings"
	"unicode"
	"unicode/utf8"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/types/known/structpb"
)

// A talk is one stream of SDS in one of the two ways in which xDS is spoken.
type talk interface {
	// take hears the client's message. It reports whether there may be something
	// to say.
	take(encoded) (bool, error)
	// say returns what the client does not have yet, nil if that is nothing. In
	// doubt, the secrets may not be all that the process is entitled to.
	say(now *secrets, doubt bool) (mem.BufferSlice, error)
	// returns reports whether the client has secrets from an earlier stream.
	returns() bool
	// leave gives back what the talk took of the budget.
	leave()
}

// A mark is what the client has under one name.
type mark struct {
	version string
	kind    kind
	given   bool // on this stream, by us
	brought bool // from an earlier stream, says the client
	absent  bool // what it has is the word that there is nothing
	again   bool // it is to be sent even if it is the same
}

// talker is what both kinds of talk share: what was asked for and what was
// sent. It keeps versions and no secrets.
type talker struct {
	s       *Server
	account *account
	log     func(message string, args ...any)
	client  []any // what a line of the log says of it
	plain   bool  // the client does not have the SPIFFE validator
	begun   bool
	sub     subscription
	has     map[string]mark
	nonce   uint64            // of the last response; those of this stream count from 1
	refused uint64            // the last nonce whose refusal was logged
	unfit   bool              // it was logged that all bundles are not to be had
	missed  [sha256.Size]byte // of the names of which it was logged last that there is nothing under them
	back    bool              // the client brought something
	brought int               // bytes that the names of what it brought take
	held    int               // bytes for names that the account was charged with
}

func (t *talker) returns() bool { return t.back }

// bring takes the client's word that it has something under a name. Were that
// withdrawn while no stream was open, it would go on with it.
func (t *talker) bring(name, version string) {
	k, ours := t.s.kindOf(name)
	t.mark(name, mark{version: version, kind: k, brought: ours})
	t.back = t.back || ours
}

// kindOf is the kind of secret that a name stands for, whether or not there is
// one; false for a name that no secret of ours can have.
func (s *Server) kindOf(name string) (kind, bool) {
	switch name {
	case s.SecretNames.SVID:
		return kind{}, true
	case s.SecretNames.Bundle, s.SecretNames.AllBundles:
		return kind{context: true, domain: s.TrustDomain.Name()}, true
	}
	id, err := spiffeid.FromString(name)
	if err != nil {
		return kind{}, false
	}
	if id.Path() == "" {
		return kind{context: true, domain: id.TrustDomain().Name()}, true
	}
	return kind{}, true
}

// begin takes from the first request what holds for the whole stream: a node
// is the same whenever it is said again, or it is not listened to.
func (t *talker) begin(n *corev3.Node) {
	t.begun = true
	t.plain = t.s.plain(n)
}

func checkType(url string) error {
	if url != "" && url != secretType { // on a service with one type it is implied
		return invalid("type_url %.100q is not %s", url, secretType)
	}
	return nil
}

// answers reports whether a nonce is of our last response.
func (t *talker) answers(nonce string) bool {
	return t.nonce > 0 && nonce == strconv.FormatUint(t.nonce, 10)
}

// hear logs that the last response was refused, once. It is not sent again
// before it has changed.
func (t *talker) hear(nonce string, refusal *status.Status) {
	if refusal == nil || !t.answers(nonce) || t.refused == t.nonce {
		return
	}
	t.refused = t.nonce
	t.log("client refused secrets", "code", codes.Code(refusal.Code).String(), "reason", legible(refusal.Message))
}

// legible cuts foreign text to what belongs into one line of a log.
func legible(s string) string {
	const most = 300
	if len(s) > most {
		s = s[:most] + "..."
	}
	return strings.Map(func(r rune) rune {
		if r == utf8.RuneError || !unicode.IsPrint(r) {
			return '?'
		}
		return r
	}, s)
}

// settle follows a change of what is wanted. What was sent under other names is
// forgotten: the client may have forgotten it too.
func (t *talker) settle() error {
	maps.DeleteFunc(t.has, func(name string, _ mark) bool { return !t.sub.wants(name) })
	if t.plain && !t.unfit && t.sub.has(t.s.SecretNames.AllBundles) {
		t.unfit = true
		t.log("client without the SPIFFE validator asks for all bundles, which it does not get", "name", t.s.SecretNames.AllBundles)
	}
	holds := t.sub.cost() + t.brought
	if err := t.account.remember(holds-t.held, t.s.Limits.OwnerNames); err != nil {
		return err
	}
	t.held = holds
	return nil
}

func (t *talker) leave() {
	t.account.remember(-t.held, 0)
	t.held = 0
}

// wanted are the names to look at: those asked for, and with a wildcard all
// that are there or were sent.
func (t *talker) wanted(now *secrets) []string {
	if !t.sub.all {
		return t.sub.of(nil)
	}
	return t.sub.of(slices.AppendSeq(now.names(t.plain), maps.Keys(t.has)))
}

// pick returns what the client is to have under a name: the secret, a
// tombstone where it has a secret that is withdrawn, or nil. A key that the
// evidence does not confirm stays where it is and goes nowhere else; of what we
// did not see ourselves, doubt takes nothing.
func (t *talker) pick(now *secrets, name string, doubt bool) (*resource, error) {
	had := t.has[name]
	r, err := now.get(name, t.plain)
	switch {
	case err != nil:
		return nil, err
	case r != nil && (!r.kept || had.given && had.version == r.version):
		return r, nil
	case had.given || had.brought && r == nil && !doubt:
		return t.s.graves.tombstone(name, had.kind, t.plain)
	}
	return nil, nil
}

// miss logs, at debug, the names asked for under which there is nothing: a name
// that is misspelt looks to Envoy like one that comes later. It does once for
// the same names.
func (t *talker) miss(now *secrets, doubt bool) {
	if doubt || !t.s.Log.IsDebug() {
		return
	}
	var names []string
	for _, name := range t.sub.names {
		if r, err := now.get(name, t.plain); r == nil && err == nil && !t.has[name].given {
			names = append(names, name)
		}
	}
	sum := [sha256.Size]byte{}
	if len(names) > 0 {
		sum = sha256.Sum256([]byte(strings.Join(names, "\x00")))
	}
	if sum == t.missed {
		return
	}
	t.missed = sum
	if len(names) > 0 {
		t.s.Log.Debug("client asks for secrets that there are not, or not for it",
			append([]any{"names", legible(strings.Join(names, " ")), "count", len(names)}, t.client...)...)
	}
}

// resend has names sent again though they did not change: a client may have
// forgotten what it did not ask for by this name.
func (t *talker) resend(names []string) {
	for _, name := range names {
		if had, ok := t.has[name]; ok {
			had.again, had.absent = true, false
			t.has[name] = had
		}
	}
}

// lacks reports whether the client is to be sent the resource.
func (t *talker) lacks(r *resource) bool {
	had := t.has[r.name]
	return r.version != had.version || had.again
}

func (t *talker) keep(r *resource) {
	t.mark(r.name, mark{version: r.version, kind: r.kind, given: true})
}

func (t *talker) mark(name string, m mark) {
	if t.has == nil {
		t.has = make(map[string]mark)
	}
	t.has[name] = m
}

// nextNonce names the next response.
func (t *talker) nextNonce() string {
	t.nonce++
	return strconv.FormatUint(t.nonce, 10)
}

// pickAll returns all that the client is to have, and whether it does not have
// some of it.
func (t *talker) pickAll(now *secrets, doubt bool) (all []*resource, changed bool, err error) {
	names := t.wanted(now)
	all = make([]*resource, 0, min(len(names), len(now.svids)+len(now.contexts)+len(t.has)))
	for _, name := range names {
		r, err := t.pick(now, name, doubt)
		if err != nil {
			return nil, false, err
		}
		if r != nil {
			all = append(all, r)
			changed = changed || t.lacks(r)
		}
	}
	return all, changed, nil
}

// versionOf is the version of secrets together, of which there are few.
func versionOf(all []*resource) string {
	switch len(all) {
	case 0:
		return "0"
	case 1:
		return all[0].version
	}
	return digest(all)
}

// plain reports whether a client is to have plain validation contexts: the
// SPIFFE validator came with Envoy 1.18, and the node or the configuration may
// do without. The node's own word counts most.
func (s *Server) plain(n *corev3.Node) bool {
	const key = "disable_spiffe_cert_validation"
	if v := n.GetUserAgentBuildVersion().GetVersion(); v != nil {
		if cmp.Or(cmp.Compare(v.MajorNumber, 1), cmp.Compare(v.MinorNumber, 17)) <= 0 {
			return true
		}
	}
	switch v := n.GetMetadata().GetFields()[key].GetKind().(type) {
	case *structpb.Value_BoolValue:
		return v.BoolValue
	case *structpb.Value_StringValue:
		if b, err := strconv.ParseBool(v.StringValue); err == nil {
			return b
		}
	}
	return s.PlainValidation
}
