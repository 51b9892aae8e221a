package store

import (
	"bytes"
	"encoding/json"
	"fmt"
	"strconv"

	"github.com/kopia/kopia/repo/content"
	"github.com/kopia/kopia/repo/object"
)

// The map of a disk: its root lists segments, a segment lists blocks. Both have the form of Kopia's indirect objects:
//
//	{"stream":"kopia:indirect","entries":[{"s":START,"l":LENGTH,"o":"OBJECT"},…]}
//
// Entries follow one another without a gap, each as long as a block (or segment), the last one possibly shorter.

const mapStream = "kopia:indirect"

// mapEntryMax bounds the bytes of one entry; mapFixed those around them.
const (
	mapEntryMax = 256
	mapFixed    = 1 << 10
)

// geometry is how a disk is cut up.
type geometry struct {
	size  int64 // of the disk
	block int64
}

func newGeometry(size int64, block int) (geometry, error) {
	switch {
	case size <= 0:
		return geometry{}, fmt.Errorf("a disk of %d bytes holds nothing to keep", size)
	case size > MaxDiskSize:
		return geometry{}, fmt.Errorf("a disk of %d bytes is larger than %d", size, int64(MaxDiskSize))
	case block < MinBlockSize || block > MaxBlockSize || block&(block-1) != 0:
		return geometry{}, fmt.Errorf("block size %d is not a power of two from %d to %d", block, MinBlockSize, MaxBlockSize)
	}
	return geometry{size: size, block: int64(block)}, nil
}

func ceilDiv(a, b int64) int64 { return (a + b - 1) / b }

func (g geometry) blocks() int64   { return ceilDiv(g.size, g.block) }
func (g geometry) segments() int64 { return ceilDiv(g.size, SegmentSize) }
func (g geometry) perSegment() int64 {
	return SegmentSize / g.block
}

// blockLen is the length of a block; only the last may be short.
func (g geometry) blockLen(i int64) int64 { return min(g.block, g.size-i*g.block) }

// segmentLen is the length of a segment; only the last may be short.
func (g geometry) segmentLen(i int64) int64 { return min(SegmentSize, g.size-i*SegmentSize) }

// segmentBlocks is the number of blocks in a segment.
func (g geometry) segmentBlocks(i int64) int { return int(ceilDiv(g.segmentLen(i), g.block)) }

// encodeMap writes a map node over pieces of the given unit that together are total long.
func encodeMap(ids []object.ID, unit, total int64) []byte {
	b := make([]byte, 0, mapFixed+len(ids)*128)
	b = append(b, `{"stream":"`+mapStream+`","entries":[`...)
	for i, id := range ids {
		if i > 0 {
			b = append(b, ',')
		}
		start := int64(i) * unit
		b = append(b, '{')
		if start > 0 { // as Kopia does, so that equal maps are equal bytes
			b = append(b, `"s":`...)
			b = strconv.AppendInt(b, start, 10)
			b = append(b, ',')
		}
		b = append(b, `"l":`...)
		b = strconv.AppendInt(b, min(unit, total-start), 10)
		b = append(b, `,"o":"`...)
		b = id.Append(b)
		b = append(b, `"}`...)
	}
	return append(b, "]}\n"...)
}

// decodeMap reads a map node and requires it to be exactly what encodeMap writes for that unit and total.
func decodeMap(data []byte, unit, total int64) ([]object.ID, error) {
	if unit <= 0 || total <= 0 || total > MaxDiskSize {
		return nil, fmt.Errorf("a map of %d bytes in pieces of %d", total, unit)
	}
	count := ceilDiv(total, unit)
	if int64(len(data)) > mapFixed+count*mapEntryMax {
		return nil, fmt.Errorf("the map of %d entries has %d bytes", count, len(data))
	}
	var node struct {
		Stream  string `json:"stream"`
		Entries []struct {
			Start  int64  `json:"s"`
			Length int64  `json:"l"`
			Object string `json:"o"`
		} `json:"entries"`
	}
	d := json.NewDecoder(bytes.NewReader(data))
	d.DisallowUnknownFields()
	if err := d.Decode(&node); err != nil {
		return nil, err
	}
	if node.Stream != mapStream {
		return nil, fmt.Errorf("the stream is %.40q, not %q", node.Stream, mapStream)
	}
	if int64(len(node.Entries)) != count {
		return nil, fmt.Errorf("the map has %d entries, not %d", len(node.Entries), count)
	}
	ids := make([]object.ID, count)
	for i, e := range node.Entries {
		start := int64(i) * unit
		if e.Start != start || e.Length != min(unit, total-start) {
			return nil, fmt.Errorf("entry %d covers %d bytes at %d, not %d at %d", i, e.Length, e.Start, min(unit, total-start), start)
		}
		id, err := object.ParseID(e.Object)
		if err != nil || e.Object == "" {
			return nil, fmt.Errorf("entry %d names %.80q, which is no object", i, e.Object)
		}
		ids[i] = id
	}
	return ids, nil
}

// zeros names the objects that stand for nothing but zeros in one disk's map. A field is empty if there is none.
type zeros struct {
	Block   string `json:"block,omitempty"`        // a whole block
	Tail    string `json:"tail,omitempty"`         // the short last block
	Segment string `json:"segment,omitempty"`      // a whole segment
	Last    string `json:"last_segment,omitempty"` // the short last segment
}

// directContent is the content of an object that is exactly one: what every block must be.
func directContent(id object.ID) (content.ID, error) {
	cid, compressed, ok := id.ContentID()
	if !ok || compressed {
		return content.EmptyID, fmt.Errorf("object %s is not a plain block", id)
	}
	return cid, nil
}

// indirect makes the object whose pieces a map node lists from the object that node is.
func indirect(node object.ID) (object.ID, error) {
	return object.ParseID("I" + node.String())
}

// blocksOf turns the entries of a segment into blocks; a block of zeros becomes the empty identifier.
func blocksOf(ids []object.ID, z zeros) ([]content.ID, error) {
	out := make([]content.ID, len(ids))
	for i, id := range ids {
		cid, err := directContent(id)
		if err != nil {
			return nil, fmt.Errorf("entry %d: %w", i, err)
		}
		if s := cid.String(); s == z.Block || s == z.Tail {
			continue
		}
		out[i] = cid
	}
	return out, nil
}

func allZero(ids []content.ID) bool {
	for _, id := range ids {
		if id != content.EmptyID {
			return false
		}
	}
	return true
}
