// Package store keeps snapshots: fixed-size blocks addressed by a keyed hash, compressed, encrypted, and shared by
// every snapshot that holds them. It is built on a Kopia repository used as a library, and a stock kopia command can
// open, list, verify and restore what is kept here.
//
// # Nouns
//
//	Driver      names a place where blobs live; Place is that place, open (store/folder is the first)
//	Store       a repository in a place, open
//	Writer      a snapshot being written; it is there only after Commit, complete
//	DiskWriter  one disk of it
//	Image       one disk of a kept snapshot, readable at any offset
//	record      a small piece of JSON that must survive the catalog: server definitions, verdicts, promotions
//	Partial     what was written of a snapshot that is not finished, for the next attempt to go on with
//	pin, hold   why a snapshot cannot be forgotten now: somebody reads it; a machine runs on it
//
// # What is kept
//
// A disk is cut into blocks, blocks are listed in segments of SegmentSize, segments in one root. Root and segments
// have the form of Kopia's own indirect objects, so that Kopia reads the disk as a file. An increment starts from its
// parent's root and rewrites only the segments it touched. docs/formats/store.md has every byte of it.
//
// # Durability
//
// Every blob is stored, synced, dropped from the cache, read back and compared before the call that wrote it returns.
// A snapshot is published by one blob, written last. After a power cut or a kill it is complete or absent; what an
// unfinished one left behind is found by Collect.
//
// # Several processes
//
// Any number of processes may have a store open. Locks of the place keep apart what must not meet: publishing from
// publishing, writing a snapshot from collecting, reading one from forgetting it. They vanish with the process.
//
// Knows: blobs, blocks, Kopia, the manifest of a snapshot.
// Must not know: where a disk comes from, what is on it, what is done with an image, why a record is kept.
package store

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"sync"
	"time"

	"github.com/kopia/kopia/repo/blob"
)

// Errors, matched with errors.Is.
var (
	ErrExists      = errors.New("the snapshot is already kept")
	ErrNotFound    = errors.New("not in the store")
	ErrPinned      = errors.New("the snapshot is in use")
	ErrProtected   = errors.New("the snapshot is last-known-good")
	ErrBusy        = errors.New("the store is busy")
	ErrDamaged     = errors.New("the store is damaged")
	ErrNoSpace     = errors.New("no space left in the store")
	ErrClosed      = errors.New("the store is closed")
	ErrNotAStore   = errors.New("there is no store")
	ErrNotEmpty    = errors.New("the place is not empty")
	ErrBadPassword = errors.New("the password is wrong")
	ErrForbidden   = errors.New("the store does not allow it")
	ErrLocked      = errors.New("the place keeps it locked")
	ErrNoLocks     = errors.New("the place does not lock what it keeps")
)

// Driver names a place where blobs live.
type Driver interface {
	// Create makes the place ready for a new store. A place that holds anything already is ErrNotEmpty.
	Create(ctx context.Context) (Place, error)
	// Open opens a place made by Create. A place that was never made is ErrNotAStore.
	Open(ctx context.Context) (Place, error)
	// String names the place for people.
	String() string
}

// Place is where blobs live: what Kopia asks of a storage, and what it forgets to ask. PutBlob returns when the blob
// and its name would survive a power cut. Methods may be called from many goroutines.
type Place interface {
	blob.Storage
	// Sync makes everything put so far survive a power cut.
	Sync(ctx context.Context) error
	// Evict drops a blob from every cache it can reach, so that the next read comes from the medium.
	Evict(ctx context.Context, id blob.ID)
	// TryLock takes a named lock, exclusive or shared, against every other holder in this process and others.
	// taken is false if somebody else has it. It is released with the process at the latest.
	TryLock(name string, exclusive bool) (unlock func(), taken bool, err error)
	// Sweep removes what crashes left behind outside of any blob, if it is older than age.
	Sweep(ctx context.Context, age time.Duration) error
}

// Attesting is a Place that is far away: PutBlob reads back over there, from the medium, before it returns, so that nothing has
// to be fetched once more to be compared.
type Attesting interface {
	// Bring puts a blob unless it is there just as it is given; it is read from the medium over there for that, too. room is
	// asked before anything is sent. sent is false if nothing had to be.
	Bring(ctx context.Context, id blob.ID, data blob.Bytes, room func() error) (sent bool, err error)
}

