package peers

import (
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
)

const kubernetesVersion = "1.34.2"

// kubernetesMain is etcd, the API server and the kubelet in one program, by its
// first argument: most of what takes long to build is in two of them.
const kubernetesMain = `package main

import (
	"context"
	"os"

	"go.etcd.io/etcd/server/v3/etcdmain"
	"k8s.io/component-base/cli"
	apiserver "k8s.io/kubernetes/cmd/kube-apiserver/app"
	kubelet "k8s.io/kubernetes/cmd/kubelet/app"
)

func main() {
	os.Args = os.Args[1:]
	switch os.Args[0] {
	case "etcd":
		etcdmain.Main(os.Args)
	case "kube-apiserver":
		os.Exit(cli.Run(apiserver.NewAPIServerCommand()))
	case "kubelet":
		os.Exit(cli.Run(kubelet.NewKubeletCommand(context.Background())))
	}
	os.Exit(2)
}
`

// kubernetes builds Kubernetes, once for this machine. Its module cannot be
// required by another as it stands: it has no versions of the modules that are
// directories of its repository.
var kubernetes = sync.OnceValues(func() (string, error) {
	name := fmt.Sprintf("kubernetes-%s-%.6x", kubernetesVersion, sha256.Sum256([]byte(kubernetesMain)))
	path := cached(name)
	if _, err := os.Stat(path); err == nil {
		return path, nil
	}
	fmt.Fprintf(os.Stderr, "building %s (once; ten minutes and more)\n", name)
	dir, err := os.MkdirTemp("", "deputy-peers-")
	if err != nil {
		return "", err
	}
	defer os.RemoveAll(dir)
	if err := kubernetesModule(dir); err != nil {
		return "", fmt.Errorf("write a module around kubernetes: %w", err)
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return "", err
	}
	temp := fmt.Sprintf("%s.%d", path, os.Getpid())
	defer os.Remove(temp)
	// The API server does not start without a version.
	const version = "k8s.io/component-base/version"
	cmd := exec.Command("go", "build", "-mod=mod", "-ldflags",
		"-s -w -X "+version+".gitMajor=1 -X "+version+".gitMinor="+strings.Split(kubernetesVersion, ".")[1]+" -X "+version+".gitVersion=v"+kubernetesVersion,
		"-o", temp, ".")
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOWORK=off")
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("build kubernetes: %w\n%s", err, out)
	}
	return path, os.Rename(temp, path)
})

// kubernetesModule writes a module of the program. Its go.mod is Kubernetes'
// own, with what is published of its directories in their place.
func kubernetesModule(dir string) error {
	cmd := exec.Command("go", "mod", "download", "-json", "k8s.io/kubernetes@v"+kubernetesVersion)
	cmd.Dir = dir
	out, err := cmd.Output()
	if err != nil {
		return fmt.Errorf("download: %w\n%s", err, out)
	}
	var source struct{ Dir string }
	if err := json.Unmarshal(out, &source); err != nil {
		return err
	}
	theirs, err := os.ReadFile(filepath.Join(source.Dir, "go.mod"))
	if err != nil {
		return err
	}
	sums, err := os.ReadFile(filepath.Join(source.Dir, "go.sum"))
	if err != nil {
		return err
	}
	published := "v0" + strings.TrimPrefix(kubernetesVersion, "1")
	ours := regexp.MustCompile(`(?m)^module .*$`).ReplaceAllString(string(theirs), "module node\n\nrequire k8s.io/kubernetes v"+kubernetesVersion)
	ours = strings.ReplaceAll(ours, " v0.0.0\n", " "+published+"\n")
	ours = strings.ReplaceAll(ours, " v0.0.0 // indirect\n", " "+published+" // indirect\n")
	ours = regexp.MustCompile(`(?m)(k8s\.io/\S+) => \./staging/src/\S+`).ReplaceAllString(ours, "$1 => $1 "+published)
	for name, text := range map[string]string{"go.mod": ours, "go.sum": string(sums), "main.go": kubernetesMain} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			return err
		}
	}
	return nil
}
