package store_test

import (
	"bytes"
	"context"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/musterdr/muster/internal/dr"
	"github.com/musterdr/muster/internal/image"
	"github.com/musterdr/muster/internal/store"
	"github.com/musterdr/muster/internal/store/folder"
)

// file is a disk image in a file that counts what is read from it.
type file struct {
	*os.File
	size int64
	read atomic.Int64
}

func openFile(t *testing.T, path string) *file {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = f.Close() })
	info, err := f.Stat()
	if err != nil {
		t.Fatal(err)
	}
	return &file{File: f, size: info.Size()}
}

func (f *file) Size() int64 { return f.size }

func (f *file) ReadAt(p []byte, off int64) (int, error) {
	n, err := f.File.ReadAt(p, off)
	f.read.Add(int64(n))
	return n, err
}

func (f *file) Extents(_ context.Context, off, length int64, yield func(image.Extent) bool) error {
	yield(image.Extent{Offset: off, Length: length})
	return nil
}

// realDisk makes a file system of 1 GiB with the programs of this machine in it.
func realDisk(t *testing.T) string {
	t.Helper()
	if os.Getenv("MUSTER_REAL") == "" {
		t.Skip("set MUSTER_REAL=1 to measure against zstd")
	}
	for _, tool := range []string{"mke2fs", "zstd"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Skipf("needs %s", tool)
		}
	}
	dir := t.TempDir()
	tree := filepath.Join(dir, "tree")
	if err := os.Mkdir(tree, 0o700); err != nil {
		t.Fatal(err)
	}
	var size int64
	err := filepath.Walk("/usr", func(path string, info os.FileInfo, err error) error {
		if err != nil || size > 850<<20 || strings.HasPrefix(path, "/usr/local/go") {
			return filepath.SkipAll
		}
		if !info.Mode().IsRegular() || info.Size() > 100<<20 {
			return nil
		}
		size += (info.Size() + 4095) &^ 4095
		to := filepath.Join(tree, path)
		if err := os.MkdirAll(filepath.Dir(to), 0o700); err != nil {
			return err
		}
		return os.Link(path, to)
	})
	if err != nil {
		t.Skipf("link the programs of this machine: %v", err)
	}
	disk := filepath.Join(dir, "disk")
	run(t, nil, "mke2fs", "-q", "-t", "ext4", "-d", tree, disk, "1g")
	return disk
}

func run(t *testing.T, env []string, name string, args ...string) string {
	t.Helper()
	cmd := exec.Command(name, args...)
	cmd.Env = append(os.Environ(), env...)
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return string(out)
}

func newStore(t *testing.T, path string) *store.Store {
	t.Helper()
	drv := folder.Driver{Path: path}
	if err := store.Create(t.Context(), drv, "secret"); err != nil {
		t.Fatal(err)
	}
	return openStore(t, path)
}

func openStore(t *testing.T, path string) *store.Store {
	t.Helper()
	s, err := store.Open(t.Context(), folder.Driver{Path: path}, "secret")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close(context.Background()) })
	return s
}

func ingest(t *testing.T, s *store.Store, id, parent string, src image.Image, extents []image.Extent) dr.Snapshot {
	t.Helper()
	w, err := s.Begin(t.Context(), id, parent)
	if err != nil {
		t.Fatal(err)
	}
	d, err := w.Disk(t.Context(), "sda", src.Size(), 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := d.Ingest(t.Context(), src, extents, nil); err != nil {
		t.Fatal(err)
	}
	snap, err := w.Commit(t.Context(), dr.Snapshot{ServerID: "srv-1", Server: "shop", Taken: time.Now()})
	if err != nil {
		t.Fatal(err)
	}
	return snap
}

const mega = 1e6

func TestIncrementReadsAndStoresOnlyWhatChanged(t *testing.T) {
	disk := realDisk(t)
	dir := t.TempDir()
	s := newStore(t, filepath.Join(dir, "muster"))
	src := openFile(t, disk)
	ingest(t, s, "snap-1", "", src, nil)

	// One block in a hundred changes: to the content of another block, a little different, so that it compresses as
	// real data does.
	f, err := os.OpenFile(disk, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close() //nolint:errcheck // a test
	const block = store.DefaultBlockSize
	var extents []image.Extent
	var changed bytes.Buffer
	r := rand.New(rand.NewPCG(1, 2))
	for b := int64(7); b < src.size/block; b += 100 {
		buf := make([]byte, block)
		if _, err := f.ReadAt(buf, r.Int64N(800<<20)/block*block); err != nil {
			t.Fatal(err)
		}
		for i := 0; i < block; i += 4096 {
			buf[i] ^= byte(b + 1)
		}
		if _, err := f.WriteAt(buf, b*block); err != nil {
			t.Fatal(err)
		}
		changed.Write(buf)
		extents = append(extents, image.Extent{Offset: b*block + 100, Length: block / 2})
	}
	cmd := exec.Command("zstd", "-1", "-c")
	cmd.Stdin = bytes.NewReader(changed.Bytes())
	packed, err := cmd.Output()
	if err != nil {
		t.Fatal(err)
	}
	src.read.Store(0)
	before, err := s.Usage(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	snap := ingest(t, s, "snap-2", "snap-1", src, extents)
	after, err := s.Usage(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	readRatio := float64(src.read.Load()) / float64(changed.Len())
	storeRatio := float64(after.Bytes-before.Bytes) / float64(len(packed))
	t.Logf("increment: %d bytes changed, %d read (%.3f), store grew %d, stats say %d, zstd -1 %d (%.3f)",
		changed.Len(), src.read.Load(), readRatio, after.Bytes-before.Bytes, snap.Stats.Stored, len(packed), storeRatio)
	if readRatio > 1.05 {
		t.Errorf("the increment read %.3f times what changed", readRatio)
	}
	if storeRatio > 1.10 {
		t.Errorf("the increment stored %.3f times what zstd -1 makes of it", storeRatio)
	}
	start := time.Now()
	report, err := s.Verify(t.Context(), "snap-2", nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("verify: %.0f MB/s", float64(report.Bytes)/mega/time.Since(start).Seconds())
}
