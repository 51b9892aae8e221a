package image

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"sort"
	"sync"
	"sync/atomic"
	"testing"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// memory is an image with holes in memory. Reads of [badFrom, badTo) fail.
type memory struct {
	data           []byte
	extents        []Extent
	badFrom, badTo int64
	gate           chan struct{} // if set, each read takes one from it first
	reading        atomic.Int32  // reads that wait at the gate or read
	mu             sync.Mutex
	prefetched     []Extent
}

var errBad = errors.New("block 7 does not match its checksum")

// randomMemory makes an image of size bytes whose extents are of any length and alignment.
func randomMemory(seed uint64, size int64) *memory {
	noise := rand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8)})
	r := rand.New(noise)
	m := &memory{data: make([]byte, size)}
	for off := int64(0); off < size; {
		n := min(size-off, 1+r.Int64N(1<<(4+r.IntN(16))))
		zero := r.IntN(2) == 0
		if !zero {
			_, _ = noise.Read(m.data[off : off+n])
		}
		m.extents = append(m.extents, Extent{off, n, zero})
		off += n
	}
	return m
}

func (m *memory) Size() int64 { return int64(len(m.data)) }

func (m *memory) ReadAt(p []byte, off int64) (int, error) {
	m.reading.Add(1)
	defer m.reading.Add(-1)
	if m.gate != nil {
		<-m.gate
	}
	if off < m.badTo && off+int64(len(p)) > m.badFrom {
		return 0, errBad
	}
	if off >= int64(len(m.data)) {
		return 0, io.EOF
	}
	n := copy(p, m.data[off:])
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

func (m *memory) Extents(ctx context.Context, off, length int64, yield func(Extent) bool) error {
	if off < 0 || length < 0 || off+length > m.Size() {
		return fmt.Errorf("[%d, %d) is outside", off, off+length)
	}
	first := sort.Search(len(m.extents), func(i int) bool { return m.extents[i].Offset+m.extents[i].Length > off })
	for _, e := range m.extents[first:] {
		from, to := max(e.Offset, off), min(e.Offset+e.Length, off+length)
		if from >= to {
			break
		}
		if !yield(Extent{from, to - from, e.Zero}) {
			return ctx.Err()
		}
	}
	return ctx.Err()
}

// cached is a memory that can be told what will be read.
type cached struct{ *memory }

func (c cached) Prefetch(off, length int64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.prefetched = append(c.prefetched, Extent{Offset: off, Length: length})
}

// isHole says whether all of [from, to) is in holes.
func (m *memory) isHole(from, to int64) bool {
	for _, e := range m.extents {
		if !e.Zero && e.Offset < to && from < e.Offset+e.Length {
			return false
		}
	}
	return true
}
