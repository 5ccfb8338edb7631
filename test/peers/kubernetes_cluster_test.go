package peers

import (
	"archive/tar"
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"io/fs"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/yaml"

	"github.com/deputy-id/deputy/test/binary"
	"github.com/deputy-id/deputy/test/loopback"
	"github.com/deputy-id/deputy/test/need"
	"github.com/deputy-id/deputy/test/scratch"
	"github.com/deputy-id/deputy/test/wait"
)

// A kubeNode is Kubernetes on this machine, in a cell: an API server and its
// etcd, one kubelet and its containerd. There is no scheduler and no controller:
// pods name their node.
type kubeNode struct {
	*cell
	name    string
	api     string
	admin   *http.Client
	kubelet string // URL
	cgroup  string // above those of the pods
	image   string // of the test agent, with its tag
	digest  string // of its manifest
}

// sysctls are those that a kubelet sets, and to what: its cell sees them so.
var sysctls = map[string]string{
	"/proc/sys/vm/overcommit_memory":      "1\n",
	"/proc/sys/vm/panic_on_oom":           "0\n",
	"/proc/sys/kernel/panic":              "10\n",
	"/proc/sys/kernel/panic_on_oops":      "1\n",
	"/proc/sys/kernel/keys/root_maxkeys":  "1000000\n",
	"/proc/sys/kernel/keys/root_maxbytes": "25000000\n",
}

const containerdConfig = `version = 2
root = "DIR/containerd"

[grpc]
address = "DIR/c.sock"

[ttrpc]
address = "DIR/t.sock"

[plugins."io.containerd.grpc.v1.cri"]
sandbox_image = "IMAGE"
restrict_oom_score_adj = true # we may not be allowed to lower it
disable_apparmor = true
disable_tcp_service = true

[plugins."io.containerd.grpc.v1.cri".containerd]
snapshotter = "native"        # on any file system
`

// The limits on cgroups, swap and disk let it run where no node would.
const kubeletConfig = `apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
address: 127.0.0.1
port: PORT
healthzPort: 0
authentication:
  anonymous: {enabled: false}
  webhook: {enabled: true, cacheTTL: 1s}
  x509: {clientCAFile: DIR/ca.pem}
authorization:
  mode: Webhook
  webhook: {cacheAuthorizedTTL: 1s, cacheUnauthorizedTTL: 1s}
containerRuntimeEndpoint: unix://DIR/c.sock
staticPodPath: DIR/manifests
fileCheckFrequency: 1s
podLogsDir: DIR/logs
volumePluginDir: DIR/plugins
cgroupRoot: CGROUP
cgroupDriver: cgroupfs
failCgroupV1: false
failSwapOn: false
oomScoreAdj: 0
makeIPTablesUtilChains: false
resolvConf: ""
enableControllerAttachDetach: false
localStorageCapacityIsolation: false
imageGCHighThresholdPercent: 100
evictionHard: {memory.available: 1Mi, nodefs.available: 1%, imagefs.available: 1%, nodefs.inodesFree: 1%, imagefs.inodesFree: 1%}
`

