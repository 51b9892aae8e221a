package store

import (
	"bytes"
	"encoding/binary"
	"io"
	"slices"
	"sync"

	"github.com/klauspost/compress/zstd"
	"github.com/kopia/kopia/repo/compression"
	"github.com/zeebo/xxh3"
)

// Kopia compresses every block through a stream, with goroutines and a window of its own for each; blocks as small as
// ours spend more time in that than in compressing. zstdBlock writes the same format, a header and a zstd frame that
// any kopia reads, in one call. It leaves out the frame's checksum: the seal around it is one already. Decompression
// stays Kopia's.
type zstdBlock struct {
	compression.Compressor
	encoder *zstd.Encoder
	buffers sync.Pool
}

func init() {
	for name, level := range map[compression.Name]zstd.EncoderLevel{
		compressorFast:  zstd.SpeedFastest,
		compressorSmall: zstd.SpeedDefault,
	} {
		c := compression.ByName[name]
		e, err := zstd.NewWriter(nil, zstd.WithEncoderLevel(level), zstd.WithWindowSize(MaxBlockSize), zstd.WithEncoderCRC(false))
		if err != nil {
			panic("store: zstd: " + err.Error())
		}
		z := &zstdBlock{Compressor: c, encoder: e, buffers: sync.Pool{New: func() any { return new([2][]byte) }}}
		compression.ByName[name] = z
		compression.ByHeaderID[c.HeaderID()] = z
	}
}

func (z *zstdBlock) Compress(output io.Writer, input io.Reader) error {
	b := z.buffers.Get().(*[2][]byte)
	defer z.buffers.Put(b)
	in := b[0][:0]
	for {
		if len(in) == cap(in) {
			in = append(in, make([]byte, max(64<<10, len(in)))...)[:len(in)]
		}
		n, err := input.Read(in[len(in):cap(in)])
		in = in[:len(in)+n]
		if err == io.EOF {
			break
		}
		if err != nil {
			return err
		}
	}
	out := binary.BigEndian.AppendUint32(b[1][:0], uint32(z.HeaderID()))
	header := len(out)
	if out = packed.appendFrame(out, in); len(out) == header {
		out = z.encoder.EncodeAll(in, out)
	}
	b[0], b[1] = in, out
	_, err := output.Write(out)
	return err
}

// packed are the blocks that are just being written and came compressed. Kopia gives a compressor nothing but the content,
// and so they are found by it: by a hash first, and then by every byte, since a block that is stored under another's
// frame would be lost.
var packed = packedBlocks{blocks: map[uint64][]packedBlock{}}

type packedBlocks struct {
	mu     sync.RWMutex
	blocks map[uint64][]packedBlock
}

type packedBlock struct{ plain, frame []byte }

// during has a block written in its compressed form while do runs. Both belong to the caller again afterwards.
func (p *packedBlocks) during(plain, frame []byte, do func() error) error {
	key, block := xxh3.Hash(plain), packedBlock{plain, frame}
	p.mu.Lock()
	p.blocks[key] = append(p.blocks[key], block)
	p.mu.Unlock()
	defer func() {
		p.mu.Lock()
		defer p.mu.Unlock()
		p.blocks[key] = slices.DeleteFunc(p.blocks[key], func(b packedBlock) bool { return &b.frame[0] == &frame[0] })
		if len(p.blocks[key]) == 0 {
			delete(p.blocks, key)
		}
	}()
	return do()
}

// appendFrame appends the compressed form of a block, or nothing if it did not come with one.
func (p *packedBlocks) appendFrame(out, plain []byte) []byte {
	p.mu.RLock()
	defer p.mu.RUnlock()
	if len(p.blocks) == 0 {
		return out
	}
	for _, b := range p.blocks[xxh3.Hash(plain)] {
		if bytes.Equal(b.plain, plain) {
			return append(out, b.frame...)
		}
	}
	return out
}

// storable says whether a frame may be stored as it came: one that every reader unpacks without more memory than a block.
func storable(frame []byte, length int) bool {
	var h zstd.Header
	return h.Decode(frame) == nil && !h.Skippable && h.DictionaryID == 0 && h.HasFCS && h.FrameContentSize == uint64(length) &&
		(h.SingleSegment || h.WindowSize <= MaxBlockSize) && len(frame) < length
}
