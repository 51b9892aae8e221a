package store

import (
	"context"
	"encoding/json"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/kopia/kopia/repo"
	"github.com/kopia/kopia/repo/content"

	"github.com/musterdr/muster/internal/dr"
)

// What is deleted stays deleted although the clock was stepped back behind the time at which it was put.
func TestClockSteppedBackBringsNothingBack(t *testing.T) {
	s := openCopy(t)
	s.raiseFloor(time.Now().Add(time.Hour)) // the clock as it was
	if err := s.PutRecord(t.Context(), "server", "srv-2", 1); err != nil {
		t.Fatal(err)
	}
	s.mu.Lock()
	s.floor = time.Time{} // stepped back, in a process that has not seen it
	s.mu.Unlock()
	for _, id := range []string{"srv-1", "srv-2"} {
		if err := s.DeleteRecord(t.Context(), "server", id); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.Refresh(t.Context()); err != nil {
		t.Fatal(err)
	}
	err := s.Records(t.Context(), "server", func(id string, _ json.RawMessage) error {
		t.Errorf("record %s is back", id)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Forget(t.Context(), "snap-full"); err != nil {
		t.Fatal(err)
	}
	all, err := s.Snapshots(t.Context())
	if err != nil || len(all) != 1 {
		t.Errorf("%d snapshots, %v", len(all), err)
	}
	_ = s.Close(context.Background())
}

// keepNoise keeps a snapshot of 4 MiB that nothing else has.
func keepNoise(t *testing.T, s *Store, id string) {
	t.Helper()
	w, err := s.Begin(t.Context(), id, "")
	if err != nil {
		t.Fatal(err)
	}
	d, err := w.Disk(t.Context(), "sda", 4<<20, MinBlockSize)
	if err != nil {
		t.Fatal(err)
	}
	noise := make([]byte, 4<<20)
	_, _ = rand.NewChaCha8([32]byte{}).Read(noise)
	for i := int64(0); i < 4<<20/MinBlockSize; i++ {
		if err := d.Write(t.Context(), i, noise[i*MinBlockSize:(i+1)*MinBlockSize]); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := w.Commit(t.Context(), dr.Snapshot{ServerID: "srv-1", Server: "shop", Taken: time.Now()}); err != nil {
		t.Fatal(err)
	}
}

// What a store wrote whose clock is a little ahead is freed like everything else. Where it is far ahead nothing is freed at once: a
// deletion so dated would take with it what is written later.
func TestCollectingAtOnceWaitsForTheClock(t *testing.T) {
	for ahead, freed := range map[time.Duration]bool{2 * time.Second: true, 3 * time.Minute: false} {
		s := openCopy(t)
		s.raiseFloor(time.Now().Add(ahead))
		keepNoise(t, s, "snap-ahead")
		if err := s.Forget(t.Context(), "snap-ahead"); err != nil {
			t.Fatal(err)
		}
		r, err := s.Collect(t.Context(), CollectOptions{Immediate: true}, nil)
		if freed && (err != nil || r.Freed() < 3<<20) || !freed && (err == nil || !strings.Contains(err.Error(), "ahead of this clock")) {
			t.Errorf("%s ahead: collected %+v, %v", ahead, r, err)
		}
	}
}

// What nobody names any more and is damaged as well is no reason to collect nothing for ever.
func TestADamagedBlockThatNobodyNeedsStopsNoCollection(t *testing.T) {
	s := openCopy(t)
	had := map[string]bool{}
	dir := s.drv.String()
	packs := func() (out []string) {
		_ = filepath.WalkDir(dir, func(path string, e os.DirEntry, err error) error {
			if err == nil && !e.IsDir() && !had[path] && strings.Contains(strings.TrimPrefix(path, dir), "/p") {
				out = append(out, path)
			}
			return nil
		})
		return out
	}
	for _, p := range packs() {
		had[p] = true
	}
	keepNoise(t, s, "snap-rot")
	fresh := packs()
	if len(fresh) == 0 {
		t.Fatal("no pack was written")
	}
	if err := s.Forget(t.Context(), "snap-rot"); err != nil {
		t.Fatal(err)
	}
	err := s.mutate(t.Context(), "delete", func(ctx context.Context, w repo.DirectRepositoryWriter) error {
		return w.ContentReader().IterateContents(ctx, content.IterateOptions{}, func(c content.Info) error {
			for _, p := range fresh {
				if strings.Contains(strings.ReplaceAll(strings.TrimPrefix(p, dir), "/", ""), string(c.PackBlobID)) {
					return w.ContentManager().DeleteContent(ctx, c.ContentID)
				}
			}
			return nil
		})
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range fresh {
		data, err := os.ReadFile(p)
		if err != nil {
			t.Fatal(err)
		}
		for i := range data {
			data[i] ^= 0x55
		}
		if err := os.WriteFile(p, data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	s.raiseFloor(time.Now().Add(2 * rewriteAge)) // old enough to be copied
	if r, err := s.Collect(t.Context(), CollectOptions{Immediate: true}, nil); err != nil || r.Freed() < 1<<20 {
		t.Errorf("collected %+v, %v", r, err)
	}
}
