package qemu

import (
	"sync/atomic"

	"github.com/musterdr/muster/internal/image"
)

// counted counts what is read of an export.
type counted struct {
	*image.Remote
	read atomic.Int64
}

// ReadAt implements image.Image.
func (c *counted) ReadAt(p []byte, off int64) (int, error) {
	n, err := c.Remote.ReadAt(p, off)
	c.read.Add(int64(n))
	return n, err
}
