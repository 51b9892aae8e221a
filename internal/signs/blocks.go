package signs

import (
	"encoding/binary"
	"fmt"
	"math/bits"
	"slices"
	"sync/atomic"
	"time"

	"github.com/musterdr/muster/internal/dr"
)

// A block is looked at in cells, because what encrypts only here and there leaves the rest of a block as it was.
const (
	cells   = 32       // of a block
	minCell = 4 << 10  // bytes; a small block has fewer cells
	line    = 64       // bytes of a cell that are looked at in one piece
	maxMap  = 16 << 20 // blocks of one disk: as many as have fingerprints
)

// What a cell holds, in two bits.
const (
	empty    = 0 // one byte over and over
	readable = 1 // bytes of some values more than of others
	packed   = 2 // bytes of all values, but not as evenly as by chance: gzip, zstd, JPEG
	random   = 3 // as evenly as by chance: encrypted, or xz, or video
	low      = 0x5555555555555555
)

// Limits of the two questions.
const (
	// Of 64 bytes by chance 57 are different, ±2.5; of 128, 101 ± 3.7. Text has 30 and 40, programs up to 45 and 75.
	firstDistinct = 44
	bothDistinct  = 84
	// Chi-square of bytes by chance is 255 ± 22.6, however many there are.
	maxChi = 360
	spread = 8 // of dense cells one byte in so many is counted, unless the answer matters
)

// Map says what each cell of a disk holds, 8 bytes a block. Different blocks may be looked at at once.
type Map struct {
	block int   // bytes
	size  int64 // of the disk
	words []uint64
	took  atomic.Int64
}

// NewMap gives the map of an empty disk.
func NewMap(block int, size int64) (*Map, error) {
	if block < minCell || block&(block-1) != 0 || size < 0 || (size-1)/int64(block) >= maxMap {
		return nil, fmt.Errorf("look for signs on a disk of %d bytes in blocks of %d: it has too many blocks", size, block)
	}
	return &Map{block: block, size: size, words: make([]uint64, (size+int64(block)-1)/int64(block))}, nil
}

// BlockSize is that of the disk, in bytes.
func (m *Map) BlockSize() int { return m.block }

// Fits says whether the map is one of a disk of that shape.
func (m *Map) Fits(block int, size int64) bool { return m.block == block && m.size == size }

// Blocks is how many blocks the disk has.
func (m *Map) Blocks() int64 { return int64(len(m.words)) }

// Resize makes the map one of a disk of so many blocks: the map of files grows while they are read. What is new is empty.
func (m *Map) Resize(blocks int64) error {
	if blocks < 0 || blocks > maxMap {
		return fmt.Errorf("look for signs in %d blocks: the most is %d", blocks, int64(maxMap))
	}
	if had := m.Blocks(); blocks <= had {
		m.words = m.words[:blocks]
	} else {
		m.words = slices.Grow(m.words, int(blocks-had))[:blocks]
		clear(m.words[had:])
	}
	m.size = blocks * int64(m.block)
	return nil
}

// Copy takes what another map of blocks of that size says of count blocks from a first one. Those that it does not have are empty.
func (m *Map) Copy(at int64, from *Map, first, count int64) {
	for i := range count {
		m.words[at+i], _ = from.at(first + i)
	}
}

// Clone gives a copy to go on with.
func (m *Map) Clone() *Map { return &Map{block: m.block, size: m.size, words: slices.Clone(m.words)} }

// Took is the time spent in Look, of all that looked.
func (m *Map) Took() time.Duration { return time.Duration(m.took.Load()) }

func (m *Map) cell() int { return max(minCell, m.block/cells) }

// Zero notes that blocks hold nothing.
func (m *Map) Zero(first, count int64) { clear(m.words[first : first+count]) }

// Look notes what a block holds. befores are earlier maps of the disk, or nil: where they had something readable that now
// looks random, it is looked at more closely.
func (m *Map) Look(number int64, data []byte, befores ...*Map) {
	m.look(number, data, func() (had uint64) {
		for _, b := range befores {
			if w, ok := b.at(number); ok {
				had |= (w ^ w>>1) & low
			}
		}
		return had
	})
}

// LookClosely is Look where there may have been something readable wherever the block is dense, and it is not known yet.
func (m *Map) LookClosely(number int64, data []byte) {
	m.look(number, data, func() uint64 { return low })
}

// look has had give the cells that were readable or packed, if it matters.
func (m *Map) look(number int64, data []byte, had func() uint64) {
	began := time.Now()
	var word, dense uint64
	size := m.cell()
	for i := 0; i*size < len(data); i++ {
		switch kind := kindOf(data[i*size:min((i+1)*size, len(data))], number, i); kind {
		case packed:
			dense |= 1 << (2 * i)
		default:
			word |= kind << (2 * i)
		}
	}
	if dense != 0 {
		word |= m.weigh(data, dense, had)
	}
	m.words[number] = word
	m.took.Add(int64(time.Since(began)))
}

// weigh tells packed cells from random ones: all dense cells of a block together, because the difference is small.
func (m *Map) weigh(data []byte, dense uint64, before func() uint64) uint64 {
	if m.chi(data, dense, spread) > maxChi {
		return dense * packed
	}
	if had := before() & dense; had != 0 && m.chi(data, had, 1) > maxChi {
		return (dense&^had)*random | had*packed
	}
	return dense * random
}

func (m *Map) at(number int64) (uint64, bool) {
	if m == nil || number >= int64(len(m.words)) {
		return 0, false
	}
	return m.words[number], true
}

