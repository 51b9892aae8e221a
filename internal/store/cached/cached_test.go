package cached_test

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/kopia/kopia/repo/blob"

	"github.com/musterdr/muster/internal/dr"
	"github.com/musterdr/muster/internal/store"
	"github.com/musterdr/muster/internal/store/cached"
	"github.com/musterdr/muster/internal/store/folder"
	"github.com/musterdr/muster/internal/store/storetest"
)

// counted is a driver that counts reads of packs.
type counted struct {
	store.Driver
	reads *atomic.Int64
}

type countedPlace struct {
	store.Place
	reads *atomic.Int64
}

func (c counted) Create(ctx context.Context) (store.Place, error) {
	p, err := c.Driver.Create(ctx)
	return countedPlace{p, c.reads}, err
}

func (c counted) Open(ctx context.Context) (store.Place, error) {
	p, err := c.Driver.Open(ctx)
	return countedPlace{p, c.reads}, err
}

func (c countedPlace) GetBlob(ctx context.Context, id blob.ID, offset, length int64, out blob.OutputBuffer) error {
	if id[0] == 'p' {
		c.reads.Add(1)
	}
	return c.Place.GetBlob(ctx, id, offset, length, out)
}

const password = "correct horse"

type far struct {
	drv   cached.Driver
	reads *atomic.Int64
	disk  *storetest.Disk
}

// newFar makes a store with a snapshot.
func newFar(t *testing.T, size, limit int64) *far {
	t.Helper()
	reads := &atomic.Int64{}
	f := &far{reads: reads, disk: storetest.NewDisk(size, 1), drv: cached.Driver{Driver: counted{folder.Driver{Path: filepath.Join(t.TempDir(), "store")}, reads},
		Dir: filepath.Join(t.TempDir(), "cache"), Limit: limit}}
	storetest.Noise(f.disk.Data, 2)
	if err := store.Create(t.Context(), f.drv, password); err != nil {
		t.Fatal(err)
	}
	f.with(t, func(s *store.Store) {
		w, err := s.Begin(t.Context(), "snap-1", "")
		if err != nil {
			t.Fatal(err)
		}
		d, err := w.Disk(t.Context(), "sda", size, 0)
		if err != nil {
			t.Fatal(err)
		}
		if err := d.Ingest(t.Context(), f.disk, nil, nil); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Commit(t.Context(), dr.Snapshot{ServerID: "srv-1", Server: "shop", Taken: time.Now()}); err != nil {
			t.Fatal(err)
		}
	})
	return f
}

// with opens the store, as a new process would.
func (f *far) with(t *testing.T, use func(s *store.Store)) {
	t.Helper()
	s, err := store.Open(t.Context(), f.drv, password)
	if err != nil {
		t.Fatal(err)
	}
	s.SetCache(0) // in memory
	f.reads.Store(0)
	use(s)
	if err := s.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
}

// read reads the whole disk and says how often the place was read.
func (f *far) read(t *testing.T) (reads int64) {
	t.Helper()
	f.with(t, func(s *store.Store) {
		m, err := s.Image(t.Context(), "snap-1", 0)
		if err != nil {
			t.Fatal(err)
		}
		defer m.Close()
		got := make([]byte, m.Size())
		for off := int64(0); off < m.Size(); off += 1 << 20 {
			if _, err := m.ReadAt(got[off:min(off+1<<20, m.Size())], off); err != nil {
				t.Fatal(err)
			}
		}
		if !bytes.Equal(got, f.disk.Data) {
			t.Error("the disk differs")
		}
		reads = f.reads.Load()
	})
	return reads
}

func (f *far) files(t *testing.T) (paths []string, total int64) {
	t.Helper()
	filepath.WalkDir(f.drv.Dir, func(path string, e fs.DirEntry, err error) error {
		if err != nil {
			t.Fatal(err)
		}
		if info, err := e.Info(); err == nil && !e.IsDir() {
			paths = append(paths, path)
			total += info.Size()
		}
		return nil
	})
	return paths, total
}

func TestWhatWasReadIsThereAfterARestart(t *testing.T) {
	f := newFar(t, 4<<20, 64<<20)
	if n := f.read(t); n < 32 {
		t.Fatalf("the first time the place is read %d times", n)
	}
	if n := f.read(t); n != 0 {
		t.Errorf("the second time the place is read %d times", n)
	}
}

func TestADamagedEntryIsReadAgain(t *testing.T) {
	f := newFar(t, 4<<20, 64<<20)
	f.read(t)
	paths, _ := f.files(t)
	hurt := int64(0)
	for i, path := range paths {
		if !strings.Contains(filepath.Base(filepath.Dir(path)), "p") || filepath.Base(filepath.Dir(path))[0] != 'p' {
			continue
		}
		raw, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		switch i % 4 {
		case 0:
			raw[len(raw)/2] ^= 1
		case 1:
			raw = raw[:len(raw)-1]
		case 2:
			raw = nil
		case 3:
			continue
		}
		hurt++
		if err := os.WriteFile(path, raw, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if hurt < 10 {
		t.Fatalf("%d of %d entries were hurt", hurt, len(paths))
	}
	if n := f.read(t); n < hurt || n > hurt+2 { // two may want the same at once
		t.Errorf("%d entries were hurt, the place was read %d times", hurt, n)
	}
	if n := f.read(t); n != 0 {
		t.Errorf("afterwards it was read %d times", n)
	}
}

func TestVerifyingReadsThePlaceItself(t *testing.T) {
	f := newFar(t, 2<<20, 64<<20)
	f.read(t)
	p, err := f.drv.Driver.Open(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close(t.Context())
	packs, err := storetest.Packs(t.Context(), p)
	if err != nil {
		t.Fatal(err)
	}
	largest := slices.MaxFunc(packs, func(a, b blob.Metadata) int { return cmp.Compare(a.Length, b.Length) })
	if err := storetest.FlipByte(t.Context(), p, largest.BlobID, largest.Length/2); err != nil {
		t.Fatal(err)
	}
	if n := f.read(t); n != 0 {
		t.Fatalf("the cache was not used: %d", n)
	}
	f.with(t, func(s *store.Store) {
		if r, err := s.Verify(t.Context(), "snap-1", nil); err == nil {
			t.Errorf("damage behind the cache was not found: %+v", r)
		}
	})
}

func TestACacheThatCannotBeWrittenOnlyCostsTime(t *testing.T) {
	f := newFar(t, 2<<20, 64<<20)
	if err := os.RemoveAll(f.drv.Dir); err != nil {
		t.Fatal(err)
	}
	f.with(t, func(s *store.Store) { // the folder goes away under it
		gone := errors.New("it is there") // somebody may be writing into it just now, and make it anew
		for end := time.Now().Add(10 * time.Second); gone != nil; {
			if gone = os.RemoveAll(f.drv.Dir); gone == nil {
				gone = os.WriteFile(f.drv.Dir, nil, 0o600)
			}
			if gone != nil && time.Now().After(end) {
				t.Fatal(gone)
			}
		}
		m, err := s.Image(t.Context(), "snap-1", 0)
		if err != nil {
			t.Fatal(err)
		}
		defer m.Close()
		got := make([]byte, m.Size())
		if _, err := m.ReadAt(got, 0); err != nil || !bytes.Equal(got, f.disk.Data) {
			t.Errorf("read: %v", err)
		}
	})
}
