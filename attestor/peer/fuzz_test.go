package peer

import (
	"bytes"
	"testing"

	"golang.org/x/net/http2"
	"golang.org/x/sys/unix"
)

func TestParseStat(t *testing.T) {
	tail := " 1 2 3 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 4711 100 200"
	tests := map[string]struct {
		text string
		want stat
		ok   bool
	}{
		"plain":                     {"12 (cat) S" + tail, stat{'S', 4711}, true},
		"command forges fields":     {"12 (x) R 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1 99) Z" + tail, stat{'Z', 4711}, true},
		"command with a newline":    {"12 (x\n13 (y) R) S" + tail, stat{'S', 4711}, true},
		"no command":                {"12 S" + tail, stat{}, false},
		"too few fields":            {"12 (cat) S 1 2 3", stat{}, false},
		"start time is no number":   {"12 (cat) S 1 2 3 0 -1 4 1 2 3 4 5 6 7 8 20 0 1 0 x", stat{}, false},
		"state is more than a byte": {"12 (cat) SS" + tail, stat{}, false},
		"empty":                     {"", stat{}, false},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			got, err := parseStat([]byte(tt.text))
			if got != tt.want || (err == nil) != tt.ok {
				t.Errorf("got %+v, %v, want %+v, ok %v", got, err, tt.want, tt.ok)
			}
		})
	}
}

const statusText = "Name:\tcat\nUmask:\t0022\nState:\tS (sleeping)\nTgid:\t12\nPid:\t12\nPPid:\t7\nTracerPid:\t0\n" +
	"Uid:\t1\t2\t3\t4\nGid:\t5\t6\t7\t4294967295\nFDSize:\t64\n"

func TestParseStatus(t *testing.T) {
	want := Info{Credentials: Credentials{UID: 1, EUID: 2, SUID: 3, FSUID: 4, GID: 5, EGID: 6, SGID: 7, FSGID: 4294967295}, PPID: 7}
	if got, err := parseStatus([]byte(statusText)); got != want || err != nil {
		t.Errorf("got %+v, %v, want %+v", got, err, want)
	}
	for name, text := range map[string]string{
		"empty":            "",
		"no Gid":           "PPid:\t7\nUid:\t1\t2\t3\t4\n",
		"Uid twice":        statusText + "Uid:\t0\t0\t0\t0\n",
		"Gid twice":        statusText + "Gid:\t0\t0\t0\t0\n",
		"PPid twice":       statusText + "PPid:\t1\n",
		"three IDs":        "PPid:\t7\nUid:\t1\t2\t3\nGid:\t5\t6\t7\t8\n",
		"a negative ID":    "PPid:\t7\nUid:\t-1\t2\t3\t4\nGid:\t5\t6\t7\t8\n",
		"a parent of text": "PPid:\tx\nUid:\t1\t2\t3\t4\nGid:\t5\t6\t7\t8\n",
	} {
		t.Run(name, func(t *testing.T) {
			if got, err := parseStatus([]byte(text)); err == nil {
				t.Errorf("got %+v, want an error", got)
			}
		})
	}
}

func TestParseUcred(t *testing.T) {
	one := unix.UnixCredentials(&unix.Ucred{Pid: 7, Uid: 8, Gid: 9})
	if pid, uid, gid, err := parseUcred(one); pid != 7 || uid != 8 || gid != 9 || err != nil {
		t.Errorf("got %d, %d, %d, %v, want 7, 8, 9", pid, uid, gid, err)
	}
	for name, b := range map[string][]byte{
		"nobody":      nil,
		"two":         append(bytes.Clone(one), one...),
		"descriptors": unix.UnixRights(1, 2, 3),
		"cut":         one[:20],
	} {
		t.Run(name, func(t *testing.T) {
			if pid, _, _, err := parseUcred(b); err == nil {
				t.Errorf("got PID %d, want an error", pid)
			}
		})
	}
}

func FuzzParseStat(f *testing.F) {
	f.Add([]byte("12 (cat) S 1 2 3 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 4711 100 200"))
	f.Add([]byte("12 (a) b) Z 1"))
	f.Add([]byte(")"))
	f.Fuzz(func(t *testing.T, b []byte) {
		got, err := parseStat(b)
		if err != nil && got != (stat{}) {
			t.Errorf("got %+v beside an error", got)
		}
	})
}

