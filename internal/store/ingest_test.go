package store

import (
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/musterdr/muster/internal/image"
)

// A plan covers exactly the blocks that the extents touch; a block is zeroed only if all of it is said to be zeros and
// nobody says otherwise.
func TestPlanReadsWhatIsTouchedAndZeroesWhatIsCovered(t *testing.T) {
	const block = 4096
	r := rand.New(rand.NewPCG(1, 1))
	for range 2000 {
		size := r.Int64N(20*block) + 1
		d := &DiskWriter{geo: geometry{size: size, block: block}}
		var extents []image.Extent
		zero := make([]bool, size) // by byte
		data := make([]bool, size)
		for range r.IntN(6) {
			off := r.Int64N(size)
			e := image.Extent{Offset: off, Length: r.Int64N(size - off + 1), Zero: r.IntN(2) == 0}
			extents = append(extents, e)
			for i := e.Offset; i < e.Offset+e.Length; i++ {
				if e.Zero {
					zero[i] = true
				} else {
					data[i] = true
				}
			}
		}
		spans, err := d.plan(extents)
		if err != nil {
			t.Fatal(err)
		}
		next := int64(0)
		did := map[int64]bool{} // block: zeroed
		for _, s := range spans {
			if s.first < next || s.count <= 0 {
				t.Fatalf("%v gives %v, out of order", extents, spans)
			}
			next = s.first + s.count
			for b := s.first; b < next; b++ {
				did[b] = s.zero
			}
		}
		for b := range d.geo.blocks() {
			lo, hi := b*block, b*block+d.geo.blockLen(b)
			isData := slices.Contains(data[lo:hi], true)
			touched := isData || slices.Contains(zero[lo:hi], true)
			zeroed, done := did[b]
			if done != touched || zeroed && (isData || slices.Contains(zero[lo:hi], false)) {
				t.Fatalf("size %d, %v gives %v: wrong for block %d", size, extents, spans, b)
			}
		}
	}
	d := &DiskWriter{geo: geometry{size: 100, block: block}}
	for _, bad := range []image.Extent{{Offset: -1, Length: 1}, {Offset: 0, Length: 101}, {Offset: 1 << 62, Length: 1 << 62}, {Length: -1}} {
		if _, err := d.plan([]image.Extent{bad}); err == nil {
			t.Errorf("%+v was accepted", bad)
		}
	}
}
