package s3_test

import (
	"errors"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/musterdr/muster/internal/store"
	"github.com/musterdr/muster/internal/store/storetest"
)

// A service whose disk is full says so, loses nothing, and takes more when there is room again.
func TestAServiceWhoseDiskIsFullLosesNothing(t *testing.T) {
	real(t)
	mount := t.TempDir()
	if err := unix.Mount("tmpfs", mount, "tmpfs", 0, "size=40m"); err != nil {
		t.Fatalf("mount a small file system: %v", err)
	}
	t.Cleanup(func() { unix.Unmount(mount, unix.MNT_DETACH) })
	d := start(t, mount).bucket(t, false)
	s := fill(t, d)
	noise := func(size int64, seed uint64) *storetest.Disk {
		disk := storetest.NewDisk(size, seed)
		storetest.Noise(disk.Data, seed)
		return disk
	}
	if err := keep(t.Context(), s, "snap-1", noise(12<<20, 1)); err != nil {
		t.Fatal(err)
	}
	if err := keep(t.Context(), s, "snap-2", noise(12<<20, 2)); err != nil {
		t.Fatal(err)
	}
	err := keep(t.Context(), s, "snap-3", noise(36<<20, 3))
	if !errors.Is(err, store.ErrNoSpace) {
		t.Fatalf("a full service says %v", err)
	}
	t.Log(err)
	if _, err := s.Verify(t.Context(), "snap-1", nil); err != nil {
		t.Error(err)
	}
	if err := s.Forget(t.Context(), "snap-2"); err != nil {
		t.Fatal(err)
	}
	if r, err := s.Collect(t.Context(), store.CollectOptions{Immediate: true}, nil); err != nil || r.Freed() < 10<<20 {
		t.Fatalf("collected %+v, %v", r, err)
	}
	if err := keep(t.Context(), s, "snap-4", noise(8<<20, 4)); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Verify(t.Context(), "snap-4", nil); err != nil {
		t.Error(err)
	}
}
