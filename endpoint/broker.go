package endpoint

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/exp/proto/spiffe/broker"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"

	"github.com/deputy-id/deputy/attestor"
	"github.com/deputy-id/deputy/attestor/kubernetes"
)

// newBroker returns the server of the SPIFFE Broker API.
func (s *Server) newBroker() *grpc.Server {
	g := s.newGate(&brokerShaker{s, owner}, s.admitBroker, denyBroker, grpc.KeepaliveParams(keepalive.ServerParameters{Time: 2 * time.Minute}))
	broker.RegisterAPIServer(g, &brokerAPI{s: s})
	return g.Server
}

// brokerAPI is the SPIFFE Broker API. Its messages have the fields of the
// Workload API's, number by number.
type brokerAPI struct {
	broker.UnimplementedAPIServer
	s *Server
}

func (a *brokerAPI) SubscribeToX509SVID(in *broker.SubscribeToX509SVIDRequest, st broker.API_SubscribeToX509SVIDServer) error {
	ctx := st.Context()
	return a.answer(ctx, "SubscribeToX509SVID", in.Reference, func(b *brokerLink) error {
		o, err := a.lend(b, in.Reference)
		if err != nil {
			return err
		}
		defer o.close()
		o.encode = encodeX509
		return o.stream(ctx, st, o.x509State)
	})
}

func (a *brokerAPI) SubscribeToX509Bundles(in *broker.SubscribeToX509BundlesRequest, st broker.API_SubscribeToX509BundlesServer) error {
	return a.bundles("SubscribeToX509Bundles", in.Reference, st, func(m *bundleMessage) encoded { return m.x509 })
}

func (a *brokerAPI) SubscribeToJWTBundles(in *broker.SubscribeToJWTBundlesRequest, st broker.API_SubscribeToJWTBundlesServer) error {
	return a.bundles("SubscribeToJWTBundles", in.Reference, st, func(m *bundleMessage) encoded { return m.jwt })
}

func (a *brokerAPI) bundles(method string, ref *broker.WorkloadReference, st grpc.ServerStream, pick func(*bundleMessage) encoded) error {
	ctx := st.Context()
	return a.answer(ctx, method, ref, func(b *brokerLink) error {
		o, err := a.lend(b, ref)
		if err != nil {
			return err
		}
		defer o.close()
		return o.stream(ctx, st, func(ctx context.Context, has *state) (*state, error) { return o.bundleState(ctx, has, pick) })
	})
}

