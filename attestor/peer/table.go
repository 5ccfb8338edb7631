package peer

// A Table holds every pinned process once, however many connections it has.
// A process that nobody holds any more is kept for a while, because its next
// connection is likely to be near; how many of those there are is bounded.
type Table struct{}

// NewTable returns an empty table. Legacy names the kernel features that are
// missing and what stands in for them, for the log; none are missing from 6.13 on.
func NewTable() (t *Table, legacy []string, err error) { panic("unbuilt") }

// Open pins the process that has this PID now. The caller closes it.
func (t *Table) Open(pid int32) (*Process, error) { panic("unbuilt") }

// Close lets go of every process that nobody holds, and ends the table's
// goroutine. No Open may follow.
func (t *Table) Close() error { panic("unbuilt") }
