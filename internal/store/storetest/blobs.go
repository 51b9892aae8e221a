package storetest

import (
	"context"

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
	return p.PutBlob(ctx, id, store.Bytes(data), blob.PutOptions{})
}

// ReadBlob reads a blob.
func ReadBlob(ctx context.Context, p store.Place, id blob.ID) ([]byte, error) {
	var out store.Buffer
	err := p.GetBlob(ctx, id, 0, -1, &out)
	return out.Bytes(), err
}

// Packs lists the blobs that hold blocks.
func Packs(ctx context.Context, p store.Place) ([]blob.Metadata, error) {
	return blob.ListAllBlobs(ctx, p, "p")
}