func FuzzParseStatus(f *testing.F) {
	f.Add([]byte(statusText))
	f.Add([]byte("Uid:\nGid:\nPPid:\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		got, err := parseStatus(b)
		if err != nil && got != (Info{}) {
			t.Errorf("got %+v beside an error", got)
		}
	})
}

func FuzzParseUcred(f *testing.F) {
	f.Add(unix.UnixCredentials(&unix.Ucred{Pid: 7, Uid: 8, Gid: 9}))
	f.Add(unix.UnixRights(1, 2, 3))
	f.Fuzz(func(t *testing.T, b []byte) {
		if pid, uid, gid, err := parseUcred(b); err == nil &&
			!bytes.Equal(b[:28], unix.UnixCredentials(&unix.Ucred{Pid: pid, Uid: uid, Gid: gid})[:28]) {
			t.Errorf("read %d, %d, %d from %x", pid, uid, gid, b)
		}
	})
}

func FuzzParseDiagReply(f *testing.F) {
	f.Add(diagRequest(1))
	f.Add(append(diagRequest(1), 8, 0, 2, 0, 1, 2, 3, 4))
	f.Add(append(diagRequest(1)[:32], 0, 0, 0, 0, 0))
	f.Fuzz(func(t *testing.T, b []byte) {
		if ino, err := parseDiagReply(b); err != nil && ino != 0 {
			t.Errorf("got inode %d beside an error", ino)
		}
	})
}

// The answer is found at the same place however the bytes arrive, and cutting
// it out leaves frames that a framer reads.
func FuzzOpening(f *testing.F) {
	ping := [pingLen]byte{1, 2, 3, 4, 5, 6, 7, 8}
	var b bytes.Buffer
	b.WriteString(clientPreface)
	fr := http2.NewFramer(&b, nil)
	fr.WriteSettings(http2.Setting{ID: http2.SettingInitialWindowSize, Val: 1 << 20})
	f.Add(bytes.Clone(b.Bytes()), 3)
	fr.WriteSettingsAck()
	fr.WritePing(true, ping)
	fr.WriteWindowUpdate(0, 1)
	f.Add(bytes.Clone(b.Bytes()), 1)
	f.Add([]byte("GET / HTTP/1.1\r\n"), 4)
	f.Add(append([]byte(clientPreface), 0xff, 0xff, 0xff, 4, 0, 0, 0, 0, 0), 7)
	f.Fuzz(func(t *testing.T, b []byte, piece int) {
		whole := opening{ping: ping}
		want, wantErr := whole.scan(b)
		piece = max(1, piece&0xff)
		parts := opening{ping: ping}
		got, err := -1, error(nil)
		for n := 0; n < len(b) && got < 0 && err == nil; {
			n = min(n+piece, len(b))
			got, err = parts.scan(b[:n])
		}
		if got != want && wantErr == nil || (err == nil) != (wantErr == nil) && got < 0 {
			t.Fatalf("in pieces of %d: got %d, %v, want %d, %v", piece, got, err, want, wantErr)
		}
		if want < 0 {
			return
		}
		fr := http2.NewFramer(nil, bytes.NewReader(b[want:]))
		frame, err := fr.ReadFrame()
		if err != nil {
			t.Fatal(err)
		}
		if p, ok := frame.(*http2.PingFrame); !ok || !p.IsAck() || p.Data != ping {
			t.Fatalf("at %d stands %v, want the answer", want, frame)
		}
	})
}

func FuzzFrameTracker(f *testing.F) {
	var b bytes.Buffer
	fr := http2.NewFramer(&b, nil)
	fr.WriteData(1, false, []byte("one"))
	fr.WriteSettingsAck()
	fr.WriteGoAway(1, 0, nil)
	f.Add(b.Bytes(), 5)
	f.Fuzz(func(t *testing.T, b []byte, piece int) {
		piece = max(1, piece&0xff)
		var whole, parts frameTracker
		whole.advance(b)
		for rest := b; len(rest) > 0; {
			n := min(piece, len(rest))
			parts.advance(rest[:n])
			rest = rest[n:]
		}
		if whole.have != parts.have || whole.left != parts.left {
			t.Errorf("whole %+v, in pieces of %d %+v", whole, piece, parts)
		}
		var one frameTracker
		if len(b) > 0 {
			one.advance(b[:1])
			if n := one.toBoundary(b[1:]); one.boundary() != (1+n < len(b) || whole.boundary() && 1+n == len(b)) && 1+n != len(b) {
				t.Errorf("stopped at %d of %d within a frame", 1+n, len(b))
			}
		}
	})
}