// Unbuffered is a Place that can read a blob from its medium past every cache.
type Unbuffered interface {
	// GetFromMedium is GetBlob of a whole blob, by nobody's memory of it.
	GetFromMedium(ctx context.Context, id blob.ID, out blob.OutputBuffer) error
}

// GetFromMedium reads a whole blob of a place from the medium.
func GetFromMedium(ctx context.Context, p Place, id blob.ID, out blob.OutputBuffer) error {
	if u, ok := p.(Unbuffered); ok {
		return u.GetFromMedium(ctx, id, out)
	}
	p.Evict(ctx, id)
	return p.GetBlob(ctx, id, 0, -1, out)
}

// Limits of a store. Anything beyond is refused, on writing and on reading.
const (
	DefaultBlockSize = 128 << 10
	MinBlockSize     = 4 << 10
	MaxBlockSize     = 4 << 20
	SegmentSize      = 64 << 20 // bytes of disk that one segment of the map lists
	MaxDiskSize      = 64 << 40
	MaxDisks         = 32
	MaxManifest      = 32 << 20  // bytes of a snapshot's manifest
	MaxAttachment    = 256 << 20 // bytes of one attached file
	MaxAttachments   = 256       // attached files of a snapshot
	MaxRecord        = 16 << 20  // bytes of one record
	MaxKept          = 16 << 40  // bytes of one file added to a kept snapshot
)

// Store is an open store. Methods may be called from many goroutines.
type Store struct {
	drv   Driver
	place Place
	life  context.Context // ends when the store is closed or can no longer be trusted
	end   context.CancelCauseFunc
	dir   string // of this process: Kopia's configuration file
	guard *guard
	rep   shared // to read from, and to make write sessions of
	cache *cache

	mu     sync.Mutex
	floor  time.Time // no manifest is written with an earlier time than this
	tidied time.Time // when index blobs were last looked after
	healed time.Time // when a missing blob last made the index be read again
	work   sync.WaitGroup
}

// Create makes a new, empty store. The password is needed to open it ever after; nothing can replace it. A place that
// already holds something is refused with ErrNotEmpty.
func Create(ctx context.Context, drv Driver, password string) error {
	if err := create(ctx, drv, password, secrets{}); err != nil {
		return fmt.Errorf("create store in %s: %w", drv, err)
	}
	return nil
}

// Open opens a store. A wrong password is ErrBadPassword; a place without a store is ErrNotAStore.
func Open(ctx context.Context, drv Driver, password string) (*Store, error) {
	place, err := drv.Open(ctx)
	if err != nil {
		return nil, fmt.Errorf("open store in %s: %w", drv, err)
	}
	dir, err := os.MkdirTemp("", "muster-store-")
	if err != nil {
		return nil, errors.Join(fmt.Errorf("open store in %s: %w", drv, err), place.Close(ctx))
	}
	s := &Store{drv: drv, place: place, dir: dir, cache: newCache(DefaultCache)}
	s.life, s.end = context.WithCancelCause(context.Background())
	s.guard = &guard{Place: place, store: s}
	rep, err := connect(ctx, s.guard, dir, password, s.now, s.giveUp)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("open store in %s: %w", drv, err), place.Close(ctx), os.RemoveAll(dir))
	}
	s.rep = shared{DirectRepository: rep, mu: &sync.RWMutex{}}
	return s, nil
}

// Close releases the store. Images and writers still open fail from now on.
func (s *Store) Close(ctx context.Context) error {
	if s.life.Err() != nil && errors.Is(context.Cause(s.life), ErrClosed) {
		return nil
	}
	s.mu.Lock()
	s.end(ErrClosed)
	s.mu.Unlock()
	s.work.Wait()
	s.mu.Lock()
	defer s.mu.Unlock()
	return errors.Join(s.rep.Close(ctx), s.place.Close(ctx), os.RemoveAll(s.dir))
}

// String names the place of the store for people.
func (s *Store) String() string { return s.drv.String() }

