package wire

import (
	"bytes"
	"crypto/rand"
	"encoding/binary"
	"fmt"

	"github.com/zeebo/xxh3"
)

// Sizes and limits of fingerprints, in bytes.
const (
	SumSize   = 16
	SeedSize  = 16
	sumsHead  = 8 + 4 + 4 + 8 + 8 + SeedSize
	MaxSums   = 256<<20 - 64<<10 // of one disk: a little under 2 TiB in blocks of 128 KiB
	algorithm = 1                // XXH3-128, seeded by Seed and the block's number
)

var magic = [8]byte{'M', 'U', 'S', 'T', 'S', 'U', 'M', '1'}

// Sum is the fingerprint of a block's content at its place on the disk. The zero Sum stands for a block of zeros.
type Sum [SumSize]byte

// Seed is the secret of a server without which no two contents with one fingerprint can be prepared.
type Seed [SeedSize]byte

// NewSeed makes a seed.
func NewSeed() Seed {
	var s Seed
	if _, err := rand.Read(s[:]); err != nil {
		panic("wire: the system has no randomness: " + err.Error())
	}
	return s
}

var zeros [MaxBlock]byte

// IsZero says whether data, at most MaxBlock bytes, holds nothing but zeros.
func IsZero(data []byte) bool { return bytes.Equal(data, zeros[:len(data)]) }

// Sum gives the fingerprint of a block's content, at most MaxBlock bytes.
func (s Seed) Sum(block int64, data []byte) Sum {
	if IsZero(data) {
		return Sum{}
	}
	lo, hi := binary.LittleEndian.Uint64(s[:8]), binary.LittleEndian.Uint64(s[8:])
	out := Sum(xxh3.Hash128Seed(data, mix(lo^mix(hi^uint64(block)))).Bytes())
	if out == (Sum{}) {
		out[0] = 1
	}
	return out
}

// mix spreads every bit over all others (the finalizer of SplitMix64).
func mix(x uint64) uint64 {
	x += 0x9e3779b97f4a7c15
	x = (x ^ x>>30) * 0xbf58476d1ce4e5b9
	x = (x ^ x>>27) * 0x94d049bb133111eb
	return x ^ x>>31
}

// Sums holds the fingerprints of all blocks of one disk. Different blocks may be read and set at once.
type Sums struct {
	Seed      Seed
	BlockSize int
	Size      int64 // of the disk
	raw       []byte
}

// NewSums gives the fingerprints of a disk of zeros.
func NewSums(seed Seed, blockSize int, size int64) (*Sums, error) {
	if blockSize < MinBlock || blockSize > MaxBlock || blockSize&(blockSize-1) != 0 {
		return nil, fmt.Errorf("make fingerprints: blocks of %d bytes: use a power of two from %d to %d", blockSize, MinBlock, MaxBlock)
	}
	n := (size + int64(blockSize) - 1) / int64(blockSize)
	if size < 0 || n > MaxSums/SumSize {
		return nil, fmt.Errorf("make fingerprints: a disk of %d bytes is over the limit of %d in blocks of %d", size, int64(MaxSums/SumSize)*int64(blockSize), blockSize)
	}
	return &Sums{Seed: seed, BlockSize: blockSize, Size: size, raw: make([]byte, n*SumSize)}, nil
}

// Len is the number of blocks.
func (s *Sums) Len() int64 { return int64(len(s.raw) / SumSize) }

// Length is the number of bytes in a block: BlockSize but for the last.
func (s *Sums) Length(block int64) int {
	return int(min(int64(s.BlockSize), s.Size-block*int64(s.BlockSize)))
}

// At gives a block's fingerprint.
func (s *Sums) At(block int64) Sum { return Sum(s.raw[block*SumSize:]) }

// Set replaces a block's fingerprint.
func (s *Sums) Set(block int64, sum Sum) { copy(s.raw[block*SumSize:], sum[:]) }

// Fill replaces the fingerprints from a block on, 16 bytes each.
func (s *Sums) Fill(first int64, raw []byte) error {
	if first < 0 || first > s.Len() || int64(len(raw)/SumSize) > s.Len()-first || len(raw)%SumSize != 0 {
		return fmt.Errorf("read fingerprints: %d from block %d do not fit a disk of %d blocks: %w", len(raw)/SumSize, first, s.Len(), ErrGarbage)
	}
	copy(s.raw[first*SumSize:], raw)
	return nil
}

// Digest is the fingerprint of all fingerprints: equal on both sides, both mean the same disk.
func (s *Sums) Digest() []byte {
	b := xxh3.Hash128Seed(s.raw, mix(binary.LittleEndian.Uint64(s.Seed[:8]))).Bytes()
	return b[:]
}

// BlockSizeFor gives the block size for a disk: the usual one, or for a very large disk the smallest that keeps its
// fingerprints within MaxSums.
func BlockSizeFor(size int64, usual int) int {
	for usual < MaxBlock && size/int64(usual) >= MaxSums/SumSize {
		usual *= 2
	}
	return usual
}

// MarshalBinary gives the form in which fingerprints are kept with a snapshot; see docs/formats/capture.md.
func (s *Sums) MarshalBinary() ([]byte, error) {
	b := make([]byte, 0, sumsHead+len(s.raw))
	b = append(b, magic[:]...)
	b = binary.LittleEndian.AppendUint32(b, algorithm)
	b = binary.LittleEndian.AppendUint32(b, uint32(s.BlockSize))
	b = binary.LittleEndian.AppendUint64(b, uint64(s.Size))
	b = binary.LittleEndian.AppendUint64(b, uint64(s.Len()))
	b = append(b, s.Seed[:]...)
	return append(b, s.raw...), nil
}

// UnmarshalSums reads what MarshalBinary made.
func UnmarshalSums(b []byte) (*Sums, error) {
	if len(b) < sumsHead || !bytes.Equal(b[:8], magic[:]) || binary.LittleEndian.Uint32(b[8:]) != algorithm {
		return nil, fmt.Errorf("read kept fingerprints: not in a form this release knows")
	}
	s, err := NewSums(Seed(b[32:]), int(binary.LittleEndian.Uint32(b[12:])), 0)
	if err != nil {
		return nil, err
	}
	size, count := binary.LittleEndian.Uint64(b[16:]), binary.LittleEndian.Uint64(b[24:])
	if size > 1<<62 || count != (size+uint64(s.BlockSize)-1)/uint64(s.BlockSize) || count > MaxSums/SumSize || uint64(len(b)-sumsHead) != count*SumSize {
		return nil, fmt.Errorf("read kept fingerprints: %d for a disk of %d bytes in %d bytes do not fit", count, size, len(b))
	}
	s.Size, s.raw = int64(size), bytes.Clone(b[sumsHead:])
	return s, nil
}
