package claims

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	composerv1 "github.com/spiffe/spire-plugin-sdk/proto/spire/plugin/server/credentialcomposer/v1"
	configv1 "github.com/spiffe/spire-plugin-sdk/proto/spire/service/common/config/v1"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/structpb"
)

// sourceName stands in messages for the text that SPIRE hands over.
const sourceName = "plugin_data"

// A Composer is the CredentialComposer of a SPIRE server. The calls that it
// does not implement are answered with Unimplemented, which SPIRE takes for "as
// it is".
//
// What it composes it composes from memory; only Configure and Validate read a
// file. Whoever makes one calls Close at the end.
type Composer struct {
	composerv1.UnimplementedCredentialComposerServer
	configv1.UnimplementedConfigServer

	log    hclog.Logger
	book   atomic.Pointer[Rulebook] // nil until it is configured
	mu     sync.Mutex               // guards what follows
	cancel context.CancelFunc       // ends the following of the file; nil: not begun
	done   chan struct{}
}

// NewComposer returns a composer that refuses everything until it is
// configured.
func NewComposer() *Composer { return &Composer{log: hclog.NewNullLogger()} }

// SetLogger implements pluginsdk.NeedsLogger; SPIRE calls it before any other.
func (c *Composer) SetLogger(log hclog.Logger) { c.log = log }

// Configure puts rules in force. When it refuses them those before stay.
func (c *Composer) Configure(ctx context.Context, req *configv1.ConfigureRequest) (_ *configv1.ConfigureResponse, err error) {
	defer c.survive(&err)
	rules, err := c.load(ctx, req.GetCoreConfiguration(), req.GetHclConfiguration())
	if err != nil {
		return nil, status.Errorf(codes.InvalidArgument, "%s", err)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	book := c.book.Load()
	if book == nil {
		book = NewRulebook(c.log)
	}
	book.Put(rules)
	c.book.Store(book)
	if c.cancel == nil {
		var follow context.Context
		follow, c.cancel = context.WithCancel(context.Background())
		done := make(chan struct{})
		c.done = done
		go func() {
			defer close(done)
			c.follow(follow, book)
		}()
	}
	c.log.Info("rules in force", "rules", rules.Len(), "claim_name", rules.name)
	return &configv1.ConfigureResponse{}, nil
}

// follow follows the rules file. A mistake of ours in it must not stop the
// server from signing.
func (c *Composer) follow(ctx context.Context, book *Rulebook) {
	for ctx.Err() == nil {
		var err error
		func() {
			defer c.survive(&err)
			book.Run(ctx)
		}()
	}
}

// Validate says what is wrong with rules, and changes nothing.
func (c *Composer) Validate(ctx context.Context, req *configv1.ValidateRequest) (_ *configv1.ValidateResponse, err error) {
	defer c.survive(&err)
	_, err = c.load(ctx, req.GetCoreConfiguration(), req.GetHclConfiguration())
	var problems Problems
	switch {
	case errors.As(err, &problems):
		notes := make([]string, len(problems))
		for i, p := range problems {
			notes[i] = p.String()
		}
		return &configv1.ValidateResponse{Notes: notes}, nil
	case err != nil:
		return &configv1.ValidateResponse{Notes: []string{err.Error()}}, nil
	}
	// No note: spire-server validate takes any for a failure.
	return &configv1.ValidateResponse{Valid: true}, nil
}

func (c *Composer) load(ctx context.Context, core *configv1.CoreConfiguration, hcl string) (*Rules, error) {
	td, err := spiffeid.TrustDomainFromString(core.GetTrustDomain())
	if err != nil {
		return nil, fmt.Errorf("trust domain of the server: %w", err)
	}
	return Load(ctx, Source{Name: sourceName, Text: hcl}, td)
}

// Close ends the following of the rules file.
func (c *Composer) Close() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.cancel != nil {
		c.cancel()
		<-c.done
		c.cancel = nil
	}
	return nil
}

// ComposeWorkloadJWTSVID adds the claim. Whatever is in the claims before stays
// as it is, and an ID without a rule gets an empty answer, by which SPIRE leaves
// its own claims alone.
func (c *Composer) ComposeWorkloadJWTSVID(_ context.Context, req *composerv1.ComposeWorkloadJWTSVIDRequest) (_ *composerv1.ComposeWorkloadJWTSVIDResponse, err error) {
	defer c.survive(&err)
	rules, err := c.rules()
	if err != nil {
		return nil, err
	}
	attributes, err := rules.compose(req.GetSpiffeId(), req.GetAttributes(), time.Now())
	if err := c.judge(rules, req.GetSpiffeId(), err); err != nil {
		return nil, err
	}
	return &composerv1.ComposeWorkloadJWTSVIDResponse{Attributes: attributes}, nil
}

