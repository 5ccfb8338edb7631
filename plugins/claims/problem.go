package claims

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
)

// maxProblems are reported of one text: a file of another kind has thousands.
const maxProblems = 50

// A Problem is something wrong at one place of a text.
type Problem struct {
	File         string
	Line, Column int // from 1; columns count characters
	Byte         int // from 0
	Reason       string
}

// String is FILE:LINE:COL: reason.
func (p Problem) String() string {
	return fmt.Sprintf("%s:%d:%d: %s", p.File, p.Line, p.Column, p.Reason)
}

// Problems is all that is wrong with the rules, in the order of the text.
type Problems []Problem

// Error writes a problem a line.
func (p Problems) Error() string {
	lines := make([]string, len(p))
	for i, one := range p {
		lines[i] = one.String()
	}
	return strings.Join(lines, "\n")
}

func (p Problems) sort() {
	slices.SortStableFunc(p, func(a, b Problem) int {
		return cmp.Or(strings.Compare(a.File, b.File), a.Byte-b.Byte)
	})
}

// findings collects problems, as many as anybody reads.
type findings struct {
	problems Problems
	more     int
}

func (f *findings) add(t *text, at pos, format string, args ...any) {
	if len(f.problems) >= maxProblems {
		f.more++
		return
	}
	line, column := t.place(at)
	f.problems = append(f.problems, Problem{t.Name, line, column, t.Byte + int(at.off), fmt.Sprintf(format, args...)})
}

// err is nil if nothing was found.
func (f *findings) err() error {
	if len(f.problems) == 0 {
		return nil
	}
	f.problems.sort()
	if last := &f.problems[len(f.problems)-1]; f.more > 0 {
		last.Reason += fmt.Sprintf(" (and %d more)", f.more)
	}
	return f.problems
}
