package main

import (
	"errors"
	"os"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/hcl/v2"
	"golang.org/x/sys/unix"

	"github.com/deputy-id/deputy/attestor/kubernetes"
	"github.com/deputy-id/deputy/conf"
	"github.com/deputy-id/deputy/internal/keypair"
	"github.com/deputy-id/deputy/svid/local"
)

// checkNamed looks at what the settings name on this host and only a start
// reads: a reload does without it, and may come while it is being replaced.
func (s *settings) checkNamed() (problems conf.Problems) {
	if s.File == "" {
		return nil // defaults: there is no place to name
	}
	if _, err := adminGroup(s.Config); err != nil {
		problems.Add(s.AdminSocket.Group.Range, "%s", err)
	}
	if info, err := os.Stat(s.DataDir.Value); err == nil && !info.IsDir() || errors.Is(err, unix.ENOTDIR) {
		problems.Add(s.placed(s.DataDir.Range), "data_dir %s is not a directory", s.DataDir.Value)
	}
	if d := s.OIDCDiscovery; d != nil {
		if _, err := keypair.Open(d.CertFile.Value, d.KeyFile.Value); err != nil {
			problems.Add(d.CertFile.Range, "oidc_discovery: %s", err)
		}
	}
	if f := s.Federation; f != nil && f.Endpoint != nil && f.Endpoint.Profile.Value == conf.Web {
		if _, err := keypair.Open(f.Endpoint.CertFile.Value, f.Endpoint.KeyFile.Value); err != nil {
			problems.Add(f.Endpoint.CertFile.Range, "bundle_endpoint: %s", err)
		}
	}
	if b := s.Broker; b != nil && b.Kubelet != nil {
		if _, err := kubernetes.New(kubeletOptions(b.Kubelet)); err != nil {
			problems.Add(b.Kubelet.Range, "%s", err)
		}
	}
	problems.Sort()
	return problems
}

// checkUpstream makes a CA under the files of the upstream. A start with a CA
// that is still good does without them, so that this is no part of it.
func (s *settings) checkUpstream() error {
	if !s.Authority.UpstreamCert.Given() {
		return nil
	}
	return upstreamProblem(s.Config, local.CheckUpstream(authorityOptions(s.Config, nil)))
}

// upstreamProblem puts what is wrong with the files of an upstream at its place.
func upstreamProblem(c *conf.Config, err error) error {
	var bad *local.UpstreamError
	if errors.As(err, &bad) {
		return conf.Problems{{Range: c.Authority.UpstreamCert.Range, Reason: bad.Error()}}
	}
	return err
}

// placed is where a setting stands; the file's beginning for a default.
func (s *settings) placed(at hcl.Range) hcl.Range {
	if at == (hcl.Range{}) {
		return hcl.Range{Filename: s.File, Start: hcl.InitialPos, End: hcl.InitialPos}
	}
	return at
}

// cannotListen puts at its place that an address is none that we can listen on.
func cannotListen(at conf.Setting[string], err error) error {
	return conf.Problems{{Range: at.Range, Reason: err.Error()}}
}

func kubeletOptions(k *conf.Kubelet) kubernetes.Options {
	return kubernetes.Options{URL: k.URL.Value, TokenFile: k.TokenFile.Value, CAFile: k.CAFile.Value}
}

// openPair opens the certificate and key that a server shows, and has it said in
// the log when they are replaced.
func openPair(cert, key conf.Setting[string], of string, log hclog.Logger) (*keypair.Pair, error) {
	pair, err := keypair.Open(cert.Value, key.Value)
	if err != nil {
		return nil, err
	}
	pair.Report = func(err error) {
		if err != nil {
			log.Warn("certificate of "+of+" is not replaced, the last good one stays", "error", err)
			return
		}
		log.Info("certificate of "+of+" replaced", "ends", stamp(pair.Certificate().NotAfter))
	}
	return pair, nil
}
