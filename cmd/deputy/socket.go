package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/deputy-id/deputy/conf"
)

// A place is where one of the daemon's sockets is looked for.
type place struct {
	flag string // of the command line
	env  string
	of   func(*conf.Config) string
}

var (
	workloadPlace = place{"--socket", "SPIFFE_ENDPOINT_SOCKET", func(c *conf.Config) string { return c.WorkloadSocket.Path.Value }}
	adminPlace    = place{"--admin-socket", "DEPUTY_ADMIN_SOCKET", func(c *conf.Config) string { return c.AdminSocket.Path.Value }}
)

// find returns the path of the socket: what the flag says, else the
// environment, else the system's if it is there, else the user's own.
func (p place) find(flag string) (string, error) {
	if flag != "" {
		return socketPath(p.flag, flag)
	}
	if env := os.Getenv(p.env); env != "" {
		return socketPath(p.env, env)
	}
	system, err := p.standard(true)
	if err != nil || os.Geteuid() == 0 {
		return system, err
	}
	// That a directory may not be looked into says that it is there.
	if _, err := os.Stat(system); !errors.Is(err, fs.ErrNotExist) {
		return system, nil
	}
	return p.standard(false)
}

// standard is where a daemon without a file has the socket.
func (p place) standard(root bool) (string, error) {
	c, err := conf.Default(root, os.Getenv)
	if err != nil {
		return "", err
	}
	return p.of(c), nil
}

// socketPath reads a path or unix:///path.
func socketPath(source, s string) (string, error) {
	path, isURL := strings.CutPrefix(s, "unix://")
	if !isURL {
		if path, isURL = strings.CutPrefix(s, "unix:"); !isURL && strings.Contains(s, "://") {
			return "", usage(fmt.Errorf("%s: %q is neither a path nor unix:///path", source, s))
		}
	}
	if isURL && !filepath.IsAbs(path) {
		return "", usage(fmt.Errorf("%s: %q has no absolute path", source, s))
	}
	return filepath.Abs(path)
}
