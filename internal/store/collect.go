package store

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"os"
	"strings"
	"time"

	"github.com/kopia/kopia/repo"
	"github.com/kopia/kopia/repo/content"
	"github.com/kopia/kopia/repo/maintenance"
	"github.com/kopia/kopia/snapshot"
	"github.com/kopia/kopia/snapshot/snapshotmaintenance"

	"github.com/musterdr/muster/internal/dr"
)

// tidyEvery is how often at most the index blobs are looked after by the way.
const tidyEvery = 10 * time.Minute

// sweepAge is how old something must be that no blob belongs to before Collect removes it.
const sweepAge = time.Hour

// settled is how old everything must be before an immediate collection: Kopia counts in seconds and dates a deletion after what it
// deletes, and what was written just now would stay.
const settled = 2 * time.Second

// maxSettle is how long an immediate collection waits for that at most: deletions may be dated some seconds ahead.
const maxSettle = 15 * time.Second

// rewriteAge keeps an immediate collection from copying what it has just marked as deleted.
const rewriteAge = time.Minute

// A content that nobody names and that cannot be read is let go, not copied. Without this, which Kopia reads in each collection and offers in no
// other way, one such block would keep a store from ever being collected again.
func init() {
	if err := os.Setenv("KOPIA_IGNORE_MAINTENANCE_REWRITE_ERROR", "1"); err != nil {
		panic("store: " + err.Error())
	}
}

// Forget takes a snapshot out of the store, with the files kept with it. Space is freed by Collect. One that is
// last-known-good is ErrProtected; one that is read, booted or the parent of a snapshot being written is ErrPinned.
func (s *Store) Forget(ctx context.Context, snapshotID string) error {
	err := dr.ValidateID(snapshotID)
	if err == nil {
		err = s.forget(withReserve(ctx), snapshotID)
	}
	if err != nil {
		return fmt.Errorf("forget snapshot %s: %w", snapshotID, err)
	}
	return nil
}

func (s *Store) forget(ctx context.Context, snapshotID string) error {
	unlock, taken, err := s.place.TryLock(lockPin+snapshotID, true)
	if err != nil {
		return err
	}
	if !taken {
		return fmt.Errorf("%w: it is being read", ErrPinned)
	}
	defer unlock()
	return s.mutate(ctx, "forget", func(ctx context.Context, w repo.DirectRepositoryWriter) error {
		good, err := lkg(ctx, w)
		if err != nil {
			return err
		}
		for server, id := range good {
			if id == snapshotID {
				return fmt.Errorf("%w of %s", ErrProtected, server)
			}
		}
		held, err := holds(ctx, w)
		if err != nil {
			return err
		}
		if owners := held[snapshotID]; len(owners) > 0 {
			return fmt.Errorf("%w: held by %s", ErrPinned, strings.Join(owners, ", "))
		}
		data, err := w.FindManifests(ctx, map[string]string{manifestTypeKey: snapshot.ManifestType, tagKind: kindSnapshot, tagImage: snapshotID})
		if err != nil {
			return damaged(err)
		}
		if len(data) > 0 {
			return fmt.Errorf("%w: data goes onto it, %s and %d others", ErrPinned, data[0].Labels[tagSnapshot], len(data)-1)
		}
		entries, err := findManifests(ctx, w, kindSnapshot, snapshotID)
		if err != nil {
			return damaged(err)
		}
		if len(entries) == 0 {
			return ErrNotFound
		}
		more, err := findManifests(ctx, w, kindKept, snapshotID)
		if err != nil {
			return damaged(err)
		}
		for _, e := range append(entries, more...) {
			if err := w.DeleteManifest(ctx, e.ID); err != nil {
				return err
			}
		}
		return nil
	})
}

// CollectOptions says how to collect.
type CollectOptions struct {
	// Immediate frees everything nobody names at once. Otherwise what is younger than a day stays, and what goes is
	// freed by a later collection, so that even a writer that does not know our locks, such as a stock kopia command,
	// loses nothing. Set it only if no such writer is at work.
	Immediate bool
}

// CollectReport says what a collection did.
type CollectReport struct {
	Snapshots int   // kept, and walked to see what they name
	Before    int64 // bytes of all blobs
	After     int64
	Locked    int64 // blobs that nobody names and that the place still keeps; a later collection removes them
	Duration  time.Duration
}

// Freed is how many bytes the collection freed. It is negative when it wrote more than it removed.
func (r CollectReport) Freed() int64 { return r.Before - r.After }

// Collect frees what no snapshot names, and puts the indexes in order. It never takes what a manifest names. While a
// snapshot is being written it does not start and says ErrBusy; a snapshot begun meanwhile waits. A collection that is
// killed has done part of its work and harmed nothing. A snapshot that is too damaged to be walked stops it: forget that one.
func (s *Store) Collect(ctx context.Context, opts CollectOptions, progress dr.Progress) (CollectReport, error) {
	started := time.Now()
	ctx, done := s.bind(withReserve(ctx))
	defer done()
	r, err := s.collect(ctx, opts, progress)
	if err != nil {
		return r, fmt.Errorf("collect: %w", s.explain(err))
	}
	r.Duration = time.Since(started)
	return r, nil
}

