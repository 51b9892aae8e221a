package agent

import (
	"cmp"
	"slices"

	"github.com/musterdr/muster/internal/capture/view"
)

// only has the passes read some ranges of the disk, and the blocks that they touch, until told otherwise.
func (d *disk) only(ranges []view.Range) {
	stage := only(ranges, int64(d.block), d.Size)
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

// only makes pieces of the blocks that extents touch, each once.
func only(extents []view.Range, block, size int64) pieces {
	slices.SortFunc(extents, func(a, b view.Range) int { return cmp.Compare(a.Offset, b.Offset) })
	var p pieces
	end := int64(0) // of what is in p
	for _, e := range extents {
		from, to := max(end, e.Offset/block*block), min(size, (e.Offset+e.Length+block-1)/block*block)
		for from < to {
			n := min(chunk, to-from)
			if last := len(p.ranges) - 1; last >= 0 && from == end && p.ranges[last].Length+n <= chunk {
				p.ranges[last].Length += n
			} else {
				p.ranges = append(p.ranges, view.Range{Offset: from, Length: n})
			}
			p.total += n
			from += n
			end = from
		}
	}
	return p
}