func startKubernetes(t *testing.T) *kubeNode {
	t.Helper()
	need.Root(t, "namespaces and cgroups")
	program, dir := built(t, kubernetes), scratch.Dir(t)
	n := &kubeNode{name: "localhost", cgroup: "/deputy-peers-" + filepath.Base(dir)}
	n.makeCgroups(t)
	n.image, n.digest = registry(t, binary.Program(t, "test/agent"))
	n.cell = newCell(t, dir, sysctls)
	t.Cleanup(func() {
		if t.Failed() {
			for _, name := range []string{"etcd", "api", "containerd", "kubelet"} {
				b, _ := os.ReadFile(n.log(name))
				t.Logf("end of the log of %s:\n%s", name, b[max(0, len(b)-4096):])
			}
		}
	})

	ca := newKubeCA(t, dir)
	admin := ca.issue(t, "admin", pkix.Name{CommonName: "admin", Organization: []string{"system:masters"}})
	ca.issue(t, "node", pkix.Name{CommonName: "system:node:" + n.name, Organization: []string{"system:nodes"}})
	ca.issue(t, "api", pkix.Name{CommonName: "kube-apiserver"})
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	n.write(t, "accounts.key", pemKey(t, key))
	etcd, port, kubelet := "http://"+loopback.Address(t), strconv.Itoa(loopback.Port(t)), strconv.Itoa(loopback.Port(t))
	n.api, n.kubelet = "https://127.0.0.1:"+port, "https://"+n.name+":"+kubelet
	n.admin = &http.Client{Timeout: 20 * time.Second, Transport: &http.Transport{
		TLSClientConfig: &tls.Config{RootCAs: ca.pool, Certificates: []tls.Certificate{admin}},
	}}
	t.Cleanup(n.admin.CloseIdleConnections)
	r := strings.NewReplacer("DIR", dir, "IMAGE", n.image, "PORT", kubelet, "CGROUP", n.cgroup)
	n.write(t, "containerd.toml", []byte(r.Replace(containerdConfig)))
	n.write(t, "kubelet.yaml", []byte(r.Replace(kubeletConfig)))
	n.write(t, "node.kubeconfig", []byte(fmt.Sprintf(`apiVersion: v1
kind: Config
clusters: [{name: c, cluster: {server: %q, certificate-authority: %s/ca.pem}}]
users: [{name: u, user: {client-certificate: %[2]s/node.pem, client-key: %[2]s/node.key}}]
contexts: [{name: x, context: {cluster: c, user: u}}]
current-context: x
`, n.api, dir)))
	for _, name := range []string{"manifests", "plugins"} {
		if err := os.Mkdir(filepath.Join(dir, name), 0o700); err != nil {
			t.Fatal(err)
		}
	}

	peer := "http://" + loopback.Address(t)
	n.start(t, "etcd", program, "etcd", "--name", "one", "--data-dir", dir+"/etcd", "--unsafe-no-fsync",
		"--listen-client-urls", etcd, "--advertise-client-urls", etcd,
		"--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer, "--initial-cluster", "one="+peer)
	n.start(t, "containerd", "containerd", "--config", dir+"/containerd.toml")
	n.start(t, "api", program, "kube-apiserver", "--etcd-servers", etcd,
		"--bind-address", "127.0.0.1", "--secure-port", port, "--advertise-address", "127.0.0.1", "--endpoint-reconciler-type", "none",
		"--tls-cert-file", dir+"/api.pem", "--tls-private-key-file", dir+"/api.key", "--client-ca-file", dir+"/ca.pem",
		"--service-account-issuer", "https://kubernetes.default.svc", "--service-cluster-ip-range", "10.0.0.0/24",
		"--service-account-key-file", dir+"/accounts.key", "--service-account-signing-key-file", dir+"/accounts.key",
		"--authorization-mode", "Node,RBAC", "--enable-admission-plugins", "NodeRestriction")
	wait.Until(t, "the API server", func() bool { return n.try(http.MethodGet, "/readyz", nil, nil) == http.StatusOK })
	wait.Until(t, "containerd", func() bool {
		c, err := net.Dial("unix", dir+"/c.sock")
		if err != nil {
			return false
		}
		c.Close()
		return true
	})
	n.startKubelet(t)
	wait.Until(t, "the node", func() bool { return n.try(http.MethodGet, "/api/v1/nodes/"+n.name, nil, nil) == http.StatusOK })
	return n
}

func (n *kubeNode) startKubelet(t *testing.T) {
	t.Helper()
	n.start(t, "kubelet", built(t, kubernetes), "kubelet", "--config", n.dir+"/kubelet.yaml", "--kubeconfig", n.dir+"/node.kubeconfig",
		"--hostname-override", n.name, "--root-dir", n.dir+"/kubelet", "--cert-dir", n.dir+"/pki")
}

func (n *kubeNode) write(t *testing.T, name string, content []byte) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(n.dir, name), content, 0o600); err != nil {
		t.Fatal(err)
	}
}

// makeCgroups makes the cgroup above those of the pods, in each hierarchy.
func (n *kubeNode) makeCgroups(t *testing.T) {
	t.Helper()
	roots, err := filepath.Glob("/sys/fs/cgroup/*/cgroup.procs")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat("/sys/fs/cgroup/cgroup.controllers"); err == nil {
		roots = []string{"/sys/fs/cgroup/cgroup.procs"} // v2 alone
	}
	for _, root := range roots {
		top := filepath.Join(filepath.Dir(root), n.cgroup)
		if err := os.Mkdir(top, 0o755); err != nil && !os.IsExist(err) { // cpu and cpu,cpuacct may be one
			t.Fatal(err)
		}
		t.Cleanup(func() {
			wait.Until(t, "that "+top+" is removed", func() bool {
				var all []string
				filepath.WalkDir(top, func(path string, d fs.DirEntry, err error) error {
					if err == nil && d.IsDir() {
						all = append(all, path)
					}
					return nil
				})
				slices.Reverse(all) // the innermost first
				for _, path := range all {
					os.Remove(path)
				}
				_, err := os.Stat(top)
				return os.IsNotExist(err)
			})
		})
	}
}

// A kubeCA signs for all the parts.
type kubeCA struct {
	dir  string
	cert *x509.Certificate
	key  crypto.Signer
	pool *x509.CertPool
}

