package track

import (
	"fmt"
	"time"

	"golang.org/x/sys/unix"
)

// How long the counters are looked at.
const (
	baseLimit  = 200 * time.Millisecond // for a moment in which nothing is written, where counting begins
	proveLimit = 500 * time.Millisecond // for one in which both have counted the same
	stillLimit = 20 * time.Millisecond  // that both stand still, and apart, before it is believed
)

// reading is both counts of a disk, read one after the other.
type reading struct {
	kernel  counters
	counted tally
}

// The programs count a request just before the kernel does. So the kernel's counter is read first where counting begins,
// and last where it is proved: what happens in between makes it look as if a write was missed, never as if none was.

// begin finds where counting begins: two readings that are the same, or failing that any, which is then not exact and will
// not be proved.
func begin(read func() (reading, error), bios bool, limit time.Duration) (base, error) {
	began := time.Now()
	for {
		first, err := read()
		if err != nil {
			return base{}, err
		}
		second, err := read()
		if err != nil {
			return base{}, err
		}
		b := base{Kernel: first.kernel.sectors, Counted: first.counted, Exact: true}
		if b.Since, err = monotonic(); err != nil {
			return base{}, err
		}
		if first.kernel.sectors == second.kernel.sectors && first.counted == second.counted && (!bios || second.kernel.writing == 0) {
			return b, nil
		}
		if time.Since(began) > limit {
			b.Exact = false
			return b, nil
		}
	}
}

func monotonic() (uint64, error) {
	var now unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &now); err != nil {
		return 0, fmt.Errorf("read the clock: %w", err)
	}
	return uint64(now.Nano()), nil
}

// missing gives how many sectors the kernel counted since the base that the programs did not; less than 0 if they counted more.
func (b base) missing(r reading) int64 {
	return int64(r.kernel.sectors-b.Kernel) - int64(r.counted.Sectors-b.Counted.Sectors)
}

// verdict is what came of comparing counters.
type verdict int

const (
	balanced  verdict = iota
	recovered         // balanced with the operations whose end was not told
	unbalanced
	restless
)

// prove compares both counters until they agree, twice; until they stand still and do not; or until the time is up. While
// they stand still and nothing is being written, operations that have begun and are left have ended, and nobody was told. If they make the
// difference, to the sector, it is where they wrote.
func (b base) prove(read func() (reading, error), left func() (uint64, error), bios bool, limit, still time.Duration) (verdict, int64, error) {
	if !b.Exact {
		return restless, 0, nil
	}
	began := time.Now()
	var last reading
	var since time.Time // that last was read again and again
	agreed := false
	for {
		r, err := read()
		if err != nil {
			return restless, 0, err
		}
		now := time.Now()
		missing := b.missing(r)
		// A bio-based driver may count when an operation begins: one in flight is no difference yet.
		settled := !bios || r.kernel.writing == 0
		switch {
		case missing == 0 && settled:
			if agreed {
				return balanced, 0, nil
			}
			agreed = true
			continue
		case r != last || since.IsZero():
			last, since = r, now
		case settled && now.Sub(since) >= still && missing < 0:
			return unbalanced, missing, nil
		case settled && now.Sub(since) >= still && r.kernel.writing == 0:
			n, err := left()
			if err != nil {
				return restless, missing, err
			}
			// If anything moved meanwhile, what is left may go on.
			if after, err := read(); err != nil {
				return restless, missing, err
			} else if after != r {
				break
			}
			if int64(n) == missing {
				return recovered, missing, nil
			}
			return unbalanced, missing, nil
		}
		agreed = false
		if now.Sub(began) > limit {
			return restless, missing, nil
		}
	}
}

// exceeded says which of the counters that must not move has moved since the base; nil if none.
func (b base) exceeded(t tally, name string) *Unknown {
	switch {
	case t.Passthrough != b.Counted.Passthrough:
		return &Unknown{name, Passthrough, fmt.Sprintf("%d commands went to it whose meaning is not known (SG_IO, nvme passthrough)", t.Passthrough-b.Counted.Passthrough)}
	case t.Overflow != b.Counted.Overflow:
		return &Unknown{name, Overflowed, fmt.Sprintf("there was no place for the marks of %d operations", t.Overflow-b.Counted.Overflow)}
	}
	return nil
}
