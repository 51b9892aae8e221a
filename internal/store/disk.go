package store

import (
	"bytes"
	"context"
	"fmt"
	"sync"
	"sync/atomic"

	"github.com/kopia/kopia/repo/compression"
	"github.com/kopia/kopia/repo/content"
	"github.com/kopia/kopia/repo/object"
)

func contentPrefix(p string) content.IDPrefix  { return content.IDPrefix(p) }
func compressorName(n string) compression.Name { return compression.Name(n) }

// mapPrefix is the prefix of the contents that map nodes are: Kopia keeps those apart, together.
const mapPrefix = "x"

// openSegments is how many segments of one disk are in memory while it is written, about 17 KB each. Disks are written
// from front to back, more or less; whoever jumps about wildly pays with segments written twice.
const openSegments = 256

// DiskWriter is one disk of a snapshot being written.
type DiskWriter struct {
	w     *Writer
	name  string
	geo   geometry
	fresh atomic.Int64 // bytes of blocks that were not in the store

	parent    geometry    // of the parent's disk; size 0 for none
	parentMap []object.ID // its segments; the empty one stands for zeros
	parentZ   zeros
	inherited int64 // bytes of non-zero blocks of the parent that lie inside this disk

	mu   sync.Mutex
	segs []segment
	open []int64 // indexes of the open segments, the one used last at the end
	seen *filter
}

// segment is one segment of a disk being written.
type segment struct {
	id      object.ID    // as it is now; empty for zeros. Not used while blocks is set
	blocks  []content.ID // open: its blocks; empty for zeros
	touched bool
	base    int64 // touched: bytes of non-zero blocks before
	data    int64 // touched: bytes of non-zero blocks now
	changed int64 // touched: bytes of blocks that differ from before
	same    int64 // touched: bytes of non-zero blocks that do not
}

