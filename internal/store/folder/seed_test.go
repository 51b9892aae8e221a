package folder_test

import (
	"bytes"
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/musterdr/muster/internal/dr"
	"github.com/musterdr/muster/internal/store"
	"github.com/musterdr/muster/internal/store/folder"
	"github.com/musterdr/muster/internal/store/storetest"
)

// carried is a near store with a snapshot of 48 MiB, a far one that is like it, and a disk.
func carried(t *testing.T) (near, far *store.Store, farDrv folder.Driver, disk string) {
	t.Helper()
	nearDrv := folder.Driver{Path: filepath.Join(t.TempDir(), "near")}
	farDrv = folder.Driver{Path: filepath.Join(t.TempDir(), "far")}
	open := func(drv folder.Driver) *store.Store {
		s, err := store.Open(t.Context(), drv, "secret")
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = s.Close(context.Background()) })
		return s
	}
	if err := store.Create(t.Context(), nearDrv, "secret"); err != nil {
		t.Fatal(err)
	}
	near = open(nearDrv)
	if err := store.CreateLike(t.Context(), farDrv, "secret", near); err != nil {
		t.Fatal(err)
	}
	d := storetest.NewDisk(48<<20, 1)
	storetest.Noise(d.Data, 1)
	w, err := near.Begin(t.Context(), "snap-1", "")
	if err != nil {
		t.Fatal(err)
	}
	dw, err := w.Disk(t.Context(), "sda", d.Size(), 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := dw.Ingest(t.Context(), d, nil, nil); err != nil {
		t.Fatal(err)
	}
	if _, err := w.Commit(t.Context(), dr.Snapshot{ServerID: "srv-1", Server: "shop", Taken: time.Now()}); err != nil {
		t.Fatal(err)
	}
	return near, open(farDrv), farDrv, t.TempDir()
}

func TestWhatWasCarriedByHandIsNotSent(t *testing.T) {
	t.Parallel()
	near, far, farDrv, disk := carried(t)
	cut, stop := context.WithCancel(t.Context())
	if _, err := near.ExportSeed(cut, disk, []string{"snap-1"}, func(string, int64, int64, string) { stop() }); err == nil {
		t.Fatal("an export that is cut off ends well")
	}
	if _, _, err := store.OpenSeed(disk, ""); err == nil || !strings.Contains(err.Error(), "run the export again") {
		t.Errorf("half a seed is %v", err)
	}
	seed, err := near.ExportSeed(t.Context(), disk, []string{"snap-1"}, nil)
	if err != nil || seed.Packs < 3 || seed.New >= seed.Packs || seed.Bytes < 48<<20 {
		t.Fatalf("seed %+v, %v", seed, err)
	}
	cut, stop = context.WithCancel(t.Context())
	if _, err := store.ImportSeed(cut, farDrv, disk, seed.Digest, func(string, int64, int64, string) { stop() }); err == nil {
		t.Fatal("an import that is cut off ends well")
	}
	in, err := store.ImportSeed(t.Context(), farDrv, disk, seed.Digest, nil)
	if err != nil || in.New >= in.Packs || in.Packs != seed.Packs {
		t.Fatalf("taken in %+v, %v", in, err)
	}
	if in, err = store.ImportSeed(t.Context(), farDrv, disk, seed.Digest, nil); err != nil || in.New != 0 {
		t.Errorf("taken in again %+v, %v", in, err)
	}
	got, err := store.Replicate(t.Context(), near, far, "snap-1", store.ReplicateOptions{}, nil)
	if err != nil || got.Packs != 0 || got.Found == 0 || got.Sent > 1<<20 {
		t.Errorf("replicated %+v, %v: the packs were there", got, err)
	}
	if _, err := far.Verify(t.Context(), "snap-1", nil); err != nil {
		t.Error(err)
	}
	t.Logf("48 MiB: %d packs, %d bytes carried, %d bytes sent after", seed.Packs, seed.Bytes, got.Sent)
}

func TestADiskThatWasChangedOnItsWayIsRefused(t *testing.T) {
	t.Parallel()
	near, _, farDrv, disk := carried(t)
	seed, err := near.ExportSeed(t.Context(), disk, []string{"snap-1"}, nil)
	if err != nil {
		t.Fatal(err)
	}
	var pack string
	err = filepath.WalkDir(filepath.Join(disk, "packs"), func(path string, e fs.DirEntry, err error) error {
		if err == nil && !e.IsDir() {
			pack = path
		}
		return err
	})
	if err != nil || pack == "" {
		t.Fatal("no pack", err)
	}
	whole, err := os.ReadFile(pack)
	if err != nil {
		t.Fatal(err)
	}
	list, err := os.ReadFile(filepath.Join(disk, "packs.txt"))
	if err != nil {
		t.Fatal(err)
	}
	head, err := os.ReadFile(filepath.Join(disk, "seed.json"))
	if err != nil {
		t.Fatal(err)
	}
	restore := func() {
		os.Remove(pack)
		for path, data := range map[string][]byte{pack: whole, filepath.Join(disk, "packs.txt"): list, filepath.Join(disk, "seed.json"): head} {
			if err := os.WriteFile(path, data, 0o600); err != nil {
				t.Fatal(err)
			}
		}
	}
	for name, change := range map[string]func() error{
		"a byte of a pack":  func() error { b := bytes.Clone(whole); b[len(b)/2] ^= 1; return os.WriteFile(pack, b, 0o600) },
		"a pack is shorter": func() error { return os.Truncate(pack, int64(len(whole)-1)) },
		"a pack is missing": func() error { return os.Remove(pack) },
		"a pack is a link":  func() error { return errors.Join(os.Remove(pack), os.Symlink("/etc/passwd", pack)) },
		"the list":          func() error { return os.WriteFile(filepath.Join(disk, "packs.txt"), list[1:], 0o600) },
		"the seed's file":   func() error { return os.WriteFile(filepath.Join(disk, "seed.json"), append(head, '\n'), 0o600) },
		"the list is a trap": func() error {
			return os.WriteFile(filepath.Join(disk, "packs.txt"), []byte("00 1 ../../../etc/passwd\n"), 0o600)
		},
	} {
		if err := change(); err != nil {
			t.Fatal(err)
		}
		if _, err := store.ImportSeed(t.Context(), farDrv, disk, seed.Digest, nil); !errors.Is(err, store.ErrSeed) {
			t.Errorf("%s: %v", name, err)
		}
		restore()
	}
	if _, err := store.ImportSeed(t.Context(), farDrv, disk, strings.Repeat("0", 64), nil); !errors.Is(err, store.ErrSeed) || !strings.Contains(err.Error(), seed.Digest) {
		t.Errorf("another digest: %v", err)
	}
	if _, err := store.ImportSeed(t.Context(), farDrv, disk, seed.Digest, nil); err != nil {
		t.Errorf("put right again: %v", err)
	}
}
