package main

import (
	"os"
	"testing"
)

func TestSocketIsFoundByFlagThenEnvironmentThenStandardPlace(t *testing.T) {
	t.Setenv("SPIFFE_ENDPOINT_SOCKET", "unix:///env.sock")
	if got, err := workloadPlace.find("/flag.sock"); err != nil || got != "/flag.sock" {
		t.Errorf("got %q, %v, want the flag's", got, err)
	}
	if got, err := workloadPlace.find(""); err != nil || got != "/env.sock" {
		t.Errorf("got %q, %v, want the environment's", got, err)
	}
	if os.Geteuid() != 0 {
		t.Skip("NOT ROOT: the standard place of root is not looked at")
	}
	t.Setenv("SPIFFE_ENDPOINT_SOCKET", "")
	if got, err := workloadPlace.find(""); err != nil || got != "/run/deputy/public/workload.sock" {
		t.Errorf("got %q, %v, want the system's", got, err)
	}
}

func TestSocketPath(t *testing.T) {
	for in, want := range map[string]string{
		"/a.sock":        "/a.sock",
		"unix:///a.sock": "/a.sock",
		"unix:/a.sock":   "/a.sock",
		"tcp://1.2.3.4":  "",
		"unix://a.sock":  "",
		"unix:a.sock":    "",
	} {
		got, err := socketPath("--socket", in)
		if got != want || (err == nil) != (want != "") {
			t.Errorf("%q: got %q, %v, want %q", in, got, err, want)
		}
	}
}