// Disk adds the next disk. blockSize 0 takes the parent's, or DefaultBlockSize. The parent's disk at the same position
// is inherited; where the size differs, what both have. A different block size within a chain is refused.
func (w *Writer) Disk(ctx context.Context, name string, size int64, blockSize int) (*DiskWriter, error) {
	if err := w.usable(ctx); err != nil {
		return nil, fmt.Errorf("add disk %s: %w", name, err)
	}
	w.mu.Lock()
	position := len(w.disks)
	w.mu.Unlock()
	d, err := w.newDisk(ctx, position, name, size, blockSize)
	if err != nil {
		return nil, fmt.Errorf("add disk %s: %w", name, w.s.explain(err))
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if len(w.disks) != position {
		return nil, fmt.Errorf("add disk %s: another disk was added at the same time; add them in order", name)
	}
	w.disks = append(w.disks, d)
	return d, nil
}

func (w *Writer) newDisk(ctx context.Context, position int, name string, size int64, blockSize int) (*DiskWriter, error) {
	if position >= MaxDisks {
		return nil, fmt.Errorf("a snapshot has at most %d disks", MaxDisks)
	}
	d := &DiskWriter{w: w, name: name}
	var heir *Image
	if w.parent != nil && position < len(w.parent.doc.Snapshot.Disks) {
		disk := w.parent.doc.Snapshot.Disks[position]
		if blockSize != 0 && blockSize != disk.BlockSize {
			return nil, fmt.Errorf("its block size %d is not the parent's %d: give 0, or begin without a parent", blockSize, disk.BlockSize)
		}
		blockSize = disk.BlockSize
		var err error
		if heir, err = w.s.newImage(ctx, w.parent, position); err != nil {
			return nil, fmt.Errorf("parent: %w", err)
		}
		defer heir.Close() //nolint:errcheck // only read
		d.parent, d.parentMap, d.parentZ = heir.geo, heir.segments, heir.zeros
	}
	if blockSize == 0 {
		blockSize = DefaultBlockSize
	}
	geo, err := newGeometry(size, blockSize)
	if err != nil {
		return nil, err
	}
	d.geo, d.seen = geo, newFilter(geo.blocks())
	d.segs = make([]segment, geo.segments())
	if heir == nil {
		return d, nil
	}
	return d, d.inherit(ctx, heir)
}

// inherit takes over the parent's segments. Where the end of one of the two disks lies inside a segment, it is made
// anew from the blocks both have, and the block that is short in one of them is read and cut or filled up.
func (d *DiskWriter) inherit(ctx context.Context, heir *Image) error {
	for i := range d.segs {
		n := int64(i)
		if n < int64(len(d.parentMap)) && d.geo.segmentLen(n) == d.parent.segmentLen(n) {
			d.segs[i].id = d.parentMap[i]
		}
	}
	d.inherited = heir.data
	if d.geo.size == d.parent.size {
		return nil
	}
	var err error
	if d.inherited, err = heir.sharedData(ctx, d.geo); err != nil {
		return err
	}
	common := min(d.geo.size, d.parent.size)
	edge := (common - 1) / SegmentSize
	if d.geo.segmentLen(edge) != d.parent.segmentLen(edge) {
		d.mu.Lock()
		_, err := d.openSegment(ctx, edge)
		d.mu.Unlock()
		if err != nil {
			return err
		}
	}
	if last := (common - 1) / d.geo.block; d.geo.blockLen(last) != d.parent.blockLen(last) {
		data := make([]byte, d.geo.blockLen(last))
		n := min(len(data), int(d.parent.blockLen(last)))
		if _, err := heir.ReadAt(data[:n], last*d.geo.block); err != nil {
			return err
		}
		if err := d.Write(ctx, last, data); err != nil {
			return err
		}
	}
	return nil
}

// Size is the length of the disk in bytes; BlockSize that of a block.
func (d *DiskWriter) Size() int64 { return d.geo.size }

// BlockSize is the size of every block but the last, which may be shorter.
func (d *DiskWriter) BlockSize() int { return int(d.geo.block) }

// Blocks is how many blocks the disk has.
func (d *DiskWriter) Blocks() int64 { return d.geo.blocks() }

var zeroes [MaxBlockSize]byte

// Write writes one block, which must be whole; only the last may be short. Zeros are noticed and cost nothing. It may
// be called from many goroutines; the data is not kept. After an error nothing more of the snapshot is written.
func (d *DiskWriter) Write(ctx context.Context, block int64, data []byte) error {
	return d.WritePacked(ctx, block, data, nil)
}

// WritePacked is Write of a block that came compressed: frame is a zstd frame that the caller has unpacked to data. It is
// stored as it is, if any reader could read it; nil for a block that did not come so.
func (d *DiskWriter) WritePacked(ctx context.Context, block int64, data, frame []byte) error {
	if err := d.w.usable(ctx); err != nil {
		return err
	}
	if block < 0 || block >= d.geo.blocks() {
		return fmt.Errorf("write block %d of disk %s: it has %d", block, d.name, d.geo.blocks())
	}
	if int64(len(data)) != d.geo.blockLen(block) {
		return fmt.Errorf("write block %d of disk %s: %d bytes given for a block of %d", block, d.name, len(data), d.geo.blockLen(block))
	}
	if bytes.Equal(data, zeroes[:len(data)]) {
		return d.w.fail(d.set(ctx, block, content.EmptyID))
	}
	id, err := d.store(data, frame)
	if err == nil {
		err = d.set(ctx, block, id)
	}
	if err != nil {
		return d.w.fail(fmt.Errorf("write block %d of disk %s: %w", block, d.name, d.w.s.explain(err)))
	}
	return nil
}

// store puts a block into the store if it is not there.
func (d *DiskWriter) store(data, frame []byte) (content.ID, error) {
	var oid object.ID
	put := func() (err error) {
		oid, err = d.w.put(data, "", d.w.blockCmp)
		return err
	}
	var err error
	if storable(frame, len(data)) {
		err = packed.during(data, frame, put)
	} else {
		err = put()
	}
	if err != nil {
		return content.EmptyID, err
	}
	id, err := directContent(oid)
	if err != nil {
		return content.EmptyID, err
	}
	info, err := d.w.session.ContentInfo(d.w.ctx, id)
	if err != nil {
		return content.EmptyID, err
	}
	if d.w.isMine(info.PackBlobID) && d.seen.add(id.Hash()) {
		d.fresh.Add(int64(len(data)))
		return id, d.w.flushSome()
	}
	return id, nil
}

// Zero makes a range of blocks read as zeros.
func (d *DiskWriter) Zero(ctx context.Context, first, count int64) error {
	if err := d.w.usable(ctx); err != nil {
		return err
	}
	if first < 0 || count < 0 || first > d.geo.blocks()-count {
		return fmt.Errorf("zero %d blocks at %d of disk %s: it has %d", count, first, d.name, d.geo.blocks())
	}
	per := d.geo.perSegment()
	for end := first + count; first < end; {
		n := first / per
		stop := min(end, (n+1)*per, d.geo.blocks())
		if err := d.zeroIn(ctx, n, first, stop); err != nil {
			return d.w.fail(fmt.Errorf("zero blocks of disk %s: %w", d.name, d.w.s.explain(err)))
		}
		first = stop
	}
	return nil
}

// zeroIn zeroes the blocks [first, stop), all of segment n.
func (d *DiskWriter) zeroIn(ctx context.Context, n, first, stop int64) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	s := &d.segs[n]
	if s.blocks == nil && s.id == object.EmptyID {
		return nil // zeros already
	}
	blocks, err := d.openSegment(ctx, n)
	if err != nil {
		return err
	}
	per := d.geo.perSegment()
	clear(blocks[first-n*per : stop-n*per])
	return nil
}

