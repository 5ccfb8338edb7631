package peers

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/yaml"

	"github.com/deputy-id/deputy/test/scratch"
)

// The manifest is read as the API server would read it, strictly, and what is
// in its configuration maps as SPIRE and the plugin read it.
func TestKubernetesManifest(t *testing.T) {
	text, err := os.ReadFile("../../conf/samples/spire/kubernetes.yaml")
	if err != nil {
		t.Fatal(err)
	}
	maps := make(map[string]map[string]string)
	pods := make(map[string]corev1.PodSpec)
	var claimed []string
	counts := make(map[string]int)
	for _, doc := range strings.Split(string(text), "\n---\n") {
		var meta metav1.TypeMeta
		if err := yaml.Unmarshal([]byte(doc), &meta); err != nil {
			t.Fatal(err)
		}
		counts[meta.Kind]++
		var object any
		switch meta.APIVersion + " " + meta.Kind {
		case "v1 Namespace":
			object = new(corev1.Namespace)
		case "v1 ServiceAccount":
			object = new(corev1.ServiceAccount)
		case "v1 Service":
			object = new(corev1.Service)
		case "v1 ConfigMap":
			object = new(corev1.ConfigMap)
		case "rbac.authorization.k8s.io/v1 ClusterRole":
			object = new(rbacv1.ClusterRole)
		case "rbac.authorization.k8s.io/v1 ClusterRoleBinding":
			object = new(rbacv1.ClusterRoleBinding)
		case "rbac.authorization.k8s.io/v1 Role":
			object = new(rbacv1.Role)
		case "rbac.authorization.k8s.io/v1 RoleBinding":
			object = new(rbacv1.RoleBinding)
		case "apps/v1 StatefulSet":
			object = new(appsv1.StatefulSet)
		case "apps/v1 DaemonSet":
			object = new(appsv1.DaemonSet)
		default:
			t.Errorf("got a %s of %s, want a kind that this test knows", meta.Kind, meta.APIVersion)
			continue
		}
		if err := yaml.UnmarshalStrict([]byte(doc), object); err != nil {
			t.Errorf("%s: %v", meta.Kind, err)
		}
		switch o := object.(type) {
		case *corev1.ConfigMap:
			maps[o.Name] = o.Data
		case *appsv1.StatefulSet:
			pods[o.Name] = o.Spec.Template.Spec
			for _, c := range o.Spec.VolumeClaimTemplates {
				claimed = append(claimed, c.Name)
			}
		case *appsv1.DaemonSet:
			pods[o.Name] = o.Spec.Template.Spec
			if !o.Spec.Template.Spec.HostPID {
				t.Error("the agent does not see the host's PIDs")
			}
		}
	}
	if counts["StatefulSet"] != 1 || counts["DaemonSet"] != 1 || len(pods) != 2 {
		t.Errorf("got %v, want a server and an agent", counts)
	}
	for name, pod := range pods {
		volumes := slices.Clone(claimed)
		for _, v := range pod.Volumes {
			volumes = append(volumes, v.Name)
			if v.ConfigMap != nil {
				if _, ok := maps[v.ConfigMap.Name]; !ok {
					t.Errorf("%s mounts the configuration map %s, which is not there", name, v.ConfigMap.Name)
				}
			}
		}
		for _, c := range slices.Concat(pod.InitContainers, pod.Containers) {
			for _, m := range c.VolumeMounts {
				if !slices.Contains(volumes, m.Name) {
					t.Errorf("%s of %s mounts %s, which is not there", c.Name, name, m.Name)
				}
			}
		}
		if len(pod.InitContainers) != 1 {
			t.Errorf("%s: got %d init containers, want the one that brings the plugin", name, len(pod.InitContainers))
		}
	}

	server, agent, bin := built(t, spireServer), built(t, spireAgent), plugins(t)
	dir := t.TempDir()
	here := strings.NewReplacer("/opt/deputy", bin, "/etc/deputy", dir, strings.Repeat("0", 64), checksum(t, filepath.Join(bin, "deputy-claims")))
	write := func(configMap, file string) string {
		data, ok := maps[configMap][file]
		if !ok {
			t.Fatalf("%s has no %s", configMap, file)
		}
		return scratch.Write(t, filepath.Join(dir, file), here.Replace(data))
	}
	run(t, agent, "validate", "-config", write("spire-agent", "agent.conf"))
	run(t, filepath.Join(bin, "deputy-claims"), "check", write("deputy-claims", "claims.hcl"))
	run(t, server, "validate", "-config", write("spire-server", "server.conf")) // starts the plugin
}
