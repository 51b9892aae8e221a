package store

import (
	"context"
	"fmt"
)

// Space is what a store takes of its place, without looking into it.
type Space struct {
	Bytes int64 // of all blobs
	Free  int64 // bytes left in the place; -1 if it cannot say
}

// Space measures that. It takes time in proportion to the number of blobs, of which there are few.
func (s *Store) Space(ctx context.Context) (Space, error) {
	ctx, done := s.bind(ctx)
	defer done()
	bytes, _, err := s.blobs(ctx)
	if err != nil {
		return Space{}, fmt.Errorf("measure store: %w", s.explain(err))
	}
	return Space{Bytes: bytes, Free: s.free(ctx)}, nil
}

func (s *Store) free(ctx context.Context) int64 {
	if c, err := s.place.GetCapacity(ctx); err == nil {
		return int64(c.FreeB)
	}
	return -1
}

// Check says how much room is left, and why a snapshot could not be kept: the store was given up, or its place cannot be
// written to.
func (s *Store) Check(ctx context.Context) (free int64, err error) {
	ctx, done := s.bind(ctx)
	defer done()
	if err := context.Cause(ctx); err != nil {
		return -1, fmt.Errorf("use store: %w", err)
	}
	unlock, taken, err := s.place.TryLock(lockCheck, true)
	if err != nil {
		return -1, fmt.Errorf("write to store: %w", s.explain(err))
	}
	if taken {
		unlock()
	}
	return s.free(ctx), nil
}

// lockCheck is taken to see whether the place lets itself be written to. Nobody waits for it.
const lockCheck = "check"
