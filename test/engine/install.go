package engine

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// programs are those that each Debian package is wanted for.
var programs = map[string][]string{
	"docker.io":       {"dockerd", "docker", "containerd", "runc"},
	"docker-registry": {"docker-registry"},
}

// A cannotError says that this machine cannot have what the test needs.
type cannotError struct{ reason string }

func (e *cannotError) Error() string { return e.reason }

// find looks for a program in the directories of the system too, which are not
// on every user's path. The package's own comes first: another version may
// stand in /usr/local.
func find(program string) (string, error) {
	for _, dir := range append([]string{"/usr/bin", "/usr/sbin"}, filepath.SplitList(os.Getenv("PATH"))...) {
		if path := filepath.Join(dir, program); unix.Access(path, unix.X_OK) == nil {
			return path, nil
		}
	}
	return "", fmt.Errorf("no %s on this machine", program)
}

// need installs the packages whose programs are missing.
func need(packages ...string) error {
	if os.Geteuid() != 0 {
		return &cannotError{"a container engine needs root"}
	}
	var missing []string
	for _, p := range packages {
		for _, program := range programs[p] {
			if _, err := find(program); err != nil {
				missing = append(missing, p)
				break
			}
		}
	}
	if len(missing) == 0 {
		return nil
	}
	if _, err := os.Stat("/etc/debian_version"); err != nil {
		return &cannotError{"missing, and this is not Debian, to install them: " + strings.Join(missing, ", ")}
	}
	return install(missing)
}

// install installs packages. Several test binaries may want to at once.
func install(packages []string) error {
	lock, err := os.OpenFile("/var/lib/dpkg/deputy-tests.lock", os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return err
	}
	defer lock.Close()
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX); err != nil {
		return fmt.Errorf("wait for another installation: %w", err)
	}
	fmt.Fprintln(os.Stderr, "engine: installing", strings.Join(packages, ", "))
	for _, args := range [][]string{
		{"update", "-q"},
		append([]string{"install", "-y", "-q", "--no-install-recommends", "-o", "DPkg::Lock::Timeout=300"}, packages...),
	} {
		cmd := exec.Command("apt-get", args...)
		cmd.Env = append(os.Environ(), "DEBIAN_FRONTEND=noninteractive")
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("apt-get %s: %w: %s", args[0], err, out[max(0, len(out)-1024):])
		}
	}
	return nil
}
