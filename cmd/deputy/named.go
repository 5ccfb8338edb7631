package main

import (
	"github.com/hashicorp/go-hclog"

	"github.com/deputy-id/deputy/attestor/kubernetes"
	"github.com/deputy-id/deputy/conf"
	"github.com/deputy-id/deputy/internal/keypair"
)

// checkNamed opens the files that the settings name and only a start reads: a
// reload does without them, and may come while they are being replaced.
func (s *settings) checkNamed() (problems conf.Problems) {
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
		log.Info("certificate of "+of+" replaced", "ends", pair.Certificate().NotAfter)
	}
	return pair, nil
}
