package store

import (
	"context"
	"math/rand/v2"
	"sync/atomic"
	"testing"

	"github.com/kopia/kopia/repo/blob"

	"github.com/musterdr/muster/internal/dr"
)

// counting is a driver whose place counts the bytes that are read.
type counting struct {
	plainDriver
	read *atomic.Int64
}

func (d counting) Create(ctx context.Context) (Place, error) { return d.Open(ctx) }
func (d counting) Open(ctx context.Context) (Place, error) {
	p, err := d.plainDriver.Open(ctx)
	return countingPlace{p, d.read}, err
}

type countingPlace struct {
	Place
	read *atomic.Int64
}

func (p countingPlace) GetBlob(ctx context.Context, id blob.ID, offset, length int64, out blob.OutputBuffer) error {
	err := p.Place.GetBlob(ctx, id, offset, length, out)
	p.read.Add(int64(out.Length()))
	return err
}

// A pack of many blocks has an index that is longer than what Kopia looks for at its end.
func TestAPackIsNotReadWholeForItsIndex(t *testing.T) {
	ctx := t.Context()
	drv := counting{plainDriver(t.TempDir()), new(atomic.Int64)}
	if err := Create(ctx, drv, "correct horse"); err != nil {
		t.Fatal(err)
	}
	s, err := Open(ctx, drv, "correct horse")
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close(context.Background()) //nolint:errcheck // a test's
	const blocks = 768
	w, err := s.Begin(ctx, "snap-1", "")
	if err != nil {
		t.Fatal(err)
	}
	d, err := w.Disk(ctx, "sda", blocks*MinBlockSize, MinBlockSize)
	if err != nil {
		t.Fatal(err)
	}
	noise, block := rand.NewChaCha8([32]byte{1}), make([]byte, MinBlockSize)
	for i := range int64(blocks) {
		_, _ = noise.Read(block)
		if err := d.Write(ctx, i, block); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := w.Commit(ctx, dr.Snapshot{ID: "snap-1"}); err != nil {
		t.Fatal(err)
	}
	var largest blob.Metadata
	if err := s.place.ListBlobs(ctx, "p", func(m blob.Metadata) error {
		if m.Length > largest.Length {
			largest = m
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	drv.read.Store(0)
	total, err := s.packed(ctx, largest.BlobID)
	if err != nil || total < blocks*MinBlockSize || total > largest.Length {
		t.Errorf("%d bytes of contents in a pack of %d: %v", total, largest.Length, err)
	}
	if got := drv.read.Load(); got > packEnd || got > largest.Length/2 {
		t.Errorf("%d bytes were read of a pack of %d", got, largest.Length)
	}
}
