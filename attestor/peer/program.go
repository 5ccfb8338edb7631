package peer

import (
	"errors"
	"fmt"
	"sync"

	"golang.org/x/sys/unix"
)

// FileID names a file: device and inode.
type FileID struct{ Dev, Ino uint64 }

// A Program is one run of an executable by a process, from one execve to the
// next. Executing the same file again is another Program.
//
// What tells the runs apart is a /proc/PID/mem that is held open: it belongs
// to the address space, not to the process, so at 0, where nothing is ever
// mapped, it gives an error before an execve and end-of-file after it. Where
// we may not open it (as an ordinary user, for a process that is not dumpable
// or of another UID; under Yama's strictest setting) a second run of the same
// file is not noticed, and neither is it while another process shares the
// address space (vfork).
type Program struct {
	process *Process
	exe     FileID

	mu      sync.RWMutex // guards mem against being closed while it is read
	mem     int          // -1 where it may not be opened, and after the program ended
	changed error        // why it is not current any more; stays
}

// Program returns the program that the process runs now.
func (p *Process) Program() (*Program, error) {
	p.programMu.Lock()
	defer p.programMu.Unlock()
	if p.program != nil {
		err := p.program.Current()
		if err == nil {
			return p.program, nil
		}
		if !errors.Is(err, ErrProgramChanged) {
			return nil, err
		}
	}
	const tries = 3 // it may execute while we look
	for range tries {
		g, err := openProgram(p)
		if err != nil {
			return nil, err
		}
		if err = g.Current(); err == nil {
			if p.program != nil {
				p.program.forget()
			}
			p.program = g
			if err := p.use(func() error { return nil }); err != nil {
				g.forget() // released meanwhile
				return nil, err
			}
			return g, nil
		}
		g.forget()
		if !errors.Is(err, ErrProgramChanged) {
			return nil, err
		}
	}
	return nil, fmt.Errorf("identify program of %d: it keeps executing others: %w", p.pid, ErrProgramChanged)
}

// openProgram opens the address space first and looks at the executable
// after: if the address space is still the current one when Current asks, the
// executable that was seen in between is its own.
func openProgram(p *Process) (*Program, error) {
	mem, err := p.openat("mem")
	switch {
	case errors.Is(err, unix.EACCES), errors.Is(err, unix.EPERM), errors.Is(err, unix.ESRCH):
		mem = -1 // ESRCH: it has no memory, and so no executable either
	case err != nil:
		return nil, err
	}
	g := &Program{process: p, mem: mem}
	if g.exe, err = p.fileID("exe"); err != nil {
		g.forget()
		if errors.Is(err, unix.ENOENT) {
			return nil, fmt.Errorf("process %d has no executable: a kernel thread, or its main thread has exited", p.pid)
		}
		return nil, err
	}
	return g, nil
}

// Executable names the file that is run.
func (g *Program) Executable() FileID { return g.exe }

// Current returns nil while the process still runs this program,
// ErrProgramChanged after it executed another one, ErrGone after its exit.
func (g *Program) Current() error {
	err := g.look()
	if err == nil || !errors.Is(err, ErrProgramChanged) {
		return err
	}
	if g.process.Alive() != nil {
		err = ErrGone
	}
	g.end(err)
	return err
}

func (g *Program) look() error {
	g.mu.RLock()
	if g.changed != nil {
		defer g.mu.RUnlock()
		return g.changed
	}
	mapped, err := g.addressSpaceLives()
	g.mu.RUnlock()
	if err != nil {
		return err
	}
	if !mapped {
		return ErrProgramChanged
	}
	// The address space alone could be kept by another process that shares it,
	// and is not watched at all without mem.
	exe, err := g.process.fileID("exe")
	switch {
	case errors.Is(err, unix.ENOENT):
		return ErrProgramChanged
	case err != nil:
		return err
	case exe != g.exe:
		return ErrProgramChanged
	}
	return nil
}

// addressSpaceLives reads at 0. The caller has mu.
func (g *Program) addressSpaceLives() (bool, error) {
	if g.mem < 0 {
		return true, nil
	}
	var b [1]byte
	n, err := ignoringEINTR(func() (int, error) { return unix.Pread(g.mem, b[:], 0) })
	switch {
	case errors.Is(err, unix.EIO), n > 0:
		return true, nil
	case err == nil:
		return false, nil
	}
	return false, fmt.Errorf("look at address space of %d: %w", g.process.pid, err)
}

// forget closes what a program that is not current any more holds.
func (g *Program) forget() { g.end(ErrProgramChanged) }

func (g *Program) end(why error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.changed == nil {
		g.changed = why
	}
	if g.mem >= 0 {
		unix.Close(g.mem)
		g.mem = -1
	}
}
