package main

import (
	"strconv"
	"testing"

	"golang.org/x/sys/unix"
)

func TestParseTarget(t *testing.T) {
	for text, want := range map[string]*target{
		"4711":                 {signal: unix.SIGHUP, pid: 4711},
		"4711:USR1":            {signal: unix.SIGUSR1, pid: 4711},
		"4711:SIGTERM":         {signal: unix.SIGTERM, pid: 4711},
		"/run/x.pid":           {signal: unix.SIGHUP, file: "/run/x.pid"},
		"/run/x.pid:USR2":      {signal: unix.SIGUSR2, file: "/run/x.pid"},
		"/run/a:b/x.pid":       {signal: unix.SIGHUP, file: "/run/a:b/x.pid"},
		"/run/a:b/x.pid:HUP":   {signal: unix.SIGHUP, file: "/run/a:b/x.pid"},
		"/run/../x.pid":        {signal: unix.SIGHUP, file: "/x.pid"},
		"":                     nil,
		":HUP":                 nil,
		"0":                    nil,
		"2147483648":           nil,
		"99999999999999999999": nil,
		"4711:":                nil,
		"4711:hup":             nil,
		"4711:1":               nil,
	} {
		got, err := parseTarget(text)
		switch {
		case want == nil && err == nil:
			t.Errorf("%q: got %+v, want an error", text, got)
		case want != nil && (err != nil || got.signal != want.signal || got.pid != want.pid || got.file != want.file):
			t.Errorf("%q: got %+v, %v, want %+v", text, got, err, want)
		}
	}
}

func FuzzParsePID(f *testing.F) {
	for _, text := range []string{"1", "4711\n", " 4711 \n/var/lib/postgresql\n5432\n", "-1", "+5", "0", "", "\n1", "0x10", "2147483647", "2147483648"} {
		f.Add([]byte(text))
	}
	f.Fuzz(func(t *testing.T, text []byte) {
		pid, err := parsePID(text)
		if err == nil && (pid < 1 || pid > 1<<31-1) {
			t.Fatalf("got %d of %q", pid, text)
		}
		if err == nil {
			if again, err := parsePID([]byte(strconv.Itoa(pid))); err != nil || again != pid {
				t.Fatalf("got %d, %v of %d", again, err, pid)
			}
		}
	})
}

func FuzzBelongs(f *testing.F) {
	f.Add([]byte("Name:\tUid:\t0\nUid:\t1000\t0\t4711\t1000\n"), 4711)
	f.Add([]byte("Uid:\t1000\n"), 1000)
	f.Fuzz(func(t *testing.T, status []byte, uid int) { belongs(status, uid) })
}

func TestBelongs(t *testing.T) {
	const status = "Name:\tUid:\nUmask:\t0022\nPid:\t7\nUid:\t1000\t1001\t1002\t1003\nGid:\t5\t5\t5\t5\n"
	for uid, want := range map[int]bool{1000: true, 1001: false, 1002: true, 1003: false, 5: false, 7: false} {
		if got := belongs([]byte(status), uid); got != want {
			t.Errorf("UID %d: got %t, want %t", uid, got, want)
		}
	}
	if belongs(nil, 0) {
		t.Error("a process without a status belongs to root")
	}
}
