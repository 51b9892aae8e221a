package storetest

import (
	"bytes"
	"context"
	"io"

	"github.com/kopia/kopia/repo/blob"

	"github.com/musterdr/muster/internal/store"
)

// FlipByte changes one byte of a blob on the medium.
func FlipByte(ctx context.Context, p store.Place, id blob.ID, at int64) error {
	data, err := ReadBlob(ctx, p, id)
	if err != nil {
		return err
	}
	data[at] ^= 0x10
	if err := p.DeleteBlob(ctx, id); err != nil { // a place may refuse to overwrite
		return err
	}
	return p.PutBlob(ctx, id, memory(data), blob.PutOptions{})
}

// ReadBlob reads a blob.
func ReadBlob(ctx context.Context, p store.Place, id blob.ID) ([]byte, error) {
	var out output
	err := p.GetBlob(ctx, id, 0, -1, &out)
	return out.Bytes(), err
}

// Packs lists the blobs that hold blocks.
func Packs(ctx context.Context, p store.Place) ([]blob.Metadata, error) {
	return blob.ListAllBlobs(ctx, p, "p")
}

type output struct{ bytes.Buffer }

func (o *output) Length() int { return o.Len() }

// memory is a blob in memory.
type memory []byte

func (m memory) Length() int { return len(m) }

func (m memory) WriteTo(w io.Writer) (int64, error) {
	n, err := w.Write(m)
	return int64(n), err
}

func (m memory) Reader() io.ReadSeekCloser { return closer{bytes.NewReader(m)} }

type closer struct{ *bytes.Reader }

func (closer) Close() error { return nil }
