package store

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"runtime"
	"sync"

	"github.com/kopia/kopia/repo"
	"github.com/kopia/kopia/repo/blob"
	"github.com/kopia/kopia/repo/content"
	"github.com/kopia/kopia/repo/object"

	"github.com/musterdr/muster/internal/dr"
	"github.com/musterdr/muster/internal/image"
)

var (
	_ image.Image      = (*Image)(nil)
	_ image.Prefetcher = (*Image)(nil)
)

// Read-ahead: a reader that has read readAheadAfter blocks in a row gets the next readAhead prepared.
const (
	readAheadAfter = 2
	readAhead      = 8
	// fetchMax is how many blocks are being fetched without anybody waiting, over all images of a store.
	fetchMax = 16
	// openMaps is how many segments of one image's map are in memory, about 17 KB each at the default block size.
	openMaps = 512
)

// Image is one disk of a kept snapshot. While it is open the snapshot cannot be forgotten.
//
// Reading a damaged block is an error that wraps ErrDamaged and names snapshot, disk and offset.
type Image struct {
	s        *Store
	snapshot string
	disk     int
	geo      geometry
	data     int64
	zeros    zeros
	segments []object.ID // empty for zeros
	ctx      context.Context
	close    func()

	mu    sync.Mutex
	maps  map[int64][]content.ID
	order []int64 // of maps, the oldest first
	next  int64   // where a sequential reader would go on
	run   int     // how many reads did so
}

// Image opens a disk of a kept snapshot.
func (s *Store) Image(ctx context.Context, snapshotID string, disk int) (*Image, error) {
	if err := dr.ValidateID(snapshotID); err != nil {
		return nil, fmt.Errorf("open image: %w", err)
	}
	unlock, err := s.lock(ctx, lockPin+snapshotID, false)
	if err != nil {
		return nil, fmt.Errorf("open image of %s: %w", snapshotID, err)
	}
	m, err := s.openImage(ctx, snapshotID, disk)
	if err != nil {
		unlock()
		return nil, fmt.Errorf("open image of %s: %w", snapshotID, s.explain(err))
	}
	end := m.close
	m.close = func() { end(); unlock() }
	return m, nil
}

func (s *Store) openImage(ctx context.Context, snapshotID string, disk int) (*Image, error) {
	ctx, done := s.bind(ctx)
	defer done()
	f, err := s.find(ctx, snapshotID)
	if errors.Is(err, ErrNotFound) { // kept by another process just now, perhaps
		if err := s.Refresh(ctx); err != nil {
			return nil, err
		}
		f, err = s.find(ctx, snapshotID)
	}
	if err != nil {
		return nil, err
	}
	return s.newImage(ctx, f, disk)
}

// newImage reads the root of a disk's map.
func (s *Store) newImage(ctx context.Context, f *found, disk int) (*Image, error) {
	disks := f.doc.Snapshot.Disks
	if disk < 0 || disk >= len(disks) {
		return nil, fmt.Errorf("disk %d is %w: the snapshot has %d", disk, ErrNotFound, len(disks))
	}
	d := disks[disk]
	geo, err := newGeometry(d.Size, d.BlockSize)
	if err != nil {
		return nil, err
	}
	m := &Image{s: s, snapshot: f.doc.Snapshot.ID, disk: disk, geo: geo, data: d.Data, zeros: f.doc.Zeros[disk], maps: map[int64][]content.ID{}}
	m.segments, err = readRoot(ctx, s.rep, d.Root, geo)
	if err != nil {
		return nil, damaged(fmt.Errorf("read map of disk %d of %s: %w", disk, m.snapshot, err))
	}
	if err := m.checkZeros(ctx); err != nil {
		return nil, damaged(fmt.Errorf("check map of disk %d of %s: %w", disk, m.snapshot, err))
	}
	for i, id := range m.segments {
		if n := id.String(); n == m.zeros.Segment || n == m.zeros.Last {
			m.segments[i] = object.EmptyID
		}
	}
	m.ctx, m.close = s.bind(context.Background())
	return m, nil
}

