package image

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"sync/atomic"
)

// Limits of one answer about holes.
const (
	statusRoom = 64 << 10                         // bytes of the answer
	maxExtents = (statusRoom - chunkSize - 4) / 8 // that are told; the client asks again for the rest
	maxWalk    = 1 << 16                          // that are looked at, adjacent ones of a kind count singly
)

// reading is a read request that is answered in pieces.
type reading struct {
	request
	left   atomic.Int32 // pieces that are not answered yet
	broken atomic.Bool  // the client was told of an error
}

// read starts a read. Pieces end where the image's offset is a multiple of pieceSize, so that no piece begins or ends
// within a block of the store for no reason.
func (c *client) read(r request) error {
	c.export.reads.Add(1)
	off, end := int64(r.offset), int64(r.offset)+int64(r.length)
	whole := r.flags&cmdFlagDF != 0
	switch {
	case !c.structured:
		return c.start(int(min(r.length, pieceSize)), func(buf []byte) { c.readSimple(r, buf) })
	case r.length == 0:
		c.send(appendChunk(nil, chunkDone, chunkNone, r.cookie, 0))
		return nil
	case whole && r.length > pieceSize:
		return c.refuse(r, errnoOverflow)
	}
	rd := &reading{request: r}
	if whole {
		rd.left.Store(1)
	} else {
		rd.left.Store(int32((end-1)/pieceSize - off/pieceSize + 1))
	}
	for off < end {
		from, to := off, end
		if !whole {
			to = min(end, (off/pieceSize+1)*pieceSize)
		}
		if err := c.start(int(to-from), func(buf []byte) { c.readPiece(rd, from, to, buf) }); err != nil {
			return err
		}
		off = to
	}
	return nil
}

// readPiece answers one piece of a read. The last piece to get ready carries the flag that ends the answer.
func (c *client) readPiece(rd *reading, off, end int64, buf []byte) {
	if c.ctx.Err() != nil {
		return
	}
	b, last, err := c.fill(buf[:0], rd, off, end)
	if err != nil {
		b, last = buf[:0], 0
		if !rd.broken.Swap(true) {
			b = appendErrorOffsetFrame(b, rd.cookie, errnoIO, "the image cannot be read here", off)
		}
	}
	c.out.Lock()
	defer c.out.Unlock()
	if rd.left.Add(-1) == 0 {
		if len(b) == 0 {
			b = appendChunk(b, 0, chunkNone, rd.cookie, 0)
		}
		b = markDone(b, last)
	}
	if len(b) > 0 {
		c.sendLocked(b)
	}
}

// fill appends the frames that answer [off, end), and says where the last of them begins.
func (c *client) fill(b []byte, rd *reading, off, end int64) (frames []byte, last int, err error) {
	var holes []Extent
	if end-off >= sparseRead && rd.flags&cmdFlagDF == 0 {
		if holes, err = c.holes(off, end); err != nil {
			return nil, 0, err
		}
	}
	for _, hole := range append(holes, Extent{Offset: end}) {
		if n := int(hole.Offset - off); n > 0 {
			last = len(b)
			b = appendDataFrame(b, rd.cookie, off, n)
			b = b[:len(b)+n]
			if err := c.readAt(b[len(b)-n:], off); err != nil {
				return nil, 0, err
			}
		}
		if hole.Length > 0 {
			last = len(b)
			b = appendHoleFrame(b, rd.cookie, hole.Offset, hole.Length)
		}
		off = hole.Offset + hole.Length
	}
	return b, last, nil
}

// holes lists the holes within [off, end) that are worth telling.
func (c *client) holes(off, end int64) ([]Extent, error) {
	var holes []Extent
	_, err := c.eachHole(off, end, func(e Extent) bool {
		if e.Length >= minHole {
			holes = append(holes, e)
		}
		return true
	})
	return holes, err
}

