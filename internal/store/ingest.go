package store

import (
	"context"
	"errors"
	"fmt"
	"io"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/musterdr/muster/internal/dr"
	"github.com/musterdr/muster/internal/image"
)

// readSize is how much of the source is read in one piece, at least a block.
const readSize = 1 << 20

// Ingest reads the disk from src, which must have its size, and writes it. It reads only the given extents, widened to
// whole blocks, with all processors; extents that are Zero are not read at all where they cover whole blocks. nil
// extents mean everything, as src.Extents describes it.
func (d *DiskWriter) Ingest(ctx context.Context, src image.Image, extents []image.Extent, progress dr.Progress) error {
	if src.Size() != d.geo.size {
		return fmt.Errorf("ingest disk %s: the source has %d bytes, the disk %d", d.name, src.Size(), d.geo.size)
	}
	if extents == nil {
		err := src.Extents(ctx, 0, d.geo.size, func(e image.Extent) bool {
			extents = append(extents, e)
			return true
		})
		if err != nil {
			return d.w.fail(fmt.Errorf("ingest disk %s: list extents: %w", d.name, err))
		}
	}
	spans, err := d.plan(extents)
	if err != nil {
		return fmt.Errorf("ingest disk %s: %w", d.name, err)
	}
	if err := d.ingest(ctx, src, spans, progress); err != nil {
		return d.w.fail(fmt.Errorf("ingest disk %s: %w", d.name, err))
	}
	return nil
}

// span is a run of whole blocks to be read, or known to be zeros.
type span struct {
	first, count int64
	zero         bool
}

// plan turns extents, in any order, into spans in the order of the disk: what is not zero is widened to whole blocks,
// what is zero narrowed, and reading wins where they meet.
func (d *DiskWriter) plan(extents []image.Extent) ([]span, error) {
	var read, zero []span
	for _, e := range extents {
		if e.Offset < 0 || e.Length < 0 || e.Offset > d.geo.size-e.Length {
			return nil, fmt.Errorf("extent of %d bytes at %d lies outside the disk of %d", e.Length, e.Offset, d.geo.size)
		}
		if e.Length == 0 {
			continue
		}
		end := e.Offset + e.Length
		first, stop := e.Offset/d.geo.block, ceilDiv(end, d.geo.block)
		if !e.Zero {
			read = append(read, span{first: first, count: stop - first})
			continue
		}
		if whole := ceilDiv(e.Offset, d.geo.block); whole > first { // the block where it begins is partly something else
			read = append(read, span{first: first, count: 1})
			first = whole
		}
		if end < d.geo.size && end%d.geo.block != 0 && stop > first {
			stop--
			read = append(read, span{first: stop, count: 1})
		}
		if stop > first {
			zero = append(zero, span{first: first, count: stop - first, zero: true})
		}
	}
	read, zero = merge(read), merge(zero)
	out := slices.Concat(read, subtract(zero, read))
	slices.SortFunc(out, func(a, b span) int { return int(min(max(a.first-b.first, -1), 1)) })
	return out, nil
}

// merge sorts spans of one kind and joins those that touch.
func merge(in []span) (out []span) {
	slices.SortFunc(in, func(a, b span) int { return int(min(max(a.first-b.first, -1), 1)) })
	for _, s := range in {
		if n := len(out); n > 0 && s.first <= out[n-1].first+out[n-1].count {
			out[n-1].count = max(out[n-1].count, s.first+s.count-out[n-1].first)
			continue
		}
		out = append(out, s)
	}
	return out
}

// subtract takes the spans of b out of those of a; both are merged.
func subtract(a, b []span) (out []span) {
	j := 0
	for _, s := range a {
		end := s.first + s.count
		for j < len(b) && b[j].first+b[j].count <= s.first {
			j++
		}
		for k := j; k < len(b) && b[k].first < end; k++ {
			if b[k].first > s.first {
				out = append(out, span{first: s.first, count: b[k].first - s.first, zero: s.zero})
			}
			s.first = max(s.first, b[k].first+b[k].count)
		}
		if s.first < end {
			out = append(out, span{first: s.first, count: end - s.first, zero: s.zero})
		}
	}
	return out
}

// ingest carries out a plan. There are more workers than processors because a worker also waits for the medium.
func (d *DiskWriter) ingest(ctx context.Context, src image.Image, spans []span, progress dr.Progress) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var total int64
	for _, s := range spans {
		total += d.bytes(s)
	}
	var done atomic.Int64
	report := func(s span) {
		progress.Report("disk "+d.name, done.Add(d.bytes(s)), total, "bytes")
	}
	pieces := make(chan span)
	var wg sync.WaitGroup
	for range 2*runtime.GOMAXPROCS(0) + 1 {
		wg.Go(func() {
			buf := make([]byte, max(readSize, d.geo.block))
			for s := range pieces {
				if ctx.Err() != nil {
					continue
				}
				if err := d.copySpan(ctx, src, s, buf); err != nil {
					cancel(err)
					continue
				}
				report(s)
			}
		})
	}
	per := max(readSize/d.geo.block, 1)
	for _, s := range spans {
		if s.zero {
			if err := d.Zero(ctx, s.first, s.count); err != nil {
				cancel(err)
				break
			}
			report(s)
			continue
		}
		for ; s.count > 0 && ctx.Err() == nil; s.first, s.count = s.first+per, s.count-per {
			pieces <- span{first: s.first, count: min(s.count, per)}
		}
	}
	close(pieces)
	wg.Wait()
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return nil
}

// bytes is how long a span is.
func (d *DiskWriter) bytes(s span) int64 {
	return min((s.first+s.count)*d.geo.block, d.geo.size) - s.first*d.geo.block
}

func (d *DiskWriter) copySpan(ctx context.Context, src image.Image, s span, buf []byte) error {
	off := s.first * d.geo.block
	buf = buf[:d.bytes(s)]
	if n, err := src.ReadAt(buf, off); n < len(buf) {
		if err == nil || errors.Is(err, io.EOF) {
			err = io.ErrUnexpectedEOF
		}
		return fmt.Errorf("read source at byte %d: %w", off+int64(n), err)
	}
	for b := s.first; len(buf) > 0; b++ {
		n := d.geo.blockLen(b)
		if err := d.Write(ctx, b, buf[:n]); err != nil {
			return err
		}
		buf = buf[n:]
	}
	return nil
}