func (s *Store) collect(ctx context.Context, opts CollectOptions, progress dr.Progress) (r CollectReport, err error) {
	const steps = 4
	unlock, err := s.lockAlone(lockIngest)
	if err != nil {
		return r, fmt.Errorf("%w: a snapshot is being written or another collection runs", err)
	}
	defer unlock()
	if err := s.sortPartials(ctx); err != nil {
		return r, err
	}
	safety := maintenance.SafetyFull
	if opts.Immediate {
		safety = maintenance.SafetyNone
		safety.RewriteMinAge = rewriteAge
		// What was written by a store whose clock is a little ahead of the place's is nobody's either.
		safety.MinContentAgeSubjectToGC = math.MinInt64
		release, err := s.lockAlone(lockPublish) // a record being put must not lose its blob
		if err != nil {
			return r, fmt.Errorf("%w: a record is being put", err)
		}
		defer release()
	}
	if err := s.rep.Refresh(ctx); err != nil {
		return r, err
	}
	if opts.Immediate {
		if err := s.settle(ctx); err != nil {
			return r, err
		}
	}
	entries, err := findManifests(ctx, s.rep, kindSnapshot, "")
	if err != nil {
		return r, damaged(err)
	}
	r.Snapshots = len(entries)
	progress.Report("collect", 1, steps, "steps")
	if err := s.place.Sweep(ctx, sweepAge); err != nil {
		return r, err
	}
	if r.Before, _, err = s.blobs(ctx); err != nil {
		return r, err
	}
	locked := s.guard.locked.Load()
	progress.Report("collect", 2, steps, "steps")
	if err := maintain(ctx, s.rep, maintenance.ModeFull, safety); err != nil {
		return r, err
	}
	progress.Report("collect", 3, steps, "steps")
	if err := s.place.Sync(ctx); err != nil {
		return r, err
	}
	if err := s.rep.Refresh(ctx); err != nil {
		return r, err
	}
	r.Locked = s.guard.locked.Load() - locked
	r.After, _, err = s.blobs(ctx)
	progress.Report("collect", steps, steps, "steps")
	return r, err
}

// settle waits until everything in the store is old enough for an immediate collection. The clock is not put forward instead: what
// another process writes a moment later would be older than its deletion, and lost with it. So what is dated far ahead, because a clock was
// wrong then or is now, is an error.
func (s *Store) settle(ctx context.Context) error {
	var newest time.Time
	err := s.rep.ContentReader().IterateContents(ctx, content.IterateOptions{IncludeDeleted: true}, func(c content.Info) error {
		if at := c.Timestamp(); at.After(newest) {
			newest = at
		}
		return ctx.Err()
	})
	if err != nil {
		return err
	}
	wait := time.Until(newest.Add(settled))
	if wait > maxSettle {
		return fmt.Errorf("the store holds what is dated %s ahead of this clock: set the clock, or wait so long", wait.Round(time.Second))
	}
	select {
	case <-time.After(wait):
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

func maintain(ctx context.Context, rep repo.DirectRepository, mode maintenance.Mode, safety maintenance.SafetyParameters) error {
	return repo.DirectWriteSession(ctx, rep, repo.WriteSessionOptions{Purpose: "maintenance"},
		func(ctx context.Context, w repo.DirectRepositoryWriter) error {
			return snapshotmaintenance.Run(ctx, w, mode, true, safety)
		})
}

// tidy compacts index blobs by the way: every look-up asks each of them, and every flush adds one. It is safe beside
// anything; that it did not work out costs nothing but time.
func (s *Store) tidy(ctx context.Context) {
	if !s.due(&s.tidied, tidyEvery) {
		return
	}
	blobs, err := s.rep.IndexBlobs(ctx, false)
	if err == nil && len(blobs) > tidyAbove {
		err = maintain(ctx, s.rep, maintenance.ModeQuick, maintenance.SafetyFull)
	}
	if errors.Is(err, ErrForbidden) { // who may only add does not tidy up
		return
	}
	if err != nil {
		slog.WarnContext(ctx, "index blobs were not compacted", "store", s.String(), "error", s.explain(err).Error())
	}
}

// tidyAbove is how many index blobs are left alone.
const tidyAbove = 16

// Usage is what a store takes up.
type Usage struct {
	Blobs    int   `json:"blobs"`
	Bytes    int64 `json:"bytes"`    // of all blobs
	Contents int64 `json:"contents"` // unique blocks, map nodes and files
	Unpacked int64 `json:"unpacked"` // bytes of them before compression
	Packed   int64 `json:"packed"`   // and after compression and sealing
	Free     int64 `json:"free"`     // bytes left in the place; -1 if it cannot say
}

// Usage measures what the store takes up. It takes time in proportion to the number of blocks.
func (s *Store) Usage(ctx context.Context) (Usage, error) {
	ctx, done := s.bind(ctx)
	defer done()
	u, err := s.usage(ctx)
	if err != nil {
		return Usage{}, fmt.Errorf("measure store: %w", s.explain(err))
	}
	return u, nil
}

func (s *Store) usage(ctx context.Context) (u Usage, err error) {
	if u.Bytes, u.Blobs, err = s.blobs(ctx); err != nil {
		return u, err
	}
	err = s.rep.ContentReader().IterateContents(ctx, content.IterateOptions{}, func(c content.Info) error {
		u.Contents++
		u.Unpacked += int64(c.OriginalLength)
		u.Packed += int64(c.PackedLength)
		return ctx.Err()
	})
	u.Free = s.free(ctx)
	return u, err
}
