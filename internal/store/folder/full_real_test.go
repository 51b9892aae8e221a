package folder_test

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/musterdr/muster/internal/dr"
	"github.com/musterdr/muster/internal/store"
	"github.com/musterdr/muster/internal/store/folder"
	"github.com/musterdr/muster/internal/store/storetest"
)

// A file system that is really full loses nothing, says how full it is, and lets what it holds be forgotten and
// collected to make room.
func TestFullFileSystemCanStillForget(t *testing.T) {
	if os.Getenv("MUSTER_REAL") == "" {
		t.Skip("set MUSTER_REAL=1 to fill a file system of its own")
	}
	mount := t.TempDir()
	if err := unix.Mount("tmpfs", mount, "tmpfs", 0, "size=48m"); err != nil {
		t.Skipf("mount a small file system: %v", err)
	}
	t.Cleanup(func() { _ = unix.Unmount(mount, unix.MNT_DETACH) })
	drv := folder.Driver{Path: filepath.Join(mount, "store")}
	if err := store.Create(t.Context(), drv, "secret"); err != nil {
		t.Fatal(err)
	}
	s, err := store.Open(t.Context(), drv, "secret")
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close(context.Background()) //nolint:errcheck // the place goes with the test
	keep := func(id string, size int64, seed uint64) ([]byte, error) {
		d := storetest.NewDisk(size, seed)
		storetest.Noise(d.Data, seed)
		w, err := s.Begin(t.Context(), id, "")
		if err != nil {
			return nil, err
		}
		defer w.Abort(t.Context()) //nolint:errcheck // never fails
		dw, err := w.Disk(t.Context(), "sda", d.Size(), 0)
		if err != nil {
			return nil, err
		}
		if err := dw.Ingest(t.Context(), d, nil, nil); err != nil {
			return nil, err
		}
		_, err = w.Commit(t.Context(), dr.Snapshot{ServerID: "srv-1", Server: "shop", Taken: time.Now()})
		return d.Data, err
	}
	data, err := keep("snap-1", 15<<20, 1)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := keep("snap-2", 15<<20, 2); err != nil {
		t.Fatal(err)
	}
	_, err = keep("snap-3", 30<<20, 3)
	if !errors.Is(err, store.ErrNoSpace) || !strings.Contains(err.Error(), drv.Path) || !strings.Contains(err.Error(), "bytes free") {
		t.Fatalf("a full file system says %v", err)
	}
	t.Log(err)
	if _, err := s.Verify(t.Context(), "snap-1", nil); err != nil {
		t.Error(err)
	}
	if err := s.Forget(t.Context(), "snap-2"); err != nil {
		t.Fatal(err)
	}
	r, err := s.Collect(t.Context(), store.CollectOptions{Immediate: true}, nil)
	if err != nil || r.Freed() < 14<<20 {
		t.Fatalf("collected %+v, %v", r, err)
	}
	if _, err := keep("snap-4", 10<<20, 4); err != nil {
		t.Fatal(err)
	}
	m, err := s.Image(t.Context(), "snap-1", 0)
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close() //nolint:errcheck // only read
	got := make([]byte, m.Size())
	if _, err := m.ReadAt(got, 0); err != nil || !bytes.Equal(got, data) {
		t.Errorf("snap-1 differs: %v", err)
	}
}
