package kubernetes

import (
	"encoding/json"
	"fmt"
	"slices"

	"github.com/deputy-id/deputy/attestor"
)

// podList is what is read of a PodList of Kubernetes' core/v1.
type podList struct {
	Kind  string `json:"kind"`
	Items []pod  `json:"items"`
}

type pod struct {
	Metadata struct {
		Namespace string            `json:"namespace"`
		Name      string            `json:"name"`
		UID       string            `json:"uid"`
		Labels    map[string]string `json:"labels"`
		Notes     map[string]string `json:"annotations"`
		Owners    []owner           `json:"ownerReferences"`
	} `json:"metadata"`
	Spec struct {
		Node    string `json:"nodeName"`
		Account string `json:"serviceAccountName"`
	} `json:"spec"`
	Status struct {
		Phase      string      `json:"phase"`
		Containers []container `json:"containerStatuses"`
		Inits      []container `json:"initContainerStatuses"`
	} `json:"status"`
}

type owner struct {
	Kind string `json:"kind"`
	Name string `json:"name"`
	UID  string `json:"uid"`
}

type container struct {
	Image   string `json:"image"`
	ImageID string `json:"imageID"`
}

// source is the annotation by which the kubelet says where a pod is from.
const source = "kubernetes.io/config.source"

// parse reads the kubelet's answer.
func parse(body []byte) ([]*Pod, error) {
	var l podList
	if err := json.Unmarshal(body, &l); err != nil {
		return nil, fmt.Errorf("read its answer: %w", err)
	}
	if l.Kind != "PodList" {
		return nil, fmt.Errorf("its answer is a %.40q, not a PodList", l.Kind)
	}
	pods := make([]*Pod, 0, len(l.Items))
	for i := range l.Items {
		p := &l.Items[i]
		m := &p.Metadata
		if m.Namespace == "" || m.Name == "" || m.UID == "" {
			return nil, fmt.Errorf("a pod of its answer has no namespace, name or UID")
		}
		pods = append(pods, &Pod{
			Namespace: m.Namespace, Name: m.Name, UID: m.UID, Selectors: p.selectors(),
			over:     p.Status.Phase == "Succeeded" || p.Status.Phase == "Failed",
			fromHost: m.Notes[source] == "file" || m.Notes[source] == "http",
		})
	}
	return pods, nil
}

// selectors are those that SPIRE gives for a reference to a pod. What the pod
// does not have gives none.
func (p *pod) selectors() []attestor.Selector {
	var all []attestor.Selector
	add := func(name, value string) {
		if value == "" {
			return
		}
		s := attestor.Selector{Type: "k8s", Value: name + ":" + value}
		if _, err := attestor.ParseSelector(s.String()); err == nil { // else no entry could ask for it
			all = append(all, s)
		}
	}
	add("ns", p.Metadata.Namespace)
	add("sa", p.Spec.Account)
	add("node-name", p.Spec.Node)
	add("pod-name", p.Metadata.Name)
	add("pod-uid", p.Metadata.UID)
	for k, v := range p.Metadata.Labels {
		add("pod-label", k+":"+v)
	}
	for _, o := range p.Metadata.Owners {
		add("pod-owner", o.Kind+":"+o.Name)
		add("pod-owner-uid", o.Kind+":"+o.UID)
	}
	for prefix, containers := range map[string][]container{"pod-image": p.Status.Containers, "pod-init-image": p.Status.Inits} {
		add(prefix+"-count", fmt.Sprint(len(containers)))
		for _, c := range containers {
			add(prefix, c.Image)
			add(prefix, c.ImageID)
		}
	}
	slices.SortFunc(all, attestor.Selector.Compare)
	return slices.Compact(all)
}
