package agent

import (
	"cmp"
	"slices"

	"github.com/musterdr/muster/internal/capture/view"
)

// only has the passes read some ranges of the disk, and the blocks that they touch, until told otherwise.
func (d *disk) only(ranges []view.Range) {
	stage := only(ranges, slices.Clone(d.swap), int64(d.block), d.Size)
	d.stage = &stage
}

// others has the passes read the blocks that were not read before.
func (d *disk) others() {
	d.only(view.Without([]view.Range{{Length: d.Size}}, d.stage.ranges))
}

// ReadAt reads the disk as it is at the instant that is captured, as far as that is known.
func (d *disk) ReadAt(p []byte, off int64) (int, error) {
	if d.view != nil {
		return d.view.ReadAt(p, off)
	}
	return d.device.ReadAt(p, off)
}

// pieces are the byte ranges that a pass reads of a disk: whole blocks, in chunks.
type pieces struct {
	size   int64        // of the disk, of which everything is read in the order of its chunks; or 0:
	ranges []view.Range // what is read, in chunks
	total  int64
}

func everything(size int64) pieces { return pieces{size: size, total: size} }

// at gives a piece.
func (p *pieces) at(n int64) (off, length int64, ok bool) {
	if p.size > 0 {
		off = n * chunk
		return off, min(chunk, p.size-off), off < p.size
	}
	if n >= int64(len(p.ranges)) {
		return 0, 0, false
	}
	return p.ranges[n].Offset, p.ranges[n].Length, true
}

// only makes pieces of the blocks that extents touch, each once, without the blocks that lie in one of the holes.
func only(extents []view.Range, holes []view.Range, block, size int64) pieces {
	slices.SortFunc(extents, func(a, b view.Range) int { return cmp.Compare(a.Offset, b.Offset) })
	slices.SortFunc(holes, func(a, b view.Range) int { return cmp.Compare(a.Offset, b.Offset) })
	var p pieces
	end := int64(0) // of what is in p, or is left out
	for _, e := range extents {
		from, to := max(end, e.Offset/block*block), min(size, (e.Offset+e.Length+block-1)/block*block)
		for from < to {
			var hole view.Range // the next one that holds a block
			for len(holes) > 0 {
				first, last := (holes[0].Offset+block-1)/block*block, (holes[0].Offset+holes[0].Length)/block*block
				if hole = (view.Range{Offset: first, Length: last - first}); last > max(from, first) {
					break
				}
				holes, hole = holes[1:], view.Range{}
			}
			stop := to
			if hole.Length > 0 && hole.Offset <= from {
				from = min(to, hole.Offset+hole.Length)
				end = from
				continue
			} else if hole.Length > 0 {
				stop = min(to, hole.Offset)
			}
			p.add(from, stop)
			from, end = stop, stop
		}
	}
	return p
}

// add adds a byte range in chunks, the first of them to the last range where it goes on from there.
func (p *pieces) add(from, to int64) {
	for from < to {
		n := min(chunk, to-from)
		if last := len(p.ranges) - 1; last >= 0 && p.ranges[last].Offset+p.ranges[last].Length == from && p.ranges[last].Length+n <= chunk {
			p.ranges[last].Length += n
		} else {
			p.ranges = append(p.ranges, view.Range{Offset: from, Length: n})
		}
		p.total += n
		from += n
	}
}