func (d *DiskWriter) set(ctx context.Context, block int64, id content.ID) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	per := d.geo.perSegment()
	n := block / per
	if s := &d.segs[n]; id == content.EmptyID && s.blocks == nil && s.id == object.EmptyID {
		return nil // zeros already
	}
	blocks, err := d.openSegment(ctx, n)
	if err != nil {
		return err
	}
	blocks[block-n*per] = id
	return nil
}

// openSegment gives the blocks of a segment, to be changed under d.mu.
func (d *DiskWriter) openSegment(ctx context.Context, n int64) ([]content.ID, error) {
	s := &d.segs[n]
	if s.blocks != nil {
		if last := len(d.open) - 1; d.open[last] != n {
			for i, o := range d.open {
				if o == n {
					d.open = append(append(d.open[:i:i], d.open[i+1:]...), n)
					break
				}
			}
		}
		return s.blocks, nil
	}
	var err error
	switch {
	case s.touched && s.id == object.EmptyID:
		s.blocks = make([]content.ID, d.geo.segmentBlocks(n))
	case s.touched:
		_, _, z, zerr := d.zerosNow()
		if zerr != nil {
			return nil, zerr
		}
		s.blocks, err = loadSegment(ctx, d.w.session.ContentReader(), d.geo, n, s.id, z)
	default:
		s.blocks, err = d.before(ctx, n)
	}
	if err != nil {
		s.blocks = nil
		return nil, err
	}
	s.touched = true
	d.open = append(d.open, n)
	if len(d.open) > openSegments {
		return s.blocks, d.sealSegment(ctx, d.open[0])
	}
	return s.blocks, nil
}

// before gives the blocks of a segment as the parent has them. A block that has another length there counts as zeros.
func (d *DiskWriter) before(ctx context.Context, n int64) ([]content.ID, error) {
	out := make([]content.ID, d.geo.segmentBlocks(n))
	if n >= int64(len(d.parentMap)) || d.parentMap[n] == object.EmptyID {
		return out, nil
	}
	blocks, err := loadSegment(ctx, d.w.s.rep.ContentReader(), d.parent, n, d.parentMap[n], d.parentZ)
	if err != nil {
		return nil, err
	}
	copy(out, blocks)
	first := n * d.geo.perSegment()
	for i := range min(len(out), len(blocks)) {
		if b := first + int64(i); d.geo.blockLen(b) != d.parent.blockLen(b) {
			out[i] = content.EmptyID
		}
	}
	return out, nil
}

// zerosNow gives the zero blocks that a segment written by us may hold.
func (d *DiskWriter) zerosNow() (block, tail object.ID, z zeros, err error) {
	if block, err = d.w.zeroBlock(d.geo.block); err == nil {
		tail, err = d.w.zeroBlock(d.geo.blockLen(d.geo.blocks() - 1))
	}
	return block, tail, zeros{Block: block.String(), Tail: tail.String()}, err
}

