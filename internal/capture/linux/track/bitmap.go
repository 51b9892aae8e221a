package track

import (
	"math/bits"
	"sync/atomic"
)

// Extent is a byte range of a disk in which something was written.
type Extent struct {
	Offset int64
	Length int64
}

// Numbers that the programs in bpf/track.bpf.c share.
const (
	maxDisks = 256
	region   = 1024 // granules in a region of the coarse map
)

const (
	minGranule  = 16 << 10 // bytes
	maxGranules = 1 << 29  // on one disk
	maxExtents  = 1 << 20  // of one Take
	maxSize     = 1 << 60  // bytes of a disk
)

// layout is how the map of a disk is divided: words of the coarse map, which come first, then words of the fine one.
// A word stands for 64 granules or regions, one bit each; in byte mode for 8, one byte each.
type layout struct {
	size    int64 // bytes of the disk
	granule int64 // bytes
	bytes   bool
}

func newLayout(size int64, bytes bool) layout {
	l := layout{size: size, granule: minGranule, bytes: bytes}
	for l.granules() > maxGranules {
		l.granule *= 2
	}
	return l
}

// per gives how many granules a word stands for.
func (l layout) per() int64 {
	if l.bytes {
		return 8
	}
	return 64
}

func (l layout) granules() int64 { return (l.size + l.granule - 1) / l.granule }
func (l layout) regions() int64  { return (l.granules() + region - 1) / region }
func (l layout) coarse() int64   { return (l.regions() + l.per() - 1) / l.per() }
func (l layout) words() int64    { return l.coarse() + (l.granules()+l.per()-1)/l.per() }

// shift turns a number of sectors into one of granules.
func (l layout) shift() uint32 { return uint32(bits.TrailingZeros64(uint64(l.granule))) - 9 }

// full is a word in which everything is marked.
func (l layout) full() uint64 {
	if l.bytes {
		return 0x0101010101010101
	}
	return ^uint64(0)
}

// each calls yield for every mark in a word.
func (l layout) each(word uint64, yield func(n int64)) {
	for ; word != 0; word &= word - 1 {
		n := int64(bits.TrailingZeros64(word))
		if l.bytes {
			n /= 8
		}
		yield(n)
	}
}

// move moves every mark from current to taken, where it is a fine one in any case, and gives what it moved. The programs
// may mark meanwhile. A mark is in taken before it is gone from current, so that being killed here loses none.
func (l layout) move(current, taken []uint64) []Extent {
	coarse := l.coarse()
	whole := make([]bool, l.regions()) // regions that were marked as such
	for i := range coarse {
		marks := atomic.LoadUint64(&current[i])
		l.each(marks, func(n int64) {
			if r := i*l.per() + n; r < l.regions() {
				whole[r] = true
				for w := range l.wordsOf(r) {
					taken[w] = l.full()
				}
			}
		})
		if marks != 0 {
			atomic.AndUint64(&current[i], ^marks)
		}
	}
	out := extents{layout: l, limit: maxExtents}
	for i := range l.words() - coarse {
		marks := atomic.LoadUint64(&current[coarse+i])
		if marks != 0 {
			taken[coarse+i] |= marks
			atomic.AndUint64(&current[coarse+i], ^marks)
		}
		if whole[i*l.per()/region] {
			marks = l.full()
		}
		out.word(i, marks)
	}
	return out.all
}

// mark marks what lies on the disk of a byte range.
func (l layout) mark(current []uint64, off, n int64) {
	for g := off / l.granule; g < min(l.granules(), (off+n+l.granule-1)/l.granule); g++ {
		bit := uint(g % l.per())
		if l.bytes {
			bit *= 8
		}
		atomic.OrUint64(&current[l.coarse()+g/l.per()], 1<<bit)
	}
}

// wordsOf goes through the fine words of a region, as they are numbered in the map.
func (l layout) wordsOf(r int64) func(yield func(w int64) bool) {
	return func(yield func(w int64) bool) {
		first := l.coarse() + r*region/l.per()
		for w := first; w < min(first+region/l.per(), l.words()); w++ {
			if !yield(w) {
				return
			}
		}
	}
}

// putBack puts every mark that was taken back into current. Being killed here loses none.
func (l layout) putBack(current, taken []uint64) {
	for i, marks := range taken {
		if marks != 0 {
			atomic.OrUint64(&current[i], marks)
			taken[i] = 0
		}
	}
}

// wipe removes all marks. It looks first: pages that were never written need not come into being.
func wipe(words []uint64) {
	for i := range words {
		if atomic.LoadUint64(&words[i]) != 0 {
			atomic.StoreUint64(&words[i], 0)
		}
	}
}

// extents puts marks together to byte ranges, in order.
type extents struct {
	layout
	all   []Extent
	limit int   // of extents
	gap   int64 // bytes that are joined over, 0 unless there are too many extents
}

// word adds the marks of fine word i.
func (e *extents) word(i int64, marks uint64) {
	if marks == 0 {
		return
	}
	if marks == e.full() {
		e.add(i*e.per(), e.per())
		return
	}
	e.each(marks, func(n int64) { e.add(i*e.per()+n, 1) })
}

func (e *extents) add(first, count int64) {
	off := first * e.granule
	length := min(count*e.granule, e.size-off)
	if length <= 0 {
		return // the last word stands for more than the disk has
	}
	if n := len(e.all); n > 0 {
		if last := &e.all[n-1]; off-(last.Offset+last.Length) <= e.gap {
			last.Length = off + length - last.Offset
			return
		}
	}
	if len(e.all) >= e.limit {
		e.join()
		e.add(first, count)
		return
	}
	e.all = append(e.all, Extent{off, length})
}

// join makes fewer extents of those that lie closest to each other.
func (e *extents) join() {
	e.gap = max(e.granule, 2*e.gap)
	joined := e.all[:1]
	for _, x := range e.all[1:] {
		if last := &joined[len(joined)-1]; x.Offset-(last.Offset+last.Length) <= e.gap {
			last.Length = x.Offset + x.Length - last.Offset
			continue
		}
		joined = append(joined, x)
	}
	e.all = joined
}
