package main

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/deputy-id/deputy/test/engine"
)

// clients says where clients run: in a container of an engine of our own, so
// that every kind of evidence is asked for, or, where there can be none, on
// this host.
func clients(self, dir string) (place, func(), error) {
	program, err := os.ReadFile(self)
	if err != nil {
		return place{}, nil, err
	}
	digest := fmt.Sprintf("unix:sha256:%x", sha256.Sum256(program))
	e, err := engine.Open()
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench: no container engine, so evidence is without images:", err)
		return place{
			dir:    dir,
			client: func(args ...string) *exec.Cmd { return exec.Command(self, args...) },
			config: entry(digest),
			spire:  []string{digest},
			what:   "on the host, known by executable digest",
		}, func() {}, nil
	}
	close := func() {
		if err := e.Close(); err != nil {
			fmt.Fprintln(os.Stderr, "bench: end engine:", err)
		}
	}
	p, err := inContainer(e, program, dir, digest)
	if err != nil {
		close()
		return place{}, nil, err
	}
	return p, close, nil
}

func inContainer(e *engine.Engine, program []byte, dir, digest string) (place, error) {
	load := e.Command("import", "--change", `ENTRYPOINT ["/bench"]`, "-", "bench:measured")
	root, err := image(program)
	if err != nil {
		return place{}, err
	}
	load.Stdin = root
	id, err := load.Output()
	if err != nil {
		return place{}, fmt.Errorf("import image: %w", explain(err))
	}
	// One container for all clients, each a process of its own in it. The
	// directories of the sockets come and go with the daemons, so their parent
	// is what it sees.
	deputy := filepath.Join(dir, "deputy")
	if err := os.MkdirAll(deputy, 0o755); err != nil {
		return place{}, err
	}
	name, err := e.Command("run", "--detach", "--network", "none", "--volume", dir+":"+dir, "bench:measured", "idle").Output()
	if err != nil {
		return place{}, fmt.Errorf("run container: %w", explain(err))
	}
	container := strings.TrimSpace(string(name))
	return place{
		dir: dir,
		client: func(args ...string) *exec.Cmd {
			return e.Command(append([]string{"exec", "--interactive", container, "/bench"}, args...)...)
		},
		config: fmt.Sprintf("attestor \"docker\" { socket = %q }\n", e.Socket()) +
			entry("image:config_digest:"+strings.TrimSpace(string(id)), digest),
		spire:  []string{"docker:image_config_digest:" + strings.TrimSpace(string(id)), digest},
		docker: e.Socket(),
		what:   "in a container, known by image and executable digest",
	}, nil
}

func entry(selectors ...string) string {
	return fmt.Sprintf("entry \"/agent/bench\" {\n  selectors = [%s]\n}\n", `"`+strings.Join(selectors, `", "`)+`"`)
}

// image is a root file system that holds the program alone.
func image(program []byte) (*bytes.Buffer, error) {
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	if err := w.WriteHeader(&tar.Header{Name: "bench", Mode: 0o755, Size: int64(len(program))}); err != nil {
		return nil, err
	}
	if _, err := w.Write(program); err != nil {
		return nil, err
	}
	return &b, w.Close()
}
