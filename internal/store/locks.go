package store

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/kopia/kopia/repo/blob"
	"github.com/kopia/kopia/repo/content"
	"golang.org/x/sync/errgroup"

	"github.com/musterdr/muster/internal/dr"
)

// Locker is a place that lets nobody remove a blob for some time, not even its owner. How long is the place's to know.
type Locker interface {
	// Lock makes sure that a blob stays locked for long enough. extended is false if it was already. A place that locks
	// nothing says ErrNoLocks.
	Lock(ctx context.Context, id blob.ID) (extended bool, err error)
}

// LockReport says what ExtendLocks did.
type LockReport struct {
	Blobs    int // that what is kept depends on
	Extended int // of them, whose lock was extended; the others had enough left
	Duration time.Duration
}

// lockWorkers is how many blobs are asked for at once: each is a round trip or two.
const lockWorkers = 16

// formatBlobs are the store's keys and format.
var formatBlobs = []blob.ID{"kopia.repository", "kopia.blobcfg"}

// ExtendLocks extends the lock of every blob that what is kept depends on, before it runs out: the keys, the index and every pack
// that holds anything a manifest may name. What nobody needs is left to run out, so that Collect can remove it.
// It may be stopped and started at any time: what was extended is passed over. A place that locks nothing is ErrNoLocks.
func (s *Store) ExtendLocks(ctx context.Context, progress dr.Progress) (r LockReport, err error) {
	started := time.Now()
	ctx, done := s.bind(ctx)
	defer done()
	l, ok := s.place.(Locker)
	if !ok {
		return r, fmt.Errorf("extend locks: %w", ErrNoLocks)
	}
	if err := s.rep.Refresh(ctx); err != nil {
		return r, fmt.Errorf("extend locks: %w", s.explain(err))
	}
	ids, err := s.needed(ctx)
	if err == nil {
		err = lockAll(ctx, l, ids, &r, progress)
	}
	r.Duration = time.Since(started)
	if err != nil {
		return r, fmt.Errorf("extend locks: %w", s.explain(err))
	}
	return r, nil
}

// needed lists the blobs that what is kept depends on.
func (s *Store) needed(ctx context.Context) ([]blob.ID, error) {
	ids := append([]blob.ID(nil), formatBlobs...)
	index, err := s.rep.IndexBlobs(ctx, false)
	if err != nil {
		return nil, err
	}
	for _, b := range index {
		ids = append(ids, b.BlobID)
	}
	err = s.rep.ContentReader().IteratePacks(ctx, content.IteratePackOptions{IncludePacksWithOnlyDeletedContent: false},
		func(p content.PackInfo) error {
			ids = append(ids, p.PackID)
			return ctx.Err()
		})
	return ids, err
}

func lockAll(ctx context.Context, l Locker, ids []blob.ID, r *LockReport, progress dr.Progress) error {
	var mu sync.Mutex
	g, work := errgroup.WithContext(ctx)
	g.SetLimit(lockWorkers)
	for _, id := range ids {
		if work.Err() != nil {
			break
		}
		g.Go(func() error {
			extended, err := l.Lock(work, id)
			if errors.Is(err, blob.ErrBlobNotFound) { // an index blob that was compacted meanwhile; a pack that is gone is Verify's to tell
				return nil
			}
			if err != nil {
				return err
			}
			mu.Lock()
			defer mu.Unlock()
			r.Blobs++
			if extended {
				r.Extended++
			}
			progress.Report("extend locks", int64(r.Blobs), int64(len(ids)), "blobs")
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		return err
	}
	return context.Cause(ctx)
}
