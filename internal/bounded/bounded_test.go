package bounded

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/iotest"
)

func TestRead(t *testing.T) {
	broken := errors.New("broken")
	for name, tt := range map[string]struct {
		text  string
		fails string
	}{
		"nothing":          {"", ""},
		"all there may be": {"12345", ""},
		"a byte too many":  {"123456", "longer than 5 bytes"},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := Read(iotest.OneByteReader(strings.NewReader(tt.text)), 5)
			if tt.fails != "" {
				if err == nil || err.Error() != tt.fails || got != nil {
					t.Errorf("got %q, %v, want %s", got, err, tt.fails)
				}
				return
			}
			if err != nil || string(got) != tt.text {
				t.Errorf("got %q, %v", got, err)
			}
		})
	}
	if got, err := Read(iotest.ErrReader(broken), 5); !errors.Is(err, broken) || got != nil {
		t.Errorf("got %q, %v, want the reader's error", got, err)
	}
}

func TestFileNamesItself(t *testing.T) {
	path := filepath.Join(t.TempDir(), "text")
	if err := os.WriteFile(path, []byte("123456"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := File(path, 5); err == nil || err.Error() != "read "+path+": longer than 5 bytes" {
		t.Errorf("got %v", err)
	}
	if got, err := File(path, 6); err != nil || string(got) != "123456" {
		t.Errorf("got %q, %v", got, err)
	}
	if _, err := File(path+"s", 5); !errors.Is(err, fs.ErrNotExist) || !strings.Contains(err.Error(), path+"s") {
		t.Errorf("got %v", err)
	}
}
