package agent

import (
	"math/rand/v2"
	"testing"

	"github.com/musterdr/muster/internal/capture/linux"
	"github.com/musterdr/muster/internal/capture/linux/track"
)

// What is read is every block that was written to, once and in order, but those of which nothing but a hole is left.
func TestWhatIsReadIsEveryBlockThatIsNotAHole(t *testing.T) {
	const block = 4096
	r := rand.New(rand.NewPCG(3, 4))
	for range 3000 {
		size := 1 + r.Int64N(2000*block)
		part := func() (off, length int64) {
			off = r.Int64N(size)
			return off, 1 + r.Int64N(min(size-off, 1<<uint(3+r.IntN(21))))
		}
		var extents []track.Extent
		var holes []linux.Range
		wanted := map[int64]bool{}
		for range r.IntN(6) {
			off, n := part()
			extents = append(extents, track.Extent{Offset: off, Length: n})
			for b := off / block; b*block < off+n; b++ {
				wanted[b] = true
			}
		}
		end := int64(0)
		for range r.IntN(6) {
			off, n := part()
			if off < end {
				continue // holes do not overlap
			}
			end = off + n
			holes = append(holes, linux.Range{Offset: off, Length: n})
			for b := (off + block - 1) / block; (b+1)*block <= off+n; b++ {
				delete(wanted, b)
			}
		}
		r.Shuffle(len(holes), func(i, j int) { holes[i], holes[j] = holes[j], holes[i] })
		p := only(extents, holes, block, size)
		var total, last int64
		for n := int64(0); ; n++ {
			off, length, ok := p.at(n)
			if !ok {
				break
			}
			if off < last || length <= 0 || length > chunk || off%block != 0 || off+length > size {
				t.Fatalf("piece %d is %d bytes at %d after %d, of %d", n, length, off, last, size)
			}
			last = off + length
			total += length
			for b := off / block; b*block < last; b++ {
				if !wanted[b] {
					t.Fatalf("block %d is read; extents %v, holes %v", b, extents, holes)
				}
				delete(wanted, b)
			}
		}
		if len(wanted) > 0 || total != p.total {
			t.Fatalf("%d blocks are not read, %d bytes of %d; extents %v, holes %v", len(wanted), total, p.total, extents, holes)
		}
	}
}