func newKubeCA(t *testing.T, dir string) *kubeCA {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "cluster"}, NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	c := &kubeCA{dir: dir, key: key, pool: x509.NewCertPool()}
	if c.cert, err = x509.ParseCertificate(der); err != nil {
		t.Fatal(err)
	}
	c.pool.AddCert(c.cert)
	if err := os.WriteFile(filepath.Join(dir, "ca.pem"), pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), 0o600); err != nil {
		t.Fatal(err)
	}
	return c
}

// issue leaves a certificate for both ends of TLS in NAME.pem and NAME.key.
func (c *kubeCA) issue(t *testing.T, name string, subject pkix.Name) tls.Certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 127))
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{
		SerialNumber: serial, Subject: subject, NotBefore: c.cert.NotBefore, NotAfter: c.cert.NotAfter,
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth},
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
	}, c.cert, key.Public(), c.key)
	if err != nil {
		t.Fatal(err)
	}
	cert := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	for file, content := range map[string][]byte{name + ".pem": cert, name + ".key": pemKey(t, key)} {
		if err := os.WriteFile(filepath.Join(c.dir, file), content, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

// pemKey is a key as the API server reads it.
func pemKey(t *testing.T, key *ecdsa.PrivateKey) []byte {
	t.Helper()
	der, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: der})
}

// registry serves one image, which is nothing but this program, and returns its
// name and the digest of its manifest.
func registry(t *testing.T, program string) (name, digest string) {
	t.Helper()
	content, err := os.ReadFile(program)
	if err != nil {
		t.Fatal(err)
	}
	var layer bytes.Buffer
	w := tar.NewWriter(&layer)
	if err := w.WriteHeader(&tar.Header{Name: "program", Mode: 0o755, Size: int64(len(content))}); err != nil {
		t.Fatal(err)
	}
	w.Write(content)
	w.Close()
	blobs := make(map[string][]byte)
	put := func(kind string, b []byte) map[string]any {
		d := fmt.Sprintf("sha256:%x", sha256.Sum256(b))
		blobs[d] = b
		return map[string]any{"mediaType": kind, "digest": d, "size": len(b)}
	}
	object := func(v any) []byte {
		b, err := json.Marshal(v)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	one := put("application/vnd.oci.image.layer.v1.tar", layer.Bytes())
	const kind = "application/vnd.oci.image.manifest.v1+json"
	manifest := put(kind, object(map[string]any{
		"schemaVersion": 2, "mediaType": kind, "layers": []any{one},
		"config": put("application/vnd.oci.image.config.v1+json", object(map[string]any{
			"architecture": runtime.GOARCH, "os": "linux", "rootfs": map[string]any{"type": "layers", "diff_ids": []any{one["digest"]}},
			"config": map[string]any{"Entrypoint": []string{"/program"}, "Cmd": []string{"sleep"}},
		})),
	}))
	digest = manifest["digest"].(string)
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		rest, ok := strings.CutPrefix(r.URL.Path, "/v2/agent/")
		kindOf, ref, _ := strings.Cut(rest, "/")
		if kindOf == "manifests" && ref == "1" {
			ref = digest
		}
		b := blobs[ref]
		switch {
		case r.URL.Path == "/v2/":
		case !ok || b == nil:
			http.NotFound(w, r)
		default:
			if kindOf == "manifests" {
				w.Header().Set("Content-Type", kind)
			}
			w.Header().Set("Docker-Content-Digest", ref)
			http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(b))
		}
	}))
	t.Cleanup(s.Close)
	return strings.TrimPrefix(s.URL, "http://") + "/agent:1", digest
}

// try asks the API server as its administrator and returns the status of the
// answer, or 0 if there is none.
func (n *kubeNode) try(method, path string, in, out any) int {
	var body io.Reader
	kind := "application/json"
	switch in := in.(type) {
	case nil:
	case mergePatch:
		body, kind = strings.NewReader(string(in)), "application/merge-patch+json"
	default:
		b, err := json.Marshal(in)
		if err != nil {
			return 0
		}
		body = bytes.NewReader(b)
	}
	q, err := http.NewRequest(method, n.api+path, body)
	if err != nil {
		return 0
	}
	q.Header.Set("Content-Type", kind)
	a, err := n.admin.Do(q)
	if err != nil {
		return 0
	}
	defer a.Body.Close()
	b, err := io.ReadAll(a.Body)
	if err != nil {
		return 0
	}
	if out != nil && a.StatusCode < 300 {
		if err := json.Unmarshal(b, out); err != nil {
			return 0
		}
	}
	return a.StatusCode
}

type mergePatch string