func readRoot(ctx context.Context, rep repo.Repository, root string, geo geometry) ([]object.ID, error) {
	id, err := object.ParseID(root)
	if err != nil {
		return nil, err
	}
	node, ok := id.IndexObjectID()
	if !ok {
		return nil, errors.New("it is no map")
	}
	r, err := rep.OpenObject(ctx, node)
	if err != nil {
		return nil, err
	}
	defer r.Close() //nolint:errcheck // only read
	limit := mapFixed + geo.segments()*mapEntryMax
	data, err := io.ReadAll(io.LimitReader(r, limit+1))
	if err != nil {
		return nil, err
	}
	return decodeMap(data, SegmentSize, geo.size)
}

// checkZeros makes sure that what the manifest calls zeros is.
func (m *Image) checkZeros(ctx context.Context) error {
	check := func(id string, length int64) error {
		if id == "" {
			return nil
		}
		cid, err := content.ParseID(id)
		if err != nil {
			return err
		}
		data, err := m.s.content(ctx, cid)
		if err != nil {
			return err
		}
		if int64(len(data)) != length || !bytes.Equal(data, zeroes[:length]) {
			return fmt.Errorf("block %s is not the %d zeros it is said to be", id, length)
		}
		return nil
	}
	if err := check(m.zeros.Block, m.geo.block); err != nil {
		return err
	}
	if err := check(m.zeros.Tail, m.geo.blockLen(m.geo.blocks()-1)); err != nil {
		return err
	}
	segment := func(id string, n int64) error {
		if id == "" {
			return nil
		}
		oid, err := object.ParseID(id)
		if err != nil {
			return err
		}
		blocks, err := loadSegment(ctx, m.s.rep.ContentReader(), m.geo, n, oid, m.zeros)
		if err == nil && !allZero(blocks) {
			err = fmt.Errorf("segment %s does not hold only zeros, as it is said to", id)
		}
		return err
	}
	last := m.geo.segments() - 1
	if m.zeros.Segment != "" && m.geo.segmentLen(0) != SegmentSize {
		return errors.New("a whole segment of zeros in a disk smaller than one")
	}
	if err := segment(m.zeros.Segment, 0); err != nil {
		return err
	}
	return segment(m.zeros.Last, last)
}

// loadSegment reads the node of segment n.
func loadSegment(ctx context.Context, r content.Reader, geo geometry, n int64, id object.ID, z zeros) ([]content.ID, error) {
	node, ok := id.IndexObjectID()
	if !ok {
		return nil, fmt.Errorf("segment %s is no map", id)
	}
	cid, err := directContent(node)
	if err != nil {
		return nil, err
	}
	data, err := r.GetContent(ctx, cid)
	if err != nil {
		return nil, err
	}
	ids, err := decodeMap(data, geo.block, geo.segmentLen(n))
	if err != nil {
		return nil, fmt.Errorf("segment %s: %w", id, err)
	}
	return blocksOf(ids, z)
}

// Size is the length in bytes.
func (m *Image) Size() int64 { return m.geo.size }

// BlockSize is the size in which the image is kept: reads along its multiples are the cheapest.
func (m *Image) BlockSize() int { return int(m.geo.block) }

// Close lets go of the snapshot. Reads that run fail; it may be called again.
func (m *Image) Close() error {
	m.close()
	return nil
}

