package main

import (
	"bytes"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"

	"github.com/deputy-id/deputy/internal/durable"
)

// A file that --write makes, under the name that SPIRE gives it.
type file struct {
	name string
	data []byte
	mode os.FileMode
}

const (
	publicFile = 0o644
	secretFile = 0o600
)

func writeX509(dir string, resp *workload.X509SVIDResponse) ([]string, error) {
	files, err := x509Files(resp)
	if err != nil {
		return nil, err
	}
	return write(dir, files)
}

func x509Files(resp *workload.X509SVIDResponse) ([]file, error) {
	var files []file
	for i, s := range resp.Svids {
		chain, err := certificates(s.X509Svid)
		if err != nil {
			return nil, fmt.Errorf("parse X.509-SVID of %s: %w", s.SpiffeId, err)
		}
		// The certificate comes after its key: who waits for it finds both.
		files = append(files,
			file{fmt.Sprintf("svid.%d.key", i), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: s.X509SvidKey}), secretFile},
			file{fmt.Sprintf("svid.%d.pem", i), chain, publicFile},
		)
	}
	bundles, err := bundleFiles(resp)
	if err != nil {
		return nil, err
	}
	return append(bundles, files...), nil
}

func writeBundles(dir string, resp *workload.X509SVIDResponse) ([]string, error) {
	files, err := bundleFiles(resp)
	if err != nil {
		return nil, err
	}
	return write(dir, files)
}

func bundleFiles(resp *workload.X509SVIDResponse) ([]file, error) {
	var files []file
	for i, s := range resp.Svids {
		bundle, err := certificates(s.Bundle)
		if err != nil {
			return nil, fmt.Errorf("parse bundle of %s: %w", s.SpiffeId, err)
		}
		files = append(files, file{fmt.Sprintf("bundle.%d.pem", i), bundle, publicFile})
		for j, id := range slices.Sorted(maps.Keys(resp.FederatedBundles)) {
			bundle, err := certificates(resp.FederatedBundles[id])
			if err != nil {
				return nil, fmt.Errorf("parse bundle of %s: %w", id, err)
			}
			files = append(files, file{fmt.Sprintf("federated_bundle.%d.%d.pem", i, j), bundle, publicFile})
		}
	}
	return files, nil
}

func writeJWT(dir string, resp *workload.JWTSVIDResponse) ([]string, error) {
	var files []file
	for i, s := range resp.Svids {
		files = append(files, file{fmt.Sprintf("jwt_svid.%d.token", i), []byte(s.Svid), secretFile})
	}
	return write(dir, files)
}

// write replaces each file as a whole and returns their paths. A file that
// holds the same already is left alone.
func write(dir string, files []file) ([]string, error) {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	var paths []string
	for _, f := range files {
		path := filepath.Join(dir, f.name)
		if err := writeFile(path, f); err != nil {
			return nil, err
		}
		paths = append(paths, path)
	}
	return paths, nil
}

func writeFile(path string, f file) error {
	info, err := os.Lstat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
	case err != nil:
		return err
	case info.Mode() == f.mode:
		if old, err := os.ReadFile(path); err == nil && bytes.Equal(old, f.data) {
			return nil
		}
	}
	return durable.WriteFile(path, f.data, f.mode)
}
