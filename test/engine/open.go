package engine

import (
	"os"
	"os/exec"
)

// Open starts an engine for a program that is not a test; the caller closes
// it. What the machine lacks is installed, where that is possible.
func Open() (*Engine, error) { return start() }

// Close ends the engine with its containers and files.
func (e *Engine) Close() error { return e.stop() }

// OpenRegistry is Registry for a program that is not a test.
func (e *Engine) OpenRegistry() (*Registry, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.registry == nil {
		r, err := startRegistry(e.dir)
		if err != nil {
			return nil, err
		}
		e.registry = r
	}
	return e.registry, nil
}

// Command returns a command of Docker's command line against the engine.
func (e *Engine) Command(args ...string) *exec.Cmd {
	cmd := exec.Command(e.docker, append([]string{"--host", "unix://" + e.Socket(), "--config", e.dir}, args...)...)
	cmd.Env = append(os.Environ(), "DOCKER_BUILDKIT=0") // the builder of 20.10 that needs nothing else
	return cmd
}