// sealSegment writes an open segment and takes it out of memory.
func (d *DiskWriter) sealSegment(ctx context.Context, n int64) error {
	s := &d.segs[n]
	before, err := d.before(ctx, n)
	if err != nil {
		return err
	}
	s.base, s.data, s.changed, s.same = 0, 0, 0, 0
	first := n * d.geo.perSegment()
	for i, id := range s.blocks {
		length := d.geo.blockLen(first + int64(i))
		if before[i] != content.EmptyID {
			s.base += length
		}
		if id != content.EmptyID {
			s.data += length
		}
		switch {
		case id != before[i]:
			s.changed += length
		case id != content.EmptyID:
			s.same += length
		}
	}
	if allZero(s.blocks) {
		s.id = object.EmptyID
	} else if s.id, err = d.putSegment(n, s.blocks); err != nil {
		return err
	}
	s.blocks = nil
	for i, o := range d.open {
		if o == n {
			d.open = append(d.open[:i], d.open[i+1:]...)
			break
		}
	}
	return nil
}

// sealOpen writes every open segment.
func (d *DiskWriter) sealOpen() error {
	for len(d.open) > 0 {
		if err := d.sealSegment(d.w.ctx, d.open[0]); err != nil {
			return err
		}
	}
	return nil
}

// putSegment writes the node of a segment.
func (d *DiskWriter) putSegment(n int64, blocks []content.ID) (object.ID, error) {
	ids := make([]object.ID, len(blocks))
	first := n * d.geo.perSegment()
	for i, id := range blocks {
		if id != content.EmptyID {
			ids[i] = object.DirectObjectID(id)
			continue
		}
		var err error
		if ids[i], err = d.w.zeroBlock(d.geo.blockLen(first + int64(i))); err != nil {
			return object.EmptyID, err
		}
	}
	node, err := d.w.put(encodeMap(ids, d.geo.block, d.geo.segmentLen(n)), mapPrefix, compressorMap)
	if err != nil {
		return object.EmptyID, err
	}
	return indirect(node)
}

// diskMap is the finished map of a disk.
type diskMap struct {
	geo                 geometry
	root                object.ID // the disk as one object
	node                object.ID // the root node, as a file
	nodeSize            int64
	segments            []object.ID
	zeroBlock, zeroTail object.ID
	zeros               zeros
	totals
}

// totals are bytes of blocks of a disk.
type totals struct {
	data    int64 // that are not zeros
	changed int64 // that differ from the parent's, or hold anything where there is none
	resumed int64 // that are as the partial has them, and not zeros
}

// totals adds up what is known of the segments, none of which is open.
func (d *DiskWriter) totals() totals {
	t := totals{data: d.inherited, resumed: d.inherited}
	for i := range d.segs {
		s := &d.segs[i]
		t.data += s.data - s.base
		t.changed += s.changed
		t.resumed += s.same - s.base
	}
	if d.w.resumed {
		t.changed = t.data // it has no parent
	} else {
		t.resumed = 0
	}
	return t
}

// seal finishes the disk as it is now. More may be written afterwards.
func (d *DiskWriter) seal() (*diskMap, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if err := d.sealOpen(); err != nil {
		return nil, err
	}
	block, tail, z, err := d.zerosNow()
	if err != nil {
		return nil, err
	}
	m := &diskMap{geo: d.geo, segments: make([]object.ID, len(d.segs)), zeros: z, zeroBlock: block, zeroTail: tail, totals: d.totals()}
	for i := range d.segs {
		m.segments[i] = d.segs[i].id
		if m.segments[i] == object.EmptyID {
			if m.segments[i], err = d.zeroSegment(int64(i), &m.zeros); err != nil {
				return nil, err
			}
		}
	}
	node := encodeMap(m.segments, SegmentSize, d.geo.size)
	m.nodeSize = int64(len(node))
	if m.node, err = d.w.put(node, mapPrefix, compressorMap); err != nil {
		return nil, err
	}
	m.root, err = indirect(m.node)
	return m, err
}

// changedBlocks counts what differs from the parent. It finishes the open segments.
func (d *DiskWriter) changedBlocks() (int64, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if err := d.sealOpen(); err != nil {
		return 0, err
	}
	return ceilDiv(d.totals().changed, d.geo.block), nil
}

// zeroSegment gives the object that stands for a segment of zeros, and notes it.
func (d *DiskWriter) zeroSegment(n int64, z *zeros) (object.ID, error) {
	name := &z.Segment
	if d.geo.segmentLen(n) < SegmentSize {
		name = &z.Last
	}
	if *name != "" {
		return object.ParseID(*name)
	}
	id, err := d.putSegment(n, make([]content.ID, d.geo.segmentBlocks(n)))
	*name = id.String()
	return id, err
}