func (r *Rules) compose(name string, before *composerv1.JWTSVIDAttributes, now time.Time) (*composerv1.JWTSVIDAttributes, error) {
	id, err := spiffeid.FromString(name)
	if err != nil {
		return nil, err
	}
	claims, err := r.Claims(id, now)
	if claims == nil || err != nil {
		return nil, err
	}
	fields := before.GetClaims().GetFields()
	if _, taken := fields[r.name]; taken {
		return nil, fmt.Errorf("the claim %s is there already, of another composer", r.name)
	}
	object, err := structpb.NewStruct(claims.Map())
	if err != nil {
		return nil, err
	}
	all := make(map[string]*structpb.Value, len(fields)+1)
	maps.Copy(all, fields)
	all[r.name] = structpb.NewStructValue(object)
	return &composerv1.JWTSVIDAttributes{Claims: &structpb.Struct{Fields: all}}, nil
}

// ComposeWorkloadX509SVID adds the DNS names and subject attributes of the
// rule's x509 block, if it has one.
func (c *Composer) ComposeWorkloadX509SVID(_ context.Context, req *composerv1.ComposeWorkloadX509SVIDRequest) (_ *composerv1.ComposeWorkloadX509SVIDResponse, err error) {
	defer c.survive(&err)
	rules, err := c.rules()
	if err != nil {
		return nil, err
	}
	attributes, err := rules.certify(req.GetSpiffeId(), req.GetAttributes(), time.Now())
	if err := c.judge(rules, req.GetSpiffeId(), err); err != nil {
		return nil, err
	}
	return &composerv1.ComposeWorkloadX509SVIDResponse{Attributes: attributes}, nil
}

func (r *Rules) certify(name string, before *composerv1.X509SVIDAttributes, now time.Time) (*composerv1.X509SVIDAttributes, error) {
	id, err := spiffeid.FromString(name)
	if err != nil {
		return nil, err
	}
	add, err := r.Certificate(id, now)
	if add == nil || err != nil {
		return nil, err
	}
	after := &composerv1.X509SVIDAttributes{}
	if before != nil {
		after = proto.CloneOf(before)
	}
	if after.Subject == nil { // SPIRE refuses an answer without one
		after.Subject = &composerv1.DistinguishedName{}
	}
	after.DnsSans = union(after.DnsSans, add.DNSNames)
	if len(add.Organization) > 0 {
		after.Subject.Organization = add.Organization
	}
	after.Subject.OrganizationalUnit = union(after.Subject.OrganizationalUnit, add.OrganizationalUnit)
	if add.CommonName != "" {
		after.Subject.CommonName = add.CommonName
	}
	return after, nil
}

// union appends what is not there.
func union(to, more []string) []string {
	seen := make(map[string]bool, len(to)+len(more))
	for _, s := range to {
		seen[s] = true
	}
	for _, s := range more {
		if !seen[s] {
			seen[s] = true
			to = append(to, s)
		}
	}
	return to
}

func (c *Composer) rules() (*Rules, error) {
	book := c.book.Load()
	if book == nil {
		return nil, status.Error(codes.FailedPrecondition, "not configured")
	}
	rules, _ := book.Rules()
	return rules, nil
}

// judge decides what becomes of a signature whose claims could not be made: the
// rules say whether it goes without. A denial by the rules is no failure, and
// stands.
func (c *Composer) judge(rules *Rules, id string, err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, ErrDenied):
		return status.Errorf(codes.PermissionDenied, "%s", err)
	case rules.omitOnError:
		c.log.Warn("signed without the rule's additions", "spiffe_id", id, "error", err)
		return nil
	}
	c.log.Warn("refused to sign", "spiffe_id", id, "error", err)
	return status.Errorf(codes.FailedPrecondition, "%s", err)
}

// survive turns a panic into an error: the end of this process would stop the
// server from signing for anybody.
func (c *Composer) survive(err *error) {
	if p := recover(); p != nil {
		c.log.Error("bug in the plugin", "panic", fmt.Sprint(p), "stack", string(debug.Stack()))
		*err = status.Error(codes.Internal, "bug in the plugin, see its log")
	}
}
