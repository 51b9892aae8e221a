package store

import (
	"encoding/binary"
	"io"
	"sync"

	"github.com/klauspost/compress/zstd"
	"github.com/kopia/kopia/repo/compression"
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
	out = z.encoder.EncodeAll(in, out)
	b[0], b[1] = in, out
	_, err := output.Write(out)
	return err
}