// eachHole yields the holes within [off, end), adjacent ones as one, and says how far it looked. Holes begin and end at
// multiples of minHole or where the range does: QEMU rounds what it is told to whole sectors, outwards, and would take
// the edge of the data for zeros.
func (c *client) eachHole(off, end int64, yield func(Extent) bool) (seen int64, err error) {
	var hole Extent
	walked, more := 0, true
	tell := func() {
		from, to := hole.Offset, hole.Offset+hole.Length
		if from != off {
			from = (from + minHole - 1) / minHole * minHole
		}
		if to != end {
			to = to / minHole * minHole
		}
		if more && from < to {
			more = yield(Extent{from, to - from, true})
			seen = to
		}
		hole = Extent{}
	}
	err = c.extents(off, end-off, func(e Extent) bool {
		switch {
		case !e.Zero:
			tell()
		case hole.Length == 0:
			hole = e
		default:
			hole.Length += e.Length
		}
		if more {
			seen = e.Offset + e.Length
		}
		walked++
		return more && walked < maxWalk
	})
	tell()
	return seen, err
}

// readSimple answers a client that does not know structured replies. What breaks after the header was sent can only be
// told by closing the connection.
func (c *client) readSimple(r request, buf []byte) {
	b := appendSimple(buf[:0], r.cookie, 0)
	off, end := int64(r.offset), int64(r.offset)+int64(r.length)
	locked := false
	for {
		n := int(min(end-off, pieceSize))
		b = b[:len(b)+n]
		if err := c.readAt(b[len(b)-n:], off); err != nil {
			if locked {
				c.cut(errors.New("a read broke after its answer had begun"))
				return
			}
			c.send(appendSimple(buf[:0], r.cookie, errnoIO))
			return
		}
		if !locked {
			locked = true
			c.out.Lock()
			defer c.out.Unlock()
		}
		c.sendLocked(b)
		if off += int64(n); off == end || c.ctx.Err() != nil {
			return
		}
		b = buf[:0]
	}
}

// readAt fills p from the image. An error is reported.
func (c *client) readAt(p []byte, off int64) error {
	n, err := c.export.image.ReadAt(p, off)
	if n == len(p) {
		c.export.bytes.Add(int64(n))
		return nil
	}
	if err == nil || errors.Is(err, io.EOF) {
		err = io.ErrUnexpectedEOF
	}
	err = fmt.Errorf("read %d bytes at offset %d: %w", len(p), off, err)
	c.broke(err)
	return err
}

// extents is the image's Extents, held to its contract: what is yielded covers the range from its beginning, in order
// and without a gap. An error is reported.
func (c *client) extents(off, length int64, yield func(Extent) bool) error {
	pos, end, stopped := off, off+length, false
	var broken error
	err := c.export.image.Extents(c.ctx, off, length, func(e Extent) bool {
		if e.Offset != pos || e.Length <= 0 || e.Length > end-pos {
			broken = fmt.Errorf("extent %+v does not follow offset %d", e, pos)
			return false
		}
		pos += e.Length
		stopped = !yield(e)
		return !stopped
	})
	if err == nil {
		err = broken
	}
	if err == nil && !stopped && pos != end {
		err = fmt.Errorf("extents end at offset %d, not %d", pos, end)
	}
	if err == nil || errors.Is(err, context.Canceled) {
		return err
	}
	err = fmt.Errorf("find extents at offset %d: %w", off, err)
	c.broke(err)
	return err
}

// blockStatus answers where the data and the holes of a range are, for at least its beginning.
func (c *client) blockStatus(r request, buf []byte) {
	b := appendChunk(buf[:0], chunkDone, chunkBlockStatus, r.cookie, 0)
	b = binary.BigEndian.AppendUint32(b, metaID)
	limit := maxExtents
	if r.flags&cmdFlagReqOne != 0 {
		limit = 1
	}
	told := 0
	tell := func(length int64, state uint32) {
		if length > 0 && told < limit {
			b = binary.BigEndian.AppendUint32(b, uint32(length))
			b = binary.BigEndian.AppendUint32(b, state)
			told++
		}
	}
	pos, end := int64(r.offset), int64(r.offset)+int64(r.length)
	seen, err := c.eachHole(pos, end, func(hole Extent) bool {
		tell(hole.Offset-pos, 0)
		tell(hole.Length, stateHoleAndZero)
		pos = hole.Offset + hole.Length
		return told < limit
	})
	if err != nil {
		_ = c.refuse(r, errnoIO)
		return
	}
	tell(seen-pos, 0)
	binary.BigEndian.PutUint32(b[chunkSize-4:], uint32(len(b)-chunkSize))
	c.send(b)
}
