package store

import (
	"context"
	"encoding/json"
	"testing"
	"time"
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
