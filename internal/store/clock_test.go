package store

import (
	"context"
	"encoding/json"
	"math/rand/v2"
	"testing"
	"time"

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

// What a store wrote whose clock is ahead of the one that dates its files is freed like everything else.
func TestCollectingFreesWhatWasWrittenByAClockThatIsAhead(t *testing.T) {
	s := openCopy(t)
	s.raiseFloor(time.Now().Add(3 * time.Minute))
	w, err := s.Begin(t.Context(), "snap-ahead", "")
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
	if err := s.Forget(t.Context(), "snap-ahead"); err != nil {
		t.Fatal(err)
	}
	r, err := s.Collect(t.Context(), CollectOptions{Immediate: true}, nil)
	if err != nil || r.Freed() < 3<<20 {
		t.Errorf("collected %+v, %v", r, err)
	}
}
