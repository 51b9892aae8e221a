package store

import (
	"encoding/binary"
	"sync/atomic"
)

// filter remembers which blocks were seen, in 16 bits a block (16 MB a terabyte): a Bloom filter of four probes that
// takes about one new block in 400 for a known one when it is full. It only counts; nothing is decided by it.
type filter struct {
	bits []atomic.Uint64
	mask uint64
}

func newFilter(blocks int64) *filter {
	n := uint64(1 << 16)
	for n < uint64(blocks)*16 {
		n *= 2
	}
	return &filter{bits: make([]atomic.Uint64, n/64), mask: n - 1}
}

// add says whether a hash, of 32 bytes, was not there before.
func (f *filter) add(hash []byte) (added bool) {
	for i := 0; i+8 <= len(hash) && i < 32; i += 8 {
		bit := binary.LittleEndian.Uint64(hash[i:]) & f.mask
		if old := f.bits[bit/64].Or(1 << (bit % 64)); old&(1<<(bit%64)) == 0 {
			added = true
		}
	}
	return added
}
