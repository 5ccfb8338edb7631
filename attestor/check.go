package attestor

import (
	"fmt"
	"maps"
	"path"
	"slices"
	"strconv"
	"strings"
)

// A form says whether a value may be one, and in words what it must be.
type form struct {
	must  string
	fits  func(string) bool
	named func(string) bool // whether one may begin with this name and a colon; nil: none has a colon
}

var (
	formID       = form{"a number from 0 to 4294967295", isID, nil}
	formName     = form{"a name without colon or slash", isName, nil}
	formPath     = form{"an absolute path without . or .. and without a slash at its end", isPath, anyName}
	formSHA256   = form{"64 lower-case hexadecimal digits", hexID, nil}
	formTrue     = form{"true", func(s string) bool { return s == "true" }, nil}
	formExec     = form{"1 to 64 of A-Z a-z 0-9 . _ -", execName, nil}
	formUnit     = form{"the full name of a unit, such as agent.service", unitName, anyName}
	formSlice    = form{"the full name of a slice, such as system.slice", isSlice, anyName}
	formSystemd  = form{"the full name of a unit, such as agent.service", func(s string) bool { return unitName(s) || isSlice(s) }, anyName}
	formLabel    = form{"NAME:VALUE", func(s string) bool { k, _, ok := strings.Cut(s, ":"); return ok && k != "" }, anyName}
	formEnv      = form{"NAME=VALUE", func(s string) bool { k, _, ok := strings.Cut(s, "="); return ok && k != "" }, nil}
	formAny      = form{"text", func(string) bool { return true }, anyName}
	formDigest   = form{"sha256: and 64 lower-case hexadecimal digits", isDigest, func(name string) bool { return name == "sha256" }}
	formLongID   = form{"the container's full ID, 64 lower-case hexadecimal digits", hexID, nil}
	formRuntime  = form{"docker, containerd, podman or cri-o", isRuntime, nil}
	formRepo     = form{"a repository with its registry, such as docker.io/library/alpine, without tag or digest", isRepository, anyName}
	formKind     = form{"KIND:VALUE", func(s string) bool { k, v, ok := strings.Cut(s, ":"); return ok && k != "" && v != "" }, anyName}
	formDigested = form{"REPOSITORY@sha256:DIGEST, with the registry", isDigested, anyName}
)

func anyName(string) bool { return true }

// forms are the selectors that attestors of this build give: by type, and by
// what stands before the value's first colon.
var forms = map[string]map[string]form{
	"unix": {
		"uid": formID, "gid": formID, "supplementary_gid": formID,
		"user": formName, "group": formName, "supplementary_group": formName,
		"path": formPath, "sha256": formSHA256,
	},
	"process": {
		"leader": formTrue, "host": formTrue, "exec": formExec,
		"parent_path": formPath, "parent_sha256": formSHA256, "ancestor_path": formPath,
	},
	"cgroup":  {"path": formPath, "ancestor": formPath, "unit": formUnit, "slice": formSlice},
	"systemd": {"id": formSystemd, "fragment_path": formPath},
	"docker": {
		"label": formLabel, "env": formEnv, "image_id": formAny, "image_config_digest": formDigest,
	},
	"container": {"id": formLongID, "name": formName, "runtime": formRuntime, "path": formPath},
	"image": {
		"digest": formDigest, "config_digest": formDigest, "repository": formRepo, "reference": formDigested,
	},
	// Of pods that a broker refers to.
	"k8s": {
		"ns": formName, "sa": formName, "node-name": formName, "pod-name": formName, "pod-uid": formName,
		"pod-label": formLabel, "pod-owner": formKind, "pod-owner-uid": formKind,
		"pod-image": formAny, "pod-init-image": formAny, "pod-image-count": formID, "pod-init-image-count": formID,
	},
}

// KnownTypes lists the types of selectors that attestors of this build give, sorted.
func KnownTypes() []string { return slices.Sorted(maps.Keys(forms)) }

// CheckSelector returns why no attestor of this build would ever give the
// selector, or nil: a misspelt one would never match, and nobody would know.
func CheckSelector(s Selector) error {
	keys, ok := forms[s.Type]
	if !ok {
		return fmt.Errorf("selector %q is of an unknown type; known are %s", s, strings.Join(KnownTypes(), ", "))
	}
	key, value, found := strings.Cut(s.Value, ":")
	form, ok := keys[key]
	switch {
	case !ok:
		return fmt.Errorf("selector %q: %s has no %q, but %s", s, s.Type, key, strings.Join(slices.Sorted(maps.Keys(keys)), ", "))
	case !found || value == "" || !form.fits(value):
		return fmt.Errorf("selector %q: the value of %s:%s is %s", s, s.Type, key, form.must)
	}
	return nil
}

// CheckPrefix returns why no attestor of this build would ever give a selector
// that begins with the type, the key and, where it is not empty, the name of what
// the value is of: docker, label, com.example.role.
func CheckPrefix(typ, key, name string) error {
	keys, ok := forms[typ]
	if !ok {
		return fmt.Errorf("there are no selectors of the type %q; known are %s", typ, strings.Join(KnownTypes(), ", "))
	}
	form, ok := keys[key]
	switch {
	case !ok:
		return fmt.Errorf("%s has no %q, but %s", typ, key, strings.Join(slices.Sorted(maps.Keys(keys)), ", "))
	case name != "" && (form.named == nil || !form.named(name)):
		return fmt.Errorf("the value of %s:%s never begins with %q: it is %s", typ, key, name+":", form.must)
	}
	return nil
}

func isID(s string) bool {
	n, err := strconv.ParseUint(s, 10, 32)
	return err == nil && s == strconv.FormatUint(n, 10) // as the attestor writes it: no leading zero
}

func isName(s string) bool { return !strings.ContainsAny(s, ":/") }

func isPath(s string) bool { return strings.HasPrefix(s, "/") && path.Clean(s) == s }

func isSlice(s string) bool {
	name, ok := strings.CutSuffix(s, ".slice")
	return ok && name != "" && strings.Trim(name, unitChars) == ""
}

func isDigest(s string) bool {
	hex, ok := strings.CutPrefix(s, "sha256:")
	return ok && hexID(hex)
}

func isRuntime(s string) bool {
	return slices.Contains([]string{"docker", "containerd", "podman", "cri-o"}, s)
}

// isRepository wants the registry's host in front, told from a name by a dot,
// a port or being localhost, as Docker tells them apart.
func isRepository(s string) bool {
	host, name, ok := strings.Cut(s, "/")
	if !ok || name == "" || strings.ContainsAny(name, ":@ ") || strings.ContainsAny(host, "@ ") {
		return false
	}
	return strings.ContainsAny(host, ".:") || host == "localhost"
}

func isDigested(s string) bool {
	repository, digest, ok := strings.Cut(s, "@")
	return ok && isRepository(repository) && isDigest(digest)
}
