package store

import (
	"context"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/kopia/kopia/repo/blob"
	"github.com/kopia/kopia/repo/blob/filesystem"
)

// openCopy opens a copy of the fixture through a driver that knows no more than these tests need.
func openCopy(t *testing.T) *Store {
	t.Helper()
	path := filepath.Join(t.TempDir(), "store")
	if err := os.CopyFS(path, os.DirFS("testdata/store-1")); err != nil {
		t.Fatal(err)
	}
	s, err := Open(t.Context(), plainDriver(path), "a fixture")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close(context.Background()) })
	return s
}

type plainDriver string

func (d plainDriver) String() string                            { return string(d) }
func (d plainDriver) Create(ctx context.Context) (Place, error) { return d.Open(ctx) }
func (d plainDriver) Open(ctx context.Context) (Place, error) {
	st, err := filesystem.New(ctx, &filesystem.Options{Path: string(d)}, false)
	return plainPlace{st}, err
}

type plainPlace struct{ blob.Storage }

func (plainPlace) Sync(context.Context) error                 { return nil }
func (plainPlace) Evict(context.Context, blob.ID)             {}
func (plainPlace) Sweep(context.Context, time.Duration) error { return nil }
func (plainPlace) TryLock(string, bool) (func(), bool, error) { return func() {}, true, nil }
