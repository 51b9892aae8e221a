package store

import (
	"context"
	"errors"
	"sync"
	"sync/atomic"
	"testing"
)

func TestBlockWantedByManyIsReadOnce(t *testing.T) {
	c := newCache(1 << 20)
	id, _, _ := someIDs(t, 1)[0].ContentID()
	started, finish := make(chan struct{}), make(chan struct{})
	var reads atomic.Int32
	read := func(context.Context) ([]byte, error) {
		reads.Add(1)
		close(started)
		<-finish
		return []byte("block"), nil
	}
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			if data, err := c.get(t.Context(), id, read); err != nil || string(data) != "block" {
				t.Errorf("%q, %v", data, err)
			}
		})
	}
	<-started
	close(finish)
	wg.Wait()
	if reads.Load() != 1 {
		t.Errorf("read %d times", reads.Load())
	}
}

func TestCacheStaysWithinItsLimit(t *testing.T) {
	c := newCache(1000)
	var ids []int
	for i, id := range someIDs(t, 50) {
		cid, _, _ := id.ContentID()
		_, err := c.get(t.Context(), cid, func(context.Context) ([]byte, error) { return make([]byte, 100), nil })
		if err != nil {
			t.Fatal(err)
		}
		if c.size > 1000 || len(c.entries) != c.recent.Len() {
			t.Fatalf("%d bytes in %d entries", c.size, len(c.entries))
		}
		ids = append(ids, i)
	}
	if len(c.entries) != 10 {
		t.Errorf("%d entries of %d", len(c.entries), len(ids))
	}
}

func TestFailedReadIsNotRemembered(t *testing.T) {
	c := newCache(1000)
	id, _, _ := someIDs(t, 1)[0].ContentID()
	bad := errors.New("bad")
	if _, err := c.get(t.Context(), id, func(context.Context) ([]byte, error) { return nil, bad }); !errors.Is(err, bad) {
		t.Fatal(err)
	}
	if data, err := c.get(t.Context(), id, func(context.Context) ([]byte, error) { return []byte("x"), nil }); err != nil || string(data) != "x" {
		t.Errorf("%q, %v", data, err)
	}
}
