package container

import (
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strings"

	"github.com/moby/moby/api/types/container"
	dockerimage "github.com/moby/moby/api/types/image"

	"github.com/deputy-id/deputy/attestor"
)

// inspected is what the engine says of a container, checked.
type inspected struct {
	id, name string
	running  bool
	pid      int32 // of the init process; 0 unless running
	started  string
	imageID  string // sha256:…
	manifest string // sha256:…, of the platform's manifest where the engine tells
	imageRef string // the image as it was named when the container was made
	labels   map[string]string
	env      []string // NAME=value
}

var (
	digestForm = regexp.MustCompile(`^sha256:[0-9a-f]{64}$`)
	nameForm   = regexp.MustCompile(`^/?[a-zA-Z0-9][a-zA-Z0-9_.-]*$`)
)

// newInspected checks what was answered when asked for the container id.
func newInspected(id string, r container.InspectResponse) (inspected, error) {
	switch {
	case r.ID != id:
		return inspected{}, errors.New("inspect container: the answer is about another one")
	case r.State == nil:
		return inspected{}, errors.New("inspect container: the answer has no state")
	case !digestForm.MatchString(r.Image):
		return inspected{}, errors.New("inspect container: the answer has no image ID")
	case r.State.Pid != int(int32(r.State.Pid)) || r.State.Pid < 0:
		return inspected{}, errors.New("inspect container: the PID is no PID")
	}
	c := inspected{
		id:      r.ID,
		running: r.State.Running && r.State.Pid > 0,
		pid:     int32(r.State.Pid),
		started: r.State.StartedAt,
		imageID: r.Image,
	}
	if nameForm.MatchString(r.Name) {
		c.name = strings.TrimPrefix(r.Name, "/")
	}
	if d := r.ImageManifestDescriptor; d != nil && digestForm.MatchString(string(d.Digest)) {
		c.manifest = string(d.Digest)
	}
	if r.Config != nil {
		c.imageRef, c.labels, c.env = r.Config.Image, r.Config.Labels, r.Config.Env
	}
	return c, nil
}

// sameRun reports whether both looks saw one and the same run of the container.
func (c inspected) sameRun(o inspected) bool {
	return c.running && o.running && c.pid == o.pid && c.started == o.started && c.imageID == o.imageID
}

// image is what the engine says of an image, checked.
type image struct {
	// manifests tells that the engine names images by their manifest or index,
	// as the containerd store does, and not by their configuration.
	manifests bool
	// repoDigests are the repositories that hold the image, each with the digest
	// by which it can be pulled there: "host/name@sha256:…".
	repoDigests []repoDigest
}

type repoDigest struct{ repository, digest string }

func (d repoDigest) String() string { return d.repository + "@" + d.digest }

// newImage checks what was answered when asked for the image id.
func newImage(id string, r dockerimage.InspectResponse) (image, error) {
	if r.ID != id {
		return image{}, errors.New("inspect image: the answer is about another one")
	}
	im := image{manifests: r.Descriptor != nil && string(r.Descriptor.Digest) == id}
	for _, s := range r.RepoDigests {
		if d, ok := parseRepoDigest(s); ok && !slices.Contains(im.repoDigests, d) {
			im.repoDigests = append(im.repoDigests, d)
		}
	}
	return im, nil
}

// hostForm and pathForm are a repository's two parts, as the OCI distribution
// specification and Docker's reference grammar have them.
var (
	hostForm = regexp.MustCompile(`^(?:[a-zA-Z0-9](?:[a-zA-Z0-9.-]*[a-zA-Z0-9])?|\[[0-9a-fA-F:]+\])(?::[0-9]+)?$`)
	pathForm = regexp.MustCompile(`^[a-z0-9]+(?:(?:[._]|__|-+)[a-z0-9]+)*(?:/[a-z0-9]+(?:(?:[._]|__|-+)[a-z0-9]+)*)*$`)
)

// parseRepoDigest reads NAME@sha256:… and writes out the registry that a short
// name leaves unsaid: "alpine" is docker.io/library/alpine, so that a private
// registry's "alpine" cannot pass for it.
func parseRepoDigest(s string) (repoDigest, bool) {
	name, digest, ok := strings.Cut(s, "@")
	if !ok || !digestForm.MatchString(digest) {
		return repoDigest{}, false
	}
	host, path, ok := strings.Cut(name, "/")
	if !ok || !strings.ContainsAny(host, ".:") && host != "localhost" && host == strings.ToLower(host) {
		host, path = "docker.io", name
	}
	if host == "index.docker.io" {
		host = "docker.io"
	}
	if host == "docker.io" && !strings.Contains(path, "/") {
		path = "library/" + path
	}
	if len(name) > maxRepository || !hostForm.MatchString(host) || !pathForm.MatchString(path) {
		return repoDigest{}, false
	}
	return repoDigest{repository: host + "/" + path, digest: digest}, true
}

// maxRepository is the longest name that Docker takes, in bytes.
const maxRepository = 255

// selectors are those of the container itself, the same for each process in it.
// They hold for as long as its init process lives, but for the name.
func (c inspected) selectors(runtime string, im image, env []string) []attestor.Selector {
	var out []attestor.Selector
	out = add(out, "container", "id:"+c.id)
	out = add(out, "container", "runtime:"+runtime)
	for k, v := range c.labels {
		out = add(out, runtime, "label:"+k+":"+v)
	}
	for _, v := range c.env {
		if name, _, ok := strings.Cut(v, "="); ok && slices.Contains(env, name) {
			out = add(out, runtime, "env:"+v)
		}
	}
	if c.imageRef != "" {
		out = add(out, runtime, "image_id:"+c.imageRef)
	}
	// SPIRE gives the image's ID under this name, whatever the store.
	out = add(out, runtime, "image_config_digest:"+c.imageID)
	if im.manifests {
		out = add(out, "image", "digest:"+c.imageID)
		if c.manifest != "" && c.manifest != c.imageID {
			out = add(out, "image", "digest:"+c.manifest)
		}
	} else {
		out = add(out, "image", "config_digest:"+c.imageID)
	}
	for _, d := range im.repoDigests {
		out = add(out, "image", "digest:"+d.digest)
		out = add(out, "image", "repository:"+d.repository)
		out = add(out, "image", "reference:"+d.String())
	}
	slices.SortFunc(out, attestor.Selector.Compare)
	return slices.Compact(out)
}

func (c inspected) String() string { return fmt.Sprintf("container %.12s", c.id) }
