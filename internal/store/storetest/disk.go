package storetest

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"sync/atomic"

	"github.com/musterdr/muster/internal/image"
)

// Disk is a disk in memory that counts what is read from it.
type Disk struct {
	Data []byte
	Read atomic.Int64
}

// NewDisk makes a disk whose bytes look like those of a real one: about a third zeros, a third text, a third noise.
// The same seed gives the same disk.
func NewDisk(size int64, seed uint64) *Disk {
	d := &Disk{Data: make([]byte, size)}
	r := rand.New(rand.NewPCG(seed, 1))
	const piece = 32 << 10
	for off := 0; off < len(d.Data); off += piece {
		p := d.Data[off:min(off+piece, len(d.Data))]
		switch r.IntN(3) {
		case 0:
		case 1:
			for i := 0; i < len(p); {
				i += copy(p[i:], fmt.Sprintf("line %d of a log, user %d\n", i, r.IntN(1000)))
			}
		default:
			Noise(p, r.Uint64())
		}
	}
	return d
}

// Noise fills p with bytes that do not compress.
func Noise(p []byte, seed uint64) {
	r := rand.NewPCG(seed, 2) // stores of earlier releases hold just these bytes
	for i := range p {
		p[i] = byte(r.Uint64() >> 32)
	}
}

// empty says whether all of p are zeros.
func empty(p []byte) bool {
	return len(p) == 0 || p[0] == 0 && bytes.Equal(p[1:], p[:len(p)-1])
}

// Size implements image.Image.
func (d *Disk) Size() int64 { return int64(len(d.Data)) }

// ReadAt implements image.Image.
func (d *Disk) ReadAt(p []byte, off int64) (int, error) {
	if off >= d.Size() {
		return 0, io.EOF
	}
	n := copy(p, d.Data[off:])
	d.Read.Add(int64(n))
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

// Extents implements image.Image: all of it may hold data.
func (d *Disk) Extents(_ context.Context, off, length int64, yield func(image.Extent) bool) error {
	if length > 0 {
		yield(image.Extent{Offset: off, Length: length})
	}
	return nil
}
