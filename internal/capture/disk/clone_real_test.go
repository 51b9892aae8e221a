package disk

import (
	"bytes"
	"encoding/binary"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/musterdr/muster/internal/capture/capturetest"
	"github.com/musterdr/muster/internal/dr"
)

func command(t *testing.T, name string, args ...string) {
	t.Helper()
	if out, err := exec.Command(name, args...).CombinedOutput(); err != nil {
		t.Fatalf("%s %v: %v\n%s", name, args, err, out)
	}
}

// cloning gives a folder on a file system that clones files.
func cloning(t *testing.T, fstype string) string {
	t.Helper()
	if os.Getenv("MUSTER_REAL") == "" {
		t.Skip("needs root and loop devices: set MUSTER_REAL=1")
	}
	dir := t.TempDir()
	file, mount := filepath.Join(dir, "volume"), filepath.Join(dir, "mnt")
	if err := errors.Join(os.WriteFile(file, nil, 0o600), os.Truncate(file, 400<<20), os.Mkdir(mount, 0o755)); err != nil {
		t.Fatal(err)
	}
	command(t, "mkfs."+fstype, "-q", file)
	command(t, "mount", "-o", "loop", file, mount)
	t.Cleanup(func() { command(t, "umount", mount) })
	return mount
}

func TestRealClonesKeepThePromisesOfASource(t *testing.T) {
	for _, fstype := range []string{"btrfs", "xfs"} {
		t.Run(fstype, func(t *testing.T) {
			dir := cloning(t, fstype)
			capturetest.Run(t, func(t *testing.T) *capturetest.Bench { return benchIn(t, filepath.Join(dir, filepath.Base(t.Name()))) })
		})
	}
}

// counting writes a number to some places, one after the other, as fast as it can, until it is stopped.
func counting(t *testing.T, places ...func(number []byte) error) (stop func()) {
	t.Helper()
	done, begun := make(chan struct{}), make(chan struct{})
	var work sync.WaitGroup
	work.Go(func() {
		var number [8]byte
		for n := uint64(1); ; n++ {
			binary.BigEndian.PutUint64(number[:], n)
			for _, put := range places {
				if err := put(number[:]); err != nil {
					t.Errorf("write: %v", err)
				}
			}
			if n == 100 {
				close(begun)
			}
			select {
			case <-done:
				return
			default:
			}
		}
	})
	<-begun
	return func() {
		close(done)
		work.Wait()
	}
}

func number(t *testing.T, snap dr.Snapshot, disk int, off int64) uint64 {
	t.Helper()
	img, err := shared.Image(t.Context(), snap.ID, disk)
	if err != nil {
		t.Fatal(err)
	}
	var b [8]byte
	_, err = img.ReadAt(b[:], off)
	if err := errors.Join(err, img.Close()); err != nil {
		t.Fatal(err)
	}
	return binary.BigEndian.Uint64(b[:])
}

func TestRealAFileThatIsWrittenToIsCapturedAtOneInstant(t *testing.T) {
	for _, fstype := range []string{"btrfs", "xfs"} {
		t.Run(fstype, func(t *testing.T) {
			dir := cloning(t, fstype)
			const size = 16 << 20
			var paths []string
			var files []*os.File
			for _, name := range []string{"a.img", "b.img"} {
				path := filepath.Join(dir, name)
				if err := os.WriteFile(path, bytes.Repeat([]byte("content."), size/8), 0o600); err != nil {
					t.Fatal(err)
				}
				f, err := os.OpenFile(path, os.O_RDWR, 0)
				if err != nil {
					t.Fatal(err)
				}
				defer f.Close()
				paths, files = append(paths, path), append(files, f)
			}
			b := &capturetest.Bench{Store: shared}
			at := func(f *os.File, off int64) func([]byte) error {
				return func(number []byte) error {
					_, err := f.WriteAt(number, off)
					return err
				}
			}
			stop := counting(t, at(files[0], 0), at(files[0], size-8))
			for range 10 {
				snap, err := take(t.Context(), b, dr.NewID("snap"), nil, paths[0])
				if err != nil {
					t.Fatal(err)
				}
				if snap.Pass.Provider != dr.ProviderReflink || len(snap.Pass.PassedOver) != 0 || snap.Consistency != dr.CrashConsistent {
					t.Errorf("pass %+v, %s", snap.Pass, snap.Consistency)
				}
				if first, last := number(t, snap, 0, 0), number(t, snap, 0, size-8); first < 100 || first != last && first != last+1 {
					t.Errorf("the image begins with %d and ends with %d", first, last)
				}
			}
			stop()
			// Two files are cloned one after the other: only where nobody wrote in between is that one instant.
			stop = counting(t, at(files[0], 0), at(files[1], 0))
			for range 5 {
				snap, err := take(t.Context(), b, dr.NewID("snap"), nil, paths...)
				if errors.Is(err, ErrChanged) {
					continue
				}
				if err != nil {
					t.Fatal(err)
				}
				if one, two := number(t, snap, 0, 0), number(t, snap, 1, 0); one != two && one != two+1 {
					t.Errorf("one image holds %d and the other %d", one, two)
				}
			}
			stop()
			<-time.After(2 * tick)
			if snap, err := take(t.Context(), b, dr.NewID("snap"), nil, paths...); err != nil || snap.Pass.Provider != dr.ProviderReflink {
				t.Errorf("two files at rest: %+v, %v", snap.Pass, err)
			}
			if left, err := os.ReadDir(dir); err != nil || len(left) != 2 {
				t.Errorf("left beside the images: %v, %v", left, err)
			}
		})
	}
}
