package conf

import (
	"errors"
	"path/filepath"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Default is the configuration without a file. For root everything is where a
// system service has it; for another user, in the directories that the XDG
// Base Directory Specification gives that user.
func Default(root bool, getenv func(string) string) (*Config, error) {
	run, data := "/run/deputy", "/var/lib/deputy"
	if !root {
		var err error
		if run, data, err = userDirs(getenv); err != nil {
			return nil, err
		}
	}
	return &Config{
		TrustDomain:    setting(spiffeid.RequireTrustDomainFromString("deputy.internal")),
		DataDir:        setting(data),
		LogLevel:       setting(hclog.Info),
		LogFormat:      setting(Text),
		WorkloadSocket: Socket{Path: setting(filepath.Join(run, "public", "workload.sock"))},
		AdminSocket:    AdminSocket{Path: setting(filepath.Join(run, "private", "admin.sock"))},
		Authority: Local{
			CATTL:           setting(24 * time.Hour),
			KeyType:         setting("ec-p256"),
			WorkloadKeyType: setting("ec-p256"),
			Keys:            setting(Disk),
		},
		SDS: defaultSDS(),
		run: run,
	}, nil
}

func userDirs(getenv func(string) string) (run, data string, err error) {
	// The specification has relative values ignored.
	dir := func(name string) string {
		if d := getenv(name); filepath.IsAbs(d) {
			return d
		}
		return ""
	}
	state := dir("XDG_STATE_HOME")
	if state == "" {
		home := dir("HOME")
		if home == "" {
			return "", "", errors.New("find a place for state: neither XDG_STATE_HOME nor HOME is an absolute path")
		}
		state = filepath.Join(home, ".local", "state")
	}
	data = filepath.Join(state, "deputy")
	if runtime := dir("XDG_RUNTIME_DIR"); runtime != "" {
		return filepath.Join(runtime, "deputy"), data, nil
	}
	return filepath.Join(data, "run"), data, nil
}

func setting[T any](v T) Setting[T] { return Setting[T]{Value: v} }