// segment gives the blocks of segment n; nil for zeros.
func (m *Image) segment(ctx context.Context, n int64) ([]content.ID, error) {
	id := m.segments[n]
	if id == object.EmptyID {
		return nil, nil
	}
	m.mu.Lock()
	blocks, ok := m.maps[n]
	m.mu.Unlock()
	if ok {
		return blocks, nil
	}
	var err error
	for try := range 2 {
		blocks, err = loadSegment(ctx, m.s.rep.ContentReader(), m.geo, n, id, m.zeros)
		if err == nil || try > 0 || !m.s.heal(ctx, err) {
			break
		}
	}
	if err != nil {
		return nil, m.damagedAt(n*SegmentSize, err)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if _, ok := m.maps[n]; !ok {
		m.maps[n] = blocks
		if m.order = append(m.order, n); len(m.order) > openMaps {
			delete(m.maps, m.order[0])
			m.order = m.order[1:]
		}
	}
	return blocks, nil
}

// blockID says where block b is kept; the empty identifier is zeros.
func (m *Image) blockID(ctx context.Context, b int64) (content.ID, error) {
	per := m.geo.perSegment()
	blocks, err := m.segment(ctx, b/per)
	if err != nil || blocks == nil {
		return content.EmptyID, err
	}
	return blocks[b%per], nil
}

func (m *Image) damagedAt(offset int64, err error) error {
	return damaged(fmt.Errorf("read disk %d of %s at byte %d: %w", m.disk, m.snapshot, offset, m.s.explain(err)))
}

// block gives the bytes of block b, to be read only; nil for zeros.
func (m *Image) block(ctx context.Context, b int64) ([]byte, error) {
	id, err := m.blockID(ctx, b)
	if err != nil || id == content.EmptyID {
		return nil, err
	}
	data, err := m.s.cache.get(ctx, id, func(ctx context.Context) ([]byte, error) { return m.s.content(ctx, id) })
	if err == nil && int64(len(data)) != m.geo.blockLen(b) {
		err = fmt.Errorf("block %s has %d bytes, not %d", id, len(data), m.geo.blockLen(b))
	}
	if err != nil {
		return nil, m.damagedAt(b*m.geo.block, err)
	}
	return data, nil
}

// content reads, decrypts and decompresses one content.
func (s *Store) content(ctx context.Context, id content.ID) ([]byte, error) {
	data, err := s.rep.ContentReader().GetContent(ctx, id)
	if err != nil && s.heal(ctx, err) {
		data, err = s.rep.ContentReader().GetContent(ctx, id)
	}
	return data, err
}

// ReadAt implements io.ReaderAt. The blocks of a large read are fetched at the same time.
func (m *Image) ReadAt(p []byte, off int64) (int, error) {
	if off < 0 {
		return 0, fmt.Errorf("read disk %d of %s: offset %d is negative", m.disk, m.snapshot, off)
	}
	if err := m.ctx.Err(); err != nil {
		return 0, m.s.explain(fmt.Errorf("read disk %d of %s: the image is closed", m.disk, m.snapshot))
	}
	if off >= m.geo.size {
		return 0, io.EOF
	}
	var short error
	if rest := m.geo.size - off; int64(len(p)) > rest {
		p, short = p[:rest], io.EOF
	}
	if len(p) == 0 {
		return 0, short
	}
	first, last := off/m.geo.block, (off+int64(len(p))-1)/m.geo.block
	m.lookAhead(off, int64(len(p)), last)
	if n, err := m.readBlocks(p, off, first, last); err != nil {
		return n, err
	}
	return len(p), short
}

// readBlocks copies the blocks first to last into p, which starts at off. It says how much of the front is good.
func (m *Image) readBlocks(p []byte, off, first, last int64) (int, error) {
	fetch := func(b int64) error {
		data, err := m.block(m.ctx, b)
		if err != nil {
			return err
		}
		from := max(off, b*m.geo.block)
		to := min(off+int64(len(p)), b*m.geo.block+m.geo.blockLen(b))
		dst := p[from-off : to-off]
		if data == nil {
			clear(dst)
			return nil
		}
		copy(dst, data[from-b*m.geo.block:])
		return nil
	}
	good := func(b int64) int { return int(max(b*m.geo.block-off, 0)) }
	workers := min(last-first+1, int64(2*runtime.GOMAXPROCS(0)))
	if workers <= 2 {
		for b := first; b <= last; b++ {
			if err := fetch(b); err != nil {
				return good(b), err
			}
		}
		return len(p), nil
	}
	var (
		mu    sync.Mutex
		wg    sync.WaitGroup
		next  = first
		bad   = last + 1
		cause error
	)
	for range workers {
		wg.Go(func() {
			for {
				mu.Lock()
				b := next
				next++
				stop := b > last || b > bad
				mu.Unlock()
				if stop {
					return
				}
				if err := fetch(b); err != nil {
					mu.Lock()
					if b < bad {
						bad, cause = b, err
					}
					mu.Unlock()
				}
			}
		})
	}
	wg.Wait()
	if cause != nil {
		return good(bad), cause
	}
	return len(p), nil
}

// lookAhead prepares the next blocks for a reader that goes straight on.
func (m *Image) lookAhead(off, length, last int64) {
	m.mu.Lock()
	if off == m.next {
		m.run++
	} else {
		m.run = 0
	}
	m.next = off + length
	ahead := m.run >= readAheadAfter
	m.mu.Unlock()
	if ahead {
		for b := last + 1; b <= min(last+readAhead, m.geo.blocks()-1); b++ {
			if !m.fetchSoon(b) {
				return
			}
		}
	}
}

// Prefetch starts to bring a range into the cache, as far as the cache and the limits allow.
func (m *Image) Prefetch(off, length int64) {
	if off < 0 || length <= 0 || off >= m.geo.size {
		return
	}
	for b := off / m.geo.block; b <= (min(off+length, m.geo.size)-1)/m.geo.block; b++ {
		if !m.fetchSoon(b) {
			return
		}
	}
}

// fetchSoon fetches a block in the background, unless enough are on their way.
func (m *Image) fetchSoon(b int64) bool {
	m.mu.Lock()
	blocks, known := m.maps[b/m.geo.perSegment()]
	m.mu.Unlock()
	if known { // spare the goroutine if there is nothing to do
		if id := blocks[b%m.geo.perSegment()]; id == content.EmptyID || m.s.cache.has(id) {
			return true
		}
	} else if m.segments[b/m.geo.perSegment()] == object.EmptyID {
		return true
	}
	if !m.s.cache.reserve() {
		return false
	}
	m.s.mu.Lock()
	defer m.s.mu.Unlock()
	if m.s.life.Err() != nil {
		m.s.cache.unreserve()
		return false
	}
	m.s.work.Go(func() {
		defer m.s.cache.unreserve()
		_, _ = m.block(m.ctx, b) // whoever reads it will see the error
	})
	return true
}

// Extents implements image.Image. Blocks of zeros are zero extents; adjacent ones of a kind are one.
func (m *Image) Extents(ctx context.Context, off, length int64, yield func(image.Extent) bool) error {
	if off < 0 || length < 0 || off > m.geo.size-length {
		return fmt.Errorf("list extents of disk %d of %s: %d bytes at %d lie outside its %d", m.disk, m.snapshot, length, off, m.geo.size)
	}
	var cur image.Extent
	end := off + length
	emit := func(to int64, zero bool) bool {
		to = min(to, end)
		if cur.Length > 0 && cur.Zero != zero {
			if !yield(cur) {
				return false
			}
			cur = image.Extent{Offset: cur.Offset + cur.Length}
		}
		if cur.Length == 0 && cur.Offset < off {
			cur.Offset = off
		}
		cur.Zero, cur.Length = zero, to-cur.Offset
		return true
	}
	cur.Offset = off
	per := m.geo.perSegment()
	for pos := off; pos < end; {
		if err := ctx.Err(); err != nil {
			return context.Cause(ctx)
		}
		n := pos / SegmentSize
		blocks, err := m.segment(ctx, n)
		if err != nil {
			return err
		}
		stop := min(end, n*SegmentSize+m.geo.segmentLen(n))
		if blocks == nil {
			if !emit(stop, true) {
				return nil
			}
			pos = stop
			continue
		}
		for pos < stop {
			b := pos / m.geo.block
			pos = min(stop, (b+1)*m.geo.block)
			if !emit(pos, blocks[b-n*per] == content.EmptyID) {
				return nil
			}
		}
	}
	if cur.Length > 0 {
		yield(cur)
	}
	return nil
}

// sharedData counts the bytes of non-zero blocks that are in another geometry as well, at the same length.
func (m *Image) sharedData(ctx context.Context, geo geometry) (int64, error) {
	if geo.size > m.geo.size { // all but the last, if that is short
		last := m.geo.blocks() - 1
		id, err := m.blockID(ctx, last)
		if err != nil || id == content.EmptyID || geo.blockLen(last) == m.geo.blockLen(last) {
			return m.data, err
		}
		return m.data - m.geo.blockLen(last), nil
	}
	var sum int64
	for n := range geo.segments() {
		blocks, err := m.segment(ctx, n)
		if err != nil {
			return 0, err
		}
		first := n * m.geo.perSegment()
		for i, id := range blocks {
			if b := first + int64(i); id != content.EmptyID && b < geo.blocks() && geo.blockLen(b) == m.geo.blockLen(b) {
				sum += geo.blockLen(b)
			}
		}
	}
	return sum, nil
}

// heal says whether a read is worth trying again: a blob that is not there may have been collected and its blocks
// rewritten by another process since our index was read.
func (s *Store) heal(ctx context.Context, err error) bool {
	if !errors.Is(err, blob.ErrBlobNotFound) && !errors.Is(err, content.ErrContentNotFound) {
		return false
	}
	if !s.due(&s.healed, healEvery) {
		return false
	}
	return s.Refresh(ctx) == nil
}
