package track

import (
	"errors"
	"fmt"

	"github.com/cilium/ebpf"
)

// operation is a write that has begun and of whose end no program was told: it goes on, or its end came in an interrupt in which
// the kernel ran none.
type operation struct {
	Key uint64 // the request's address, or something else once that is another's
	operationRange
}

// operationRange is struct range of the programs.
type operationRange struct {
	Device uint32
	Bytes  uint32
	Sector uint64
	Began  uint64 // when its request was made, CLOCK_MONOTONIC, nanoseconds; 0 of one that has ended, and of a bio
	Kind   uint32
	Slot   uint32
	Shift  uint32
	Coarse uint32
}

// Kinds of operations. A discard of several ranges, which need not touch each other, has a part for each.
const (
	wholeKind     = 0
	scatteredKind = 1 // not a range: its parts are
	partKind      = 2
	nowhereKind   = 3 // scattered, and not all of its parts are known
)

// operationsAtOnce is how many are asked for in one call: more than lie in one bucket of the kernel's table.
const operationsAtOnce = 4096

// underway lists the operations on a disk that began after counting did. Those before are not of interest: all that is known of
// the disk was read after them, or its counts will not be balanced.
func (d *Disk) underway() ([]operation, error) {
	var all []operation
	var cursor ebpf.MapBatchCursor
	keys, values := make([]uint64, operationsAtOnce), make([]operationRange, operationsAtOnce)
	for {
		n, err := d.t.kernel.underway.BatchLookup(&cursor, keys, values, nil)
		if err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			return nil, fmt.Errorf("ask what is being written to %s: %w", d.name, err)
		}
		for i := range n {
			if r := values[i]; r.Device == d.rec.Device.Number && r.Began != 0 && r.Began >= d.rec.Base.Since {
				all = append(all, operation{keys[i], r})
			}
		}
		if err != nil {
			return all, nil
		}
	}
}

// sectors sums operations.
func sectors(all []operation) (n uint64) {
	for _, o := range all {
		if o.Kind != partKind {
			n += uint64(o.Bytes) / 512
		}
	}
	return n
}

// markUnderway marks operations in a disk's map, but those that some Take since the last proof has given already.
func (d *Disk) markUnderway(all []operation, current []uint64) {
	for _, o := range all {
		if (o.Kind == wholeKind || o.Kind == partKind) && !d.given[o] {
			d.layout().mark(current, int64(o.Sector)*512, int64(o.Bytes))
		}
	}
}

// settle closes the books on operations whose end was not told and is known to have come: as many sectors as the kernel counted more
// than the programs. Dying in between is safe: what is counted twice, or not at all, is not balanced.
func (d *Disk) settle(lost []operation) error {
	if len(lost) == 0 {
		return nil
	}
	d.rec.Base.Kernel += sectors(lost)
	if err := d.t.save(); err != nil {
		return err
	}
	if err := d.words(func(current, _ []uint64) { d.markUnderway(lost, current) }); err != nil {
		return err
	}
	for _, o := range lost {
		if err := d.t.kernel.underway.Delete(o.Key); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			return fmt.Errorf("forget what was written to %s: %w", d.name, err)
		}
	}
	return nil
}
