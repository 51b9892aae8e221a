package disk

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/musterdr/muster/internal/api"
	"github.com/musterdr/muster/internal/capture"
	"github.com/musterdr/muster/internal/capture/capturetest"
	"github.com/musterdr/muster/internal/dr"
	"github.com/musterdr/muster/internal/store"
	"github.com/musterdr/muster/internal/store/folder"
)

// shared is one store for all tests: making one costs more than a capture.
var shared *store.Store

func TestMain(m *testing.M) { os.Exit(run(m)) }

func run(m *testing.M) int {
	ctx := context.Background()
	dir, err := os.MkdirTemp("", "muster")
	if err != nil {
		panic(err)
	}
	defer os.RemoveAll(dir)
	place := folder.Driver{Path: filepath.Join(dir, "store")}
	if err := store.Create(ctx, place, "password"); err != nil {
		panic(err)
	}
	if shared, err = store.Open(ctx, place, "password"); err != nil {
		panic(err)
	}
	defer shared.Close(ctx)
	return m.Run()
}

func bench(t *testing.T) *capturetest.Bench { return benchIn(t, t.TempDir()) }

func benchIn(t *testing.T, dir string) *capturetest.Bench {
	b := &capturetest.Bench{Store: shared}
	for i, name := range []string{"system.img", "data/system.img"} {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			t.Fatal(err)
		}
		capturetest.Fill(t, path, uint64(i))
		b.Disks = append(b.Disks, path)
	}
	b.Open = func(t *testing.T) capture.Source {
		src, err := Open(b.Disks)
		if err != nil {
			t.Fatal(err)
		}
		return src
	}
	return b
}

func TestSource(t *testing.T) { capturetest.Run(t, bench) }

func take(ctx context.Context, b *capturetest.Bench, id string, report dr.Progress, paths ...string) (dr.Snapshot, error) {
	src, err := Open(paths)
	if err != nil {
		return dr.Snapshot{}, err
	}
	return capture.Take(ctx, src, b.Store, api.SnapshotTask{ID: id, Server: dr.Server{ID: "srv-1", Name: "web"}}, report)
}

func TestADiskThatIsWrittenToWhileItIsReadIsNotKept(t *testing.T) {
	b := bench(t)
	if f, err := clone(b.Disks[0]); err == nil {
		f.Close()
		t.Skip("the file system of temporary files clones: there such a disk is kept as it was")
	}
	var write sync.Once
	_, err := take(t.Context(), b, "snap-1", func(string, int64, int64, string) {
		write.Do(func() {
			f, _ := os.OpenFile(b.Disks[0], os.O_WRONLY, 0)
			_, _ = f.WriteAt([]byte("late"), 100)
			f.Close()
		})
	}, b.Disks...)
	if !errors.Is(err, ErrChanged) {
		t.Errorf("%v, want ErrChanged", err)
	}
	if _, err := b.Store.Snapshot(t.Context(), "snap-1"); err == nil {
		t.Error("there is a snapshot")
	}
}

func TestTwoFilesOfOneNameAreTwoDisks(t *testing.T) {
	b := bench(t)
	snap, err := take(t.Context(), b, dr.NewID("snap"), nil, b.Disks...)
	if err != nil || snap.Disks[0].Name != "system.img" || snap.Disks[1].Name != "system.img-2" {
		t.Errorf("disks %+v, %v", snap.Disks, err)
	}
}

func TestWhatIsNoDiskIsRefusedByName(t *testing.T) {
	b := bench(t)
	missing := filepath.Join(t.TempDir(), "missing.img")
	if _, err := take(t.Context(), b, dr.NewID("snap"), nil, missing); err == nil || !strings.Contains(err.Error(), missing) {
		t.Errorf("a missing file: %v", err)
	}
	if _, err := take(t.Context(), b, dr.NewID("snap"), nil, t.TempDir()); err == nil {
		t.Error("a folder was captured")
	}
	if _, err := Open(nil); err == nil {
		t.Error("a server without disks was opened")
	}
}