// kindOf looks at two lines of a cell, elsewhere in every cell. It gives packed for both packed and random.
func kindOf(cell []byte, number int64, i int) uint64 {
	lines := len(cell) / line
	if lines < 2 {
		return readable
	}
	at := (int(number)*5 + i*7) % lines
	a := cell[at*line : at*line+line]
	at = (at + lines/2) % lines
	b := cell[at*line : at*line+line]
	var s [4][4]uint64
	for j := 0; j < line; j += 2 {
		x, y := a[j], a[j+1]
		s[0][x>>6] |= 1 << (x & 63)
		s[1][y>>6] |= 1 << (y & 63)
	}
	if distinct(s[0], s[1]) >= firstDistinct {
		for j := 0; j < line; j += 2 {
			x, y := b[j], b[j+1]
			s[2][x>>6] |= 1 << (x & 63)
			s[3][y>>6] |= 1 << (y & 63)
		}
		if distinct(s[0], s[1], s[2], s[3]) >= bothDistinct {
			return packed
		}
		return readable
	}
	if same(a, a[0]) && same(b, a[0]) {
		return empty
	}
	return readable
}

func distinct(sets ...[4]uint64) (n int) {
	for i := range 4 {
		var or uint64
		for _, s := range sets {
			or |= s[i]
		}
		n += bits.OnesCount64(or)
	}
	return n
}

func same(data []byte, value byte) bool {
	for _, b := range data {
		if b != value {
			return false
		}
	}
	return true
}

// chi is Pearson's chi-square of the bytes of some cells against all values being as frequent: of every spread-th line.
func (m *Map) chi(data []byte, which uint64, spread int) float64 {
	var h [4][256]uint32
	n := 0
	size := m.cell()
	for ; which != 0; which &= which - 1 {
		at := bits.TrailingZeros64(which) / 2 * size
		cell := data[at:min(at+size, len(data))]
		for off := 0; off+line <= len(cell); off += line * spread {
			n += line
			for run := cell[off : off+line]; len(run) >= 8; run = run[8:] {
				v := binary.LittleEndian.Uint64(run)
				h[0][byte(v)]++
				h[1][byte(v>>8)]++
				h[2][byte(v>>16)]++
				h[3][byte(v>>24)]++
				h[0][byte(v>>32)]++
				h[1][byte(v>>40)]++
				h[2][byte(v>>48)]++
				h[3][byte(v>>56)]++
			}
		}
	}
	if n == 0 {
		return 0
	}
	mean, sum := float64(n)/256, 0.0
	for i := range 256 {
		d := float64(h[0][i]+h[1][i]+h[2][i]+h[3][i]) - mean
		sum += d * d
	}
	return sum / mean
}

// Content adds up what a map says.
func (m *Map) Content(sum *dr.Content) {
	size := int64(m.cell())
	for _, w := range m.words {
		isRandom := w & (w >> 1) & low
		sum.Random += int64(bits.OnesCount64(isRandom)) * size
		sum.Readable += int64(bits.OnesCount64((w|w>>1)&low&^isRandom)) * size
	}
}

// Compare adds what differs from an earlier map of the same disk. Changed counts only the blocks that show it.
func (m *Map) Compare(before *Map, sum *dr.BlockChange) {
	size := int64(m.cell())
	for i, w := range m.words {
		was, ok := before.at(int64(i))
		if !ok {
			break
		}
		wasRandom, isRandom := was&(was>>1)&low, w&(w>>1)&low
		had := (was ^ was>>1) & low
		sum.Readable += int64(bits.OnesCount64(had)) * size
		if w == was {
			continue
		}
		sum.Changed++
		if became := had & isRandom; became != 0 {
			sum.Struck++
			sum.Became += int64(bits.OnesCount64(became)) * size
		}
		sum.New += int64(bits.OnesCount64(isRandom&^had&^wasRandom)) * size
	}
}

var magic = [8]byte{'M', 'U', 'S', 'T', 'S', 'G', 'N', '1'}

const head = 8 + 8 + 8

// MarshalBinary gives the form in which a map is kept with a snapshot; see docs/formats/capture.md.
func (m *Map) MarshalBinary() ([]byte, error) {
	b := make([]byte, 0, head+8*len(m.words))
	b = append(b, magic[:]...)
	b = binary.LittleEndian.AppendUint64(b, uint64(m.block))
	b = binary.LittleEndian.AppendUint64(b, uint64(m.size))
	for _, w := range m.words {
		b = binary.LittleEndian.AppendUint64(b, w)
	}
	return b, nil
}

// UnmarshalMap reads what MarshalBinary made.
func UnmarshalMap(b []byte) (*Map, error) {
	if len(b) < head || [8]byte(b) != magic {
		return nil, fmt.Errorf("read the kept signs of a disk: not in a form this release knows")
	}
	block, size := binary.LittleEndian.Uint64(b[8:]), binary.LittleEndian.Uint64(b[16:])
	if block > 1<<30 || size > 1<<62 {
		return nil, fmt.Errorf("read the kept signs of a disk of %d bytes in blocks of %d: there is no such disk", size, block)
	}
	m, err := NewMap(int(block), int64(size))
	if err != nil {
		return nil, err
	}
	if len(b)-head != 8*len(m.words) {
		return nil, fmt.Errorf("read the kept signs of a disk: %d bytes for %d blocks", len(b)-head, len(m.words))
	}
	for i := range m.words {
		m.words[i] = binary.LittleEndian.Uint64(b[head+8*i:])
	}
	return m, nil
}
