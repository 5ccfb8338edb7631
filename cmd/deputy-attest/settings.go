package main

import (
	"github.com/deputy-id/deputy/conf"
	"github.com/deputy-id/deputy/plugins/attest"
)

// decode turns plugin_data into settings. Its errors are conf.Problems, each
// with its place.
func decode(text string) (attest.Settings, error) {
	c, err := conf.ParseAttest(text)
	if err != nil {
		return attest.Settings{}, err
	}
	s := attest.Settings{
		Type:        c.Type.Value,
		NoDigests:   !c.Digests.Value,
		AllowTraced: c.AllowTraced.Value,
		DenyUnknown: c.OnUnknown.Value == conf.Deny,
		Systemd:     c.Systemd != nil,
	}
	if d := c.Docker; d != nil {
		s.Docker = &attest.Docker{Socket: d.Socket.Value}
		for _, name := range d.Env {
			s.Docker.Env = append(s.Docker.Env, name.Value)
		}
	}
	if err := s.Check(); err != nil { // of the type alone
		return attest.Settings{}, conf.Problems{{Range: c.Type.Range, Reason: err.Error()}}
	}
	return s, nil
}
