package agent

import (
	"sort"

	"github.com/musterdr/muster/internal/capture/view"
)

// only has the passes read some ranges of the disk, and the blocks that they touch, until told otherwise.
func (d *disk) only(ranges []view.Range) {
	stage := only(ranges, d.swap, int64(d.block), d.Size)
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
	ranges []view.Range // in order; none touches the next
	until  []int64      // how many chunks there are up to the end of each range
	total  int64        // bytes
}

// at gives a chunk.
func (p *pieces) at(n int64) (off, length int64, ok bool) {
	i := sort.Search(len(p.until), func(i int) bool { return p.until[i] > n })
	if i == len(p.until) {
		return 0, 0, false
	}
	r := p.ranges[i]
	if i > 0 {
		n -= p.until[i-1]
	}
	off = r.Offset + n*chunk
	return off, min(chunk, r.End()-off), true
}

// all makes pieces of a disk without the blocks that lie in one of the holes.
func all(holes []view.Range, block, size int64) pieces {
	return only([]view.Range{{Length: size}}, holes, block, size)
}

// only makes pieces of the blocks that extents touch, each once, without the blocks that lie in one of the holes.
func only(extents []view.Range, holes []view.Range, block, size int64) pieces {
	touched, left := make([]view.Range, 0, len(extents)), make([]view.Range, 0, len(holes))
	for _, e := range extents {
		from := e.Offset / block * block
		touched = append(touched, view.Range{Offset: from, Length: min(size, (e.End()+block-1)/block*block) - from})
	}
	for _, h := range holes {
		from := (h.Offset + block - 1) / block * block
		left = append(left, view.Range{Offset: from, Length: h.End()/block*block - from})
	}
	p := pieces{ranges: view.Without(touched, left)}
	chunks := int64(0)
	for _, r := range p.ranges {
		chunks += (r.Length + chunk - 1) / chunk
		p.until, p.total = append(p.until, chunks), p.total+r.Length
	}
	return p
}
