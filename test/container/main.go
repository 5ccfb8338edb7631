// Command container runs one container, on an engine of its own and from an
// image that went through a registry, for tests that are in another module. It
// prints a line of JSON once the container runs, and ends it all when its
// standard input does.
package main

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/deputy-id/deputy/test/engine"
)

const usage = "usage: container PROGRAM [OPTION-OF-DOCKER-RUN]... -- ARGUMENT...\n"

func main() {
	if len(os.Args) < 3 {
		fmt.Fprint(os.Stderr, usage)
		os.Exit(2)
	}
	options, arguments := os.Args[2:], []string(nil)
	for i, a := range options {
		if a == "--" {
			options, arguments = options[:i], options[i+1:]
			break
		}
	}
	if err := run(os.Args[1], options, arguments); err != nil {
		fmt.Fprintln(os.Stderr, "container:", err)
		os.Exit(1)
	}
}

// Running is what is printed.
type Running struct {
	ID           string   `json:"id"`
	Digest       string   `json:"digest"`        // of the image's manifest
	ConfigDigest string   `json:"config_digest"` // of its configuration
	Docker       []string `json:"docker"`        // the command line to which docker's arguments are added
}

func run(program string, options, arguments []string) (err error) {
	e, err := engine.Open()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, e.Close()) }()
	registry, err := e.OpenRegistry()
	if err != nil {
		return err
	}
	image, err := archive(program)
	if err != nil {
		return err
	}
	name := registry.Address() + "/agents/researcher:1"
	if _, err := docker(e, image, "import", "--change", `ENTRYPOINT ["/program"]`, "-", name); err != nil {
		return err
	}
	if _, err := docker(e, nil, "push", "--quiet", name); err != nil {
		return err
	}
	r := Running{Docker: e.Command().Args}
	if r.ConfigDigest, err = docker(e, nil, "image", "inspect", "--format", "{{.Id}}", name); err != nil {
		return err
	}
	reference, err := docker(e, nil, "image", "inspect", "--format", "{{index .RepoDigests 0}}", name)
	if err != nil {
		return err
	}
	_, r.Digest, _ = strings.Cut(reference, "@")
	args := append([]string{"run", "--detach", "--network", "none"}, options...)
	if r.ID, err = docker(e, nil, append(append(args, name), arguments...)...); err != nil {
		return err
	}
	if err := json.NewEncoder(os.Stdout).Encode(r); err != nil {
		return err
	}
	_, err = io.Copy(io.Discard, os.Stdin)
	return err
}

func docker(e *engine.Engine, in io.Reader, args ...string) (string, error) {
	cmd := e.Command(args...)
	var stderr bytes.Buffer
	cmd.Stdin, cmd.Stderr = in, &stderr
	out, err := cmd.Output()
	if err != nil {
		return "", fmt.Errorf("docker %s: %w: %s", args[0], err, bytes.TrimSpace(stderr.Bytes()))
	}
	return strings.TrimSpace(string(out)), nil
}

// archive is a root file system that holds the program alone.
func archive(path string) (io.Reader, error) {
	program, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	if err := w.WriteHeader(&tar.Header{Name: "program", Mode: 0o755, Size: int64(len(program))}); err != nil {
		return nil, err
	}
	if _, err := w.Write(program); err != nil {
		return nil, err
	}
	return &b, w.Close()
}