// Refresh makes what other processes kept, forgot or collected visible.
func (s *Store) Refresh(ctx context.Context) error {
	ctx, done := s.bind(ctx)
	defer done()
	if err := s.rep.Refresh(ctx); err != nil {
		return s.explain(fmt.Errorf("refresh store: %w", err))
	}
	return nil
}

// bind gives a context that also ends with the store.
func (s *Store) bind(ctx context.Context) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancelCause(ctx)
	if s.life.Err() != nil {
		cancel(context.Cause(s.life))
	}
	stop := context.AfterFunc(s.life, func() { cancel(context.Cause(s.life)) })
	return ctx, func() { stop(); cancel(nil) }
}

// explain says of an error what is behind it: what the place answered, or why the store ended.
func (s *Store) explain(err error) error {
	var p *placeError
	if errors.As(err, &p) {
		return p
	}
	if err == nil || s.life.Err() == nil {
		return err
	}
	cause := context.Cause(s.life)
	if errors.Is(err, cause) {
		return err
	}
	return fmt.Errorf("%w (%w)", err, cause)
}

// giveUp ends the store because it can no longer be trusted. Kopia would end the process instead.
func (s *Store) giveUp(err error) {
	if s.life.Err() != nil {
		return
	}
	slog.Error("store is given up", "store", s.drv.String(), "error", err.Error())
	s.end(fmt.Errorf("the store in %s was given up: %w", s.drv, err))
}

// now never goes back behind a time already written in a manifest: Kopia resolves a deletion against what it deletes
// by their times, and a clock that was stepped back would bring forgotten snapshots back to life.
func (s *Store) now() time.Time {
	s.mu.Lock()
	defer s.mu.Unlock()
	if t := time.Now(); t.After(s.floor) {
		return t
	}
	s.floor = s.floor.Add(time.Microsecond)
	return s.floor
}

func (s *Store) raiseFloor(t time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if t.After(s.floor) {
		s.floor = t
	}
}

// lockPoll is how often a lock that somebody else has is tried again.
const (
	lockPollFirst = 2 * time.Millisecond
	lockPollMax   = 50 * time.Millisecond
)

// lock waits for a named lock of the place. Whoever waits stands in a queue that Collect respects: it holds its locks
// for long, and called often enough it would let nobody else in.
func (s *Store) lock(ctx context.Context, name string, exclusive bool) (unlock func(), err error) {
	leave := func() {}
	defer func() { leave() }()
	for wait := lockPollFirst; ; wait = min(2*wait, lockPollMax) {
		unlock, taken, err := s.place.TryLock(name, exclusive)
		if err != nil {
			return nil, fmt.Errorf("lock %s: %w", name, err)
		}
		if taken {
			return unlock, nil
		}
		if wait == lockPollFirst {
			if out, in, err := s.place.TryLock(lockQueue+name, false); err == nil && in {
				leave = out
			}
		}
		select {
		case <-ctx.Done():
			return nil, fmt.Errorf("wait for lock %s: %w", name, context.Cause(ctx))
		case <-time.After(wait):
		}
	}
}

// lockAlone takes a lock exclusively if nobody has it and nobody waits for it; otherwise the store is busy.
func (s *Store) lockAlone(name string) (unlock func(), err error) {
	leave, alone, err := s.place.TryLock(lockQueue+name, true)
	if err != nil {
		return nil, fmt.Errorf("lock %s: %w", name, err)
	}
	if !alone {
		return nil, ErrBusy
	}
	defer leave()
	unlock, taken, err := s.place.TryLock(name, true)
	if err != nil {
		return nil, fmt.Errorf("lock %s: %w", name, err)
	}
	if !taken {
		return nil, ErrBusy
	}
	return unlock, nil
}

// The locks. A snapshot's own are made with its identifier.
const (
	lockPublish = "publish" // exclusive: whoever changes manifests
	lockIngest  = "ingest"  // shared: whoever writes a snapshot; exclusive: Collect
	lockPin     = "pin/"    // shared: whoever reads that snapshot; exclusive: Forget
	lockWrite   = "write/"  // exclusive: whoever writes that snapshot
	lockQueue   = "queue/"  // shared: whoever waits for the lock of that name
)