func (a *brokerAPI) FetchJWTSVID(ctx context.Context, in *broker.FetchJWTSVIDRequest) (*broker.FetchJWTSVIDResponse, error) {
	out := &broker.FetchJWTSVIDResponse{}
	err := a.answer(ctx, "FetchJWTSVID", in.Reference, func(b *brokerLink) error {
		if err := checkAudiences(in.Audience); err != nil {
			return err
		}
		var id spiffeid.ID
		if in.SpiffeId != "" {
			var err error
			if id, err = spiffeid.FromString(in.SpiffeId); err != nil {
				return invalid("invalid SPIFFE ID: %v", err)
			}
		}
		o, err := a.lend(b, in.Reference)
		if err != nil {
			return err
		}
		defer o.close()
		tokens, err := o.tokens(ctx, id, in.Audience)
		for _, t := range tokens {
			out.Svids = append(out.Svids, &broker.JWTSVID{SpiffeId: t.SPIFFEID.String(), Svid: t.Compact, Hint: t.Hint})
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	return out, nil
}

// admitBroker lets a broker in, to whatever is served here, whose call carries
// the header against requests which it was tricked into forwarding (SPIFFE
// Broker Endpoint §3).
func (s *Server) admitBroker(ctx context.Context, method string) (*account, error) {
	if v := metadata.ValueFromIncomingContext(ctx, "broker.spiffe.io"); len(v) != 1 || v[0] != "true" {
		return nil, errBrokerHeader
	}
	b := brokerOf(ctx)
	if b == nil {
		return nil, errForeign
	}
	s.Log.Debug("broker calls", append([]any{"method", short(method)}, b.who()...)...)
	return b.acct, b.check(ctx)
}

func denyBroker(ctx context.Context, method string, err error) error {
	if b := brokerOf(ctx); b != nil {
		b.note(short(method), nil, err)
	}
	return brokerStatus(err)
}

// answer turns the end of a broker's call into a status.
func (a *brokerAPI) answer(ctx context.Context, method string, ref *broker.WorkloadReference, serve func(*brokerLink) error) error {
	b := brokerOf(ctx)
	err := serve(b)
	b.note(method, ref, err)
	return brokerStatus(err)
}

// about is what a line of the log says of whom a reference is to.
func about(ref *broker.WorkloadReference) []any {
	pid, pod, err := readReference(ref)
	switch {
	case err != nil:
		return nil
	case pod == nil:
		return []any{"subject_pid", pid}
	}
	var args []any
	for _, one := range [][2]string{{"subject_namespace", pod.Namespace}, {"subject_pod", pod.Name}, {"subject_uid", pod.UID}} {
		if one[1] != "" {
			args = append(args, one[0], legible(one[1]))
		}
	}
	return args
}

var errBrokerHeader = &fault{errHeader, "header broker.spiffe.io: true is missing"}

// lend begins to hand out what one request is about.
func (a *brokerAPI) lend(b *brokerLink, ref *broker.WorkloadReference) (*loan, error) {
	pid, pod, err := readReference(ref)
	if err != nil {
		return nil, err
	}
	by := &borrower{b, pod != nil}
	var sub subject
	switch err := by.check(context.Background()); {
	case err != nil:
		return nil, err
	case pod != nil && a.s.Brokering.Pods == nil:
		return nil, badReference("references to Kubernetes objects are not resolved here")
	case pod != nil:
		sub = &podSubject{pods: a.s.Brokering.Pods, ref: *pod}
	case b.elsewhere:
		// It would name a process, and we find another one under the same number.
		return nil, badReference("PIDs are those of the daemon's PID namespace, and the caller is in another")
	default:
		if sub, err = a.s.pin(pid, b.acct); err != nil {
			return nil, err
		}
	}
	return a.s.lend(by, sub), nil
}

// A borrower is a broker in one call, which names its workload in one way.
type borrower struct {
	*brokerLink
	pod bool // else by PID
}

func (b *borrower) check(ctx context.Context) error {
	if err := b.brokerLink.check(ctx); err != nil {
		return err
	}
	kind, over, allowed := "PIDs", "", References{}
	if one := b.s.listed(b.id); one != nil {
		allowed = one.References
		if b.tcp {
			over, allowed = " over TCP", one.OverTCP
		}
	}
	switch {
	case b.pod && allowed.Kubernetes, !b.pod && allowed.PID:
		return nil
	case b.pod:
		kind = "Kubernetes objects"
	}
	return &fault{errBroker, "caller not configured for references to " + kind + over}
}

const maxName = 253 // bytes of a Kubernetes object's

// readReference returns the PID or the pod that a reference is to. Whatever of
// it is not understood makes it invalid: it might say who is not meant.
func readReference(ref *broker.WorkloadReference) (pid int32, pod *kubernetes.Reference, err error) {
	if ref.GetReference() == nil {
		return 0, nil, badReference("reference must be specified")
	}
	var one proto.Message
	switch ref.Reference.MessageName() {
	case typePID:
		one = &broker.WorkloadPIDReference{}
	case typeKubernetes:
		one = &broker.KubernetesObjectReference{}
	default:
		return 0, nil, badReference("references of the type %.100q are not understood", ref.Reference.TypeUrl)
	}
	if err := ref.Reference.UnmarshalTo(one); err != nil {
		return 0, nil, badReference("malformed %s", ref.Reference.MessageName())
	}
	if unknownFields(ref) || unknownFields(one) {
		return 0, nil, badReference("the reference has fields that are not understood")
	}
	if m, ok := one.(*broker.KubernetesObjectReference); ok {
		pod, err := readObject(m)
		return 0, pod, err
	}
	if pid = one.(*broker.WorkloadPIDReference).Pid; pid <= 0 {
		return 0, nil, badReference("PID %d is not one", pid)
	}
	return pid, nil, nil
}

// The types of references (SPIFFE Broker API §3.1.3).
const (
	typePID        = "spiffe.broker.WorkloadPIDReference"
	typeKubernetes = "spiffe.broker.KubernetesObjectReference"
)

func unknownFields(m proto.Message) bool {
	found := false
	var look func(protoreflect.Message)
	look = func(m protoreflect.Message) {
		found = found || len(m.GetUnknown()) > 0
		m.Range(func(f protoreflect.FieldDescriptor, v protoreflect.Value) bool {
			if f.Message() != nil && !f.IsList() && !f.IsMap() {
				look(v.Message())
			}
			return true
		})
	}
	look(m.ProtoReflect())
	return found
}

func readObject(m *broker.KubernetesObjectReference) (*kubernetes.Reference, error) {
	plural, group := m.GetType().GetPlural(), m.GetType().GetGroup()
	r := &kubernetes.Reference{Namespace: m.GetKey().GetNamespace(), Name: m.GetKey().GetName(), UID: m.Uid}
	switch {
	case plural == "" || group == "":
		return nil, badReference("the object's type must have plural and group")
	case plural != "pods" || group != "core":
		return nil, badReference("objects of the type %.100q, group %.100q, are not resolved here; pods, group core, are", plural, group)
	case m.Key == nil && m.Uid == "":
		return nil, badReference("key or uid must be specified")
	case m.Key != nil && r.Name == "":
		return nil, badReference("the key has no name")
	case m.Key != nil && r.Namespace == "":
		return nil, badReference("the key has no namespace, which a pod is always in")
	case len(r.Name) > maxName || len(r.Namespace) > maxName:
		return nil, badReference("the key is longer than %d bytes", maxName)
	case r.UID != "" && !isUID(r.UID):
		return nil, badReference("uid is not a UUID")
	}
	return r, nil
}

// isUID accepts a UUID, and one without its dashes: that is what the kubelet
// calls a static pod.
func isUID(s string) bool {
	if len(s) == 36 && s[8] == '-' && s[13] == '-' && s[18] == '-' && s[23] == '-' {
		s = s[:8] + s[9:13] + s[14:18] + s[19:23] + s[24:]
	}
	return len(s) == 32 && strings.Trim(s, "0123456789abcdef") == ""
}

// pods finds pods of this node; kubernetes.Node does.
type pods interface {
	Pod(context.Context, kubernetes.Reference) (*kubernetes.Pod, error)
}

// podPoll is how long the word of the kubelet holds.
const podPoll = 2 * time.Second

// A podSubject is a pod. Once it was found it is that one: another pod of the
// same name is somebody else.
type podSubject struct {
	pods pods
	ref  kubernetes.Reference
	pod  *kubernetes.Pod
	ev   *attestor.Evidence
}

func (p *podSubject) attest(ctx context.Context, _ bool) (*attestor.Evidence, error) {
	pod, err := p.pods.Pod(ctx, p.ref)
	switch {
	case errors.Is(err, kubernetes.ErrNotFound):
		return nil, errSubject
	case err != nil && ctx.Err() == nil:
		return nil, fmt.Errorf("%w: %v", errUnknown, err)
	case err != nil:
		return nil, err
	}
	if pod != p.pod {
		p.pod, p.ref.UID = pod, pod.UID
		p.ev = &attestor.Evidence{Selectors: pod.Selectors, Gathered: time.Now()}
	}
	return p.ev, nil
}

func (*podSubject) poll() time.Duration { return podPoll }

func (*podSubject) ended() ending { return ending{} }
func (*podSubject) close()        {}