// call asks and wants success.
func (n *kubeNode) call(t *testing.T, method, path string, in, out any) {
	t.Helper()
	if code := n.try(method, path, in, out); code < 200 || code > 299 {
		t.Fatalf("%s %s: got %d", method, path, code)
	}
}

// apply creates what a manifest has.
func (n *kubeNode) apply(t *testing.T, manifest string) {
	t.Helper()
	for doc := range strings.SplitSeq(manifest, "\n---\n") {
		var o map[string]any
		if err := yaml.Unmarshal([]byte(doc), &o); err != nil {
			t.Fatal(err)
		}
		path := map[string]string{
			"Namespace": "/api/v1/namespaces", "ServiceAccount": "/api/v1/namespaces/%s/serviceaccounts",
			"ClusterRole":        "/apis/rbac.authorization.k8s.io/v1/clusterroles",
			"ClusterRoleBinding": "/apis/rbac.authorization.k8s.io/v1/clusterrolebindings",
		}[fmt.Sprint(o["kind"])]
		if path == "" {
			t.Fatalf("got a %v, which this test does not know", o["kind"])
		}
		if space, ok := o["metadata"].(map[string]any)["namespace"]; ok {
			path = fmt.Sprintf(path, space)
		}
		n.call(t, http.MethodPost, path, o, nil)
	}
}

// accountToken is what kubectl create token prints.
func (n *kubeNode) accountToken(t *testing.T, namespace, account string) string {
	t.Helper()
	var r authenticationv1.TokenRequest
	n.call(t, http.MethodPost, "/api/v1/namespaces/"+namespace+"/serviceaccounts/"+account+"/token", &authenticationv1.TokenRequest{
		TypeMeta: metav1.TypeMeta{APIVersion: "authentication.k8s.io/v1", Kind: "TokenRequest"},
	}, &r)
	return r.Status.Token
}

const kubePods = "/api/v1/namespaces/default/pods"

// create creates a pod of the agent that sleeps, with changes.
func (n *kubeNode) create(t *testing.T, name string, change func(*corev1.Pod)) *corev1.Pod {
	t.Helper()
	no, user, grace := false, int64(containerUID), int64(2)
	p := &corev1.Pod{
		TypeMeta:   metav1.TypeMeta{APIVersion: "v1", Kind: "Pod"},
		ObjectMeta: metav1.ObjectMeta{Name: name, Labels: map[string]string{"app": name}},
		Spec: corev1.PodSpec{
			NodeName: n.name, HostNetwork: true, ServiceAccountName: "workload",
			AutomountServiceAccountToken: &no, TerminationGracePeriodSeconds: &grace,
			Containers: []corev1.Container{{Name: "main", Image: n.image, SecurityContext: &corev1.SecurityContext{RunAsUser: &user}}},
		},
	}
	if change != nil {
		change(p)
	}
	created := new(corev1.Pod)
	n.call(t, http.MethodPost, kubePods, p, created)
	return created
}

// becomes waits for a phase of the pod and returns it.
func (n *kubeNode) becomes(t *testing.T, name string, phase corev1.PodPhase) *corev1.Pod {
	t.Helper()
	var p *corev1.Pod
	wait.Until(t, "that "+name+" is "+string(phase), func() bool {
		p = new(corev1.Pod)
		return n.try(http.MethodGet, kubePods+"/"+name, nil, p) == http.StatusOK && p.Status.Phase == phase
	})
	return p
}

// run creates a pod and waits until it runs.
func (n *kubeNode) run(t *testing.T, name string, change func(*corev1.Pod)) *corev1.Pod {
	t.Helper()
	n.create(t, name, change)
	return n.becomes(t, name, corev1.PodRunning)
}

func (n *kubeNode) delete(t *testing.T, name string) {
	t.Helper()
	n.call(t, http.MethodDelete, kubePods+"/"+name, nil, nil)
}

// pid is that of the one process of a pod's one container.
func (n *kubeNode) pid(t *testing.T, p *corev1.Pod) int {
	t.Helper()
	if len(p.Status.ContainerStatuses) != 1 {
		t.Fatalf("%s has %d containers", p.Name, len(p.Status.ContainerStatuses))
	}
	id := strings.TrimPrefix(p.Status.ContainerStatuses[0].ContainerID, "containerd://")
	var pids []int
	files, _ := filepath.Glob("/proc/[0-9]*/cgroup")
	for _, file := range files {
		if b, err := os.ReadFile(file); err == nil && strings.Contains(string(b), "/"+id+"\n") {
			pid, _ := strconv.Atoi(filepath.Base(filepath.Dir(file)))
			pids = append(pids, pid)
		}
	}
	if len(pids) != 1 {
		t.Fatalf("container %s of %s has the processes %v, want one", id, p.Name, pids)
	}
	return pids[0]
}
