// Package bounded reads what others wrote, and no more of it than there may be.
package bounded

import (
	"fmt"
	"io"
	"io/fs"
	"os"
)

// File reads a whole file, which may hold so many bytes at most.
func File(path string, most int) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return OpenFile(f, most)
}

// OpenFile reads what is left of a file.
func OpenFile(f *os.File, most int) ([]byte, error) {
	data, err := Read(f, most)
	if _, ok := err.(tooLong); ok {
		return nil, &fs.PathError{Op: "read", Path: f.Name(), Err: err}
	}
	return data, err
}

// Read reads to the end, which must come within so many bytes.
func Read(r io.Reader, most int) ([]byte, error) {
	data, err := io.ReadAll(io.LimitReader(r, int64(most)+1))
	switch {
	case err != nil:
		return nil, err
	case len(data) > most:
		return nil, tooLong(most)
	}
	return data, nil
}

type tooLong int

func (most tooLong) Error() string { return fmt.Sprintf("longer than %d bytes", int(most)) }
