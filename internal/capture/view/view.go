// Package view is how one disk looks at one instant, put together from several places: what a snapshot of a volume holds
// is read from the snapshot, whenever there is time, and the rest from the disk itself while nobody writes to it.
//
//	Range   a byte range of a disk
//	Part    a range whose content is found elsewhere, or does not matter
//	View    all of the disk: its parts, and the disk for what no part holds
//
// Providers differ in where parts come from (snapshots of LVM, shadow copies of Windows) and agree in the rest.
//
// Knows: ranges, readers.
// Must not know: volumes, what makes a snapshot, who reads.
package view

import (
	"cmp"
	"fmt"
	"io"
	"slices"
	"sort"
	"unsafe"
)

// MaxParts bounds how many parts a view is put together from.
const MaxParts = 1 << 16

// Range is a byte range of a disk.
type Range struct{ Offset, Length int64 }

// End is the first byte behind a range.
func (r Range) End() int64 { return r.Offset + r.Length }

// Part is a range of a disk that need not be read while the disk stands still.
type Part struct {
	Range
	From io.ReaderAt // where its content at the instant stays to be read; nil: the disk itself, because what is there does not matter
	At   int64       // where in From it begins
}

// View is a disk at one instant. It may be read by many goroutines.
type View struct {
	size  int64
	disk  io.ReaderAt
	parts []Part // in order
}

// New puts a view together. Parts may come in any order; they must lie within the disk and not overlap.
func New(disk io.ReaderAt, size int64, parts []Part) (*View, error) {
	if len(parts) > MaxParts {
		return nil, fmt.Errorf("put a disk together: %d parts: the most is %d", len(parts), MaxParts)
	}
	v := &View{size: size, disk: disk, parts: slices.Clone(parts)}
	slices.SortFunc(v.parts, func(a, b Part) int { return cmp.Compare(a.Offset, b.Offset) })
	end := int64(0)
	for _, p := range v.parts {
		if p.Length <= 0 || p.At < 0 || p.Offset < 0 || p.Length > size || p.Offset > size-p.Length {
			return nil, fmt.Errorf("put a disk of %d bytes together: a part of %d bytes at %d is not within it", size, p.Length, p.Offset)
		}
		if p.Offset < end {
			return nil, fmt.Errorf("put a disk together: two parts hold byte %d", p.Offset)
		}
		end = p.End()
	}
	return v, nil
}

// Rest is what no part holds, in order: it is to be read while the disk stands still.
func (v *View) Rest() []Range {
	parts := make([]Range, 0, len(v.parts))
	for _, p := range v.parts {
		parts = append(parts, p.Range)
	}
	return Without([]Range{{Length: v.size}}, parts)
}

// ReadAt implements io.ReaderAt.
func (v *View) ReadAt(p []byte, off int64) (int, error) {
	if off < 0 || off > v.size {
		return 0, fmt.Errorf("read a disk of %d bytes at byte %d: it has none there", v.size, off)
	}
	n := 0
	next := sort.Search(len(v.parts), func(i int) bool { return v.parts[i].End() > off })
	for n < len(p) && off < v.size {
		from, at, length := v.disk, off, v.size-off
		if next < len(v.parts) {
			if part := v.parts[next]; part.Offset > off {
				length = part.Offset - off
			} else {
				length = part.End() - off
				if part.From != nil {
					from, at = part.From, part.At+off-part.Offset
				}
				next++
			}
		}
		piece := p[n : n+int(min(int64(len(p)-n), length))]
		m, err := from.ReadAt(piece, at)
		n, off = n+m, off+int64(m)
		if m < len(piece) {
			if err == nil || err == io.EOF {
				err = io.ErrUnexpectedEOF
			}
			return n, err
		}
	}
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

// Zeros reads as zeros, for parts that hold nothing.
type Zeros struct{}

// ReadAt implements io.ReaderAt.
func (Zeros) ReadAt(p []byte, _ int64) (int, error) {
	clear(p)
	return len(p), nil
}

// Alignment is what a disk that is read around a cache wants of offsets, lengths and memory, in bytes: no disk wants more.
const Alignment = 4096

// Buffer gives memory that any disk can be read into.
func Buffer(size int) []byte {
	b := make([]byte, size+Alignment)
	shift := Alignment - int(uintptr(unsafe.Pointer(&b[0]))%Alignment)
	return b[shift : shift+size : shift+size]
}

// Without gives what of some ranges is not in others, in order and joined. Ranges of no length are left out.
func Without(ranges, others []Range) []Range {
	ranges, others = Join(ranges), Join(others)
	var out []Range
	for _, r := range ranges {
		first := sort.Search(len(others), func(i int) bool { return others[i].End() > r.Offset })
		for _, o := range others[first:] {
			if o.Offset >= r.End() {
				break
			}
			if o.Offset > r.Offset {
				out = append(out, Range{r.Offset, o.Offset - r.Offset})
			}
			end := r.End()
			r.Offset = min(end, o.End())
			r.Length = end - r.Offset
		}
		if r.Length > 0 {
			out = append(out, r)
		}
	}
	return out
}

// Join puts ranges in order and makes one of those that touch or overlap.
func Join(ranges []Range) []Range {
	ranges = slices.Clone(ranges)
	slices.SortFunc(ranges, func(a, b Range) int { return cmp.Compare(a.Offset, b.Offset) })
	var out []Range
	for _, r := range ranges {
		if r.Length <= 0 {
			continue
		}
		if last := len(out) - 1; last >= 0 && out[last].End() >= r.Offset {
			out[last].Length = max(out[last].End(), r.End()) - out[last].Offset
			continue
		}
		out = append(out, r)
	}
	return out
}
