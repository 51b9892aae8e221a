package s3

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	mathrand "math/rand/v2"
	"sync"
	"time"

	"github.com/kopia/kopia/repo/blob"
	"github.com/minio/minio-go/v7"

	"github.com/musterdr/muster/internal/store"
)

// All locks of a store are one small object. Whoever takes or lets go of one reads it, changes it, and writes it back under
// If-Match: the service lets one writer through, and the others read again. The object also marks the prefix as a store.
//
// A place that holds locks is a session in it. It counts its beat up every lease.renew; when it began the last PUT
// that went through, it knows that its locks are its own until lease.valid later by its own clock, and writes no blob and removes none
// after that. Another place takes it for dead when it has itself seen the same beat for lease.patience, and that is
// several times longer. It takes the dead session out in the same PUT that takes the lock, on condition
// that nothing has changed since it looked, so that the beat was still the same then.
//
// Why that is right: the holder's valid time began before the beat was written, the other's patience after it
// was read. Two clocks are never compared; they only have to run at about the same speed. A session that was
// taken out finds it out at its next beat, and its place refuses to write (ErrLost) until
// everybody who relied on its locks has let go of them. A session that was merely cut off and that nobody took out goes on.
//
// A holder that stood still: by SIGSTOP, or with its host asleep, its clock (CLOCK_BOOTTIME) has gone on. With its virtual machine
// frozen from outside, no clock of it has: it learns the time from the service's first answer. It looks before and
// after each PUT, so what can still happen is one request that was decided before it stood still and arrives after: S3 cannot make a request
// depend on another object. A blob put so is not built on; a blob removed so was already free of the store's
// names, and Collect (unless Immediate) leaves what was named within a day.
//
// A process of this host that is gone is dead at once: nobody has to wait after a restart.
const lockKey = "_muster.lock"

const lockFormat = "muster-lock-1"

// lease is how long things take. Zero is leaseDefault.
type lease struct {
	renew    time.Duration // from beat to beat
	valid    time.Duration // after a beat its holder may rely on its locks
	patience time.Duration // without a beat a session counts as dead
}

var leaseDefault = lease{renew: 10 * time.Second, valid: 30 * time.Second, patience: 60 * time.Second}

// Limits of the table.
const (
	maxTable     = 1 << 20 // bytes
	maxSessions  = 1000
	swapTries    = 40
	swapPauseMax = 60 * time.Millisecond
	lockLimit    = 30 * time.Second // of taking a lock
)

// ErrLost is what a place says that was taken for dead.
var ErrLost = errors.New("the locks on the store were lost, because this process was cut off from it or stood still: what held them has to begin anew")

var errHeld = errors.New("held by somebody else")

// doc is the object.
type doc struct {
	Format   string             `json:"format"`
	Sessions map[string]session `json:"sessions"`
}

// session is one place that holds locks.
type session struct {
	Beat    int64           `json:"beat"`
	Process process         `json:"process"`
	Locks   map[string]bool `json:"locks"` // name, and whether it is exclusive
}

// holding is a lock of ours.
type holding struct {
	exclusive bool
	count     int
}

// sighting is what we saw of another session, and since when.
type sighting struct {
	beat  int64
	since time.Duration
}

// table is the locks as one place sees them.
type table struct {
	p  *place
	t  lease
	me process

	mu     sync.Mutex // held while the object is changed: one change of ours at a time
	doc    doc
	etag   string // of doc; "" if it has to be read
	old    []string
	seen   map[string]sighting
	id     string // our session; "" while we hold nothing
	known  bool   // it is in the object
	beat   int64
	held   map[string]*holding
	closed bool

	state  sync.Mutex // apart, so that looking never waits for the service
	until  time.Duration
	heard  time.Time // the service's clock when the lease was renewed
	active bool      // we hold locks
	void   int       // locks that were lost and not yet let go of

	stop context.CancelFunc
	done chan struct{}
}

func newTable(p *place, l lease) *table {
	if l == (lease{}) {
		l = leaseDefault
	}
	t := &table{p: p, t: l, me: self(), seen: map[string]sighting{}, held: map[string]*holding{}, done: make(chan struct{})}
	ctx, stop := context.WithCancel(context.Background())
	t.stop = stop
	go t.run(ctx)
	return t
}

// create writes the first table, and makes sure that the service honours conditions.
func (t *table) create(ctx context.Context) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	first := doc{Format: lockFormat, Sessions: map[string]session{}}
	err := t.write(ctx, first, "")
	if errors.Is(err, errConflict) {
		return store.ErrNotEmpty
	}
	if err != nil {
		return fmt.Errorf("make the table of locks: %w", err)
	}
	for _, etag := range []string{"", "00000000000000000000000000000000"} {
		if err := t.write(ctx, first, etag); err == nil {
			return fmt.Errorf("the service at %s overwrites what it was told not to (If-None-Match, If-Match): locks would not hold on it", t.p.d.Endpoint)
		} else if !errors.Is(err, errConflict) && !errors.Is(err, blob.ErrBlobNotFound) {
			return fmt.Errorf("try conditional writes: %w", err)
		}
	}
	return nil
}

// open reads the table, and begins to watch the sessions in it.
func (t *table) open(ctx context.Context) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	err := t.read(ctx)
	if errors.Is(err, blob.ErrBlobNotFound) {
		return fmt.Errorf("%w: %s has no %s", store.ErrNotAStore, t.p.d, lockKey)
	}
	return err
}

// read reads the table and notes who is alive.
func (t *table) read(ctx context.Context) error {
	ctx, cancel := within(ctx, 0)
	defer cancel()
	t.etag = ""
	var raw []byte
	var etag string
	err := t.p.again(ctx, func() error {
		body, info, _, err := t.p.core.GetObject(ctx, t.p.d.Bucket, t.p.d.Prefix+lockKey, minio.GetObjectOptions{})
		if torn(err) {
			return &cutOff{err}
		}
		if err != nil {
			return t.p.explain(err)
		}
		defer body.Close() //nolint:errcheck // only read
		if raw, err = io.ReadAll(io.LimitReader(body, maxTable+1)); err != nil {
			return &cutOff{err}
		}
		etag = info.ETag
		return nil
	})
	if err != nil {
		return fmt.Errorf("read the table of locks: %w", err)
	}
	var d doc
	if err := json.Unmarshal(raw, &d); err != nil {
		return fmt.Errorf("read the table of locks %s%s: %d bytes that are none: %w", t.p.d.Prefix, lockKey, len(raw), err)
	}
	if d.Format != lockFormat || len(d.Sessions) > maxSessions {
		return fmt.Errorf("read the table of locks %s%s: it has the format %q and %d sessions; a newer release may have written it", t.p.d.Prefix, lockKey, d.Format, len(d.Sessions))
	}
	t.doc, t.etag = d, etag
	now := bootTime()
	for id, s := range d.Sessions {
		if was, ok := t.seen[id]; !ok || was.beat != s.Beat {
			t.seen[id] = sighting{s.Beat, now}
		}
	}
	maps.DeleteFunc(t.seen, func(id string, _ sighting) bool { _, ok := d.Sessions[id]; return !ok })
	return nil
}

// write puts a table, if the one that is there has this ETag; "": if there is none.
func (t *table) write(ctx context.Context, d doc, etag string) error {
	raw, err := json.Marshal(d)
	if err != nil {
		return err
	}
	if len(raw) > maxTable || len(d.Sessions) > maxSessions {
		return fmt.Errorf("the table of locks is full: %d bytes, %d sessions", len(raw), len(d.Sessions))
	}
	o := minio.PutObjectOptions{SendContentMd5: true, DisableMultipart: true, ContentType: "application/json"}
	if etag == "" {
		o.SetMatchETagExcept("*")
	} else {
		o.SetMatchETag(etag)
	}
	ctx, cancel := within(ctx, 0)
	defer cancel()
	info, err := t.p.c.PutObject(ctx, t.p.d.Bucket, t.p.d.Prefix+lockKey, bytes.NewReader(raw), int64(len(raw)), o)
	if err != nil {
		t.etag = ""
		return t.p.explain(err)
	}
	t.doc, t.etag = d, info.ETag
	if info.VersionID != "" {
		t.old = append(t.old, info.VersionID)
	}
	return nil
}

// change changes the table. edit gets a copy; it must come to the same result if its change is there already, because
// the answer to a PUT may be lost. changed says whether there is anything to write.
func (t *table) change(ctx context.Context, edit func(d *doc) (changed bool, err error)) error {
	for try := 1; ; try++ {
		fresh := t.etag == ""
		if fresh {
			if err := t.read(ctx); err != nil {
				return err
			}
		}
		d := doc{Format: t.doc.Format, Sessions: maps.Clone(t.doc.Sessions)}
		if d.Sessions == nil {
			d.Sessions = map[string]session{}
		}
		t.bury(&d)
		changed, err := edit(&d)
		if err != nil && !fresh {
			t.etag = "" // that may be old news
			continue
		}
		if err != nil || !changed {
			return err
		}
		err = t.write(ctx, d, t.etag)
		if !errors.Is(err, errConflict) || try == swapTries {
			return err
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(mathrand.N(swapPauseMax)): //nolint:gosec // not a secret
		}
	}
}

// bury takes out the sessions that are dead.
func (t *table) bury(d *doc) {
	now := bootTime()
	for id, s := range d.Sessions {
		was, ok := t.seen[id]
		silent := ok && was.beat == s.Beat && now-was.since >= t.t.patience
		if id != t.id && (silent || s.Process.gone(t.me)) {
			slog.Warn("a session on the store was taken for dead", "store", t.p.d.String(), "host", s.Process.Host, "pid", s.Process.PID, "locks", len(s.Locks), "silent", silent)
			delete(d.Sessions, id)
		}
	}
}

// ours is an edit that makes our session what it should be.
func (t *table) ours(locks map[string]bool) func(d *doc) (bool, error) {
	return func(d *doc) (bool, error) {
		was, there := d.Sessions[t.id]
		if t.known && !there {
			return false, ErrLost
		}
		if len(locks) == 0 {
			delete(d.Sessions, t.id)
			return there, nil
		}
		if there && was.Beat == t.beat && maps.Equal(was.Locks, locks) {
			return false, nil // this very change, whose answer was lost
		}
		d.Sessions[t.id] = session{Beat: t.beat, Process: t.me, Locks: locks}
		return true, nil
	}
}

// swap makes our session hold these locks.
func (t *table) swap(ctx context.Context, locks map[string]bool, edit func(d *doc) (bool, error)) error {
	sent := bootTime()
	t.beat++ // also if it fails: a beat stands for one moment
	err := t.change(ctx, edit)
	switch {
	case errors.Is(err, ErrLost):
		t.lost()
		return err
	case err != nil:
		return err
	case len(locks) == 0:
		t.id, t.known = "", false
	default:
		t.known = true
	}
	t.state.Lock()
	defer t.state.Unlock()
	t.active, t.until, t.heard = len(locks) > 0, sent+t.t.valid, t.p.clock.last()
	return nil
}

// lost makes all our locks void.
func (t *table) lost() {
	n := 0
	for _, h := range t.held {
		n += h.count
	}
	clear(t.held)
	t.id, t.known = "", false
	t.state.Lock()
	defer t.state.Unlock()
	t.void += n
	t.active = false
	slog.Error("the locks on the store were lost", "store", t.p.d.String(), "locks", n)
}

// mayWrite says whether blobs may be written and removed now.
func (t *table) mayWrite() error {
	t.state.Lock()
	defer t.state.Unlock()
	switch {
	case t.void > 0:
		return ErrLost
	case !t.active:
		return nil
	case bootTime() > t.until || t.p.clock.last().Sub(t.heard) > t.t.valid+2*time.Second: // the service counts whole seconds
		return fmt.Errorf("the locks on the store could not be renewed for %s: nothing is written until the service at %s answers again", t.t.valid, t.p.d.Endpoint)
	}
	return nil
}

// TryLock implements store.Place.
func (p *place) TryLock(name string, exclusive bool) (func(), bool, error) {
	ctx, cancel := context.WithTimeout(context.Background(), lockLimit)
	defer cancel()
	gone, err := p.locks.take(ctx, name, exclusive)
	if errors.Is(err, errHeld) {
		return nil, false, nil
	}
	if err != nil {
		return nil, false, fmt.Errorf("lock %s of %s: %w", name, p.d, err)
	}
	var once sync.Once
	return func() { once.Do(gone) }, true, nil
}

func (t *table) take(ctx context.Context, name string, exclusive bool) (release func(), err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.state.Lock()
	void := t.void
	t.state.Unlock()
	if t.closed {
		return nil, store.ErrClosed
	}
	if void > 0 {
		return nil, ErrLost
	}
	if h := t.held[name]; h != nil {
		if exclusive || h.exclusive {
			return nil, errHeld
		}
		h.count++
		return func() { t.release(name, h) }, nil
	}
	if t.id == "" {
		t.id = rand.Text()
	}
	locks := t.locks()
	locks[name] = exclusive
	put := t.ours(locks)
	err = t.swap(ctx, locks, func(d *doc) (bool, error) {
		for id, s := range d.Sessions {
			if x, ok := s.Locks[name]; ok && id != t.id && (exclusive || x) {
				return false, errHeld
			}
		}
		return put(d)
	})
	if err != nil {
		return nil, err
	}
	h := &holding{exclusive, 1}
	t.held[name] = h
	return func() { t.release(name, h) }, nil
}

// locks are those we hold.
func (t *table) locks() map[string]bool {
	m := make(map[string]bool, len(t.held)+1)
	for name, h := range t.held {
		m[name] = h.exclusive
	}
	return m
}

// release lets go of a lock. If the service cannot be told now, the next beat tells it.
func (t *table) release(name string, h *holding) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.held[name] != h { // it was lost
		t.state.Lock()
		defer t.state.Unlock()
		t.void = max(t.void-1, 0)
		return
	}
	if h.count--; h.count > 0 {
		return
	}
	delete(t.held, name)
	if t.closed {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), lockLimit)
	defer cancel()
	if err := t.tell(ctx); err != nil && !errors.Is(err, ErrLost) {
		slog.Warn("a lock on the store could not be released yet", "store", t.p.d.String(), "lock", name, "error", err.Error())
	}
}

// tell writes what we hold, and that we are alive.
func (t *table) tell(ctx context.Context) error {
	locks := t.locks()
	return t.swap(ctx, locks, t.ours(locks))
}

// run beats while we hold locks.
func (t *table) run(ctx context.Context) {
	defer close(t.done)
	tick := time.NewTicker(t.t.renew)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		t.mu.Lock()
		if t.id != "" {
			bound, cancel := context.WithTimeout(ctx, max(t.t.valid, time.Second))
			if err := t.tell(bound); err != nil && ctx.Err() == nil && !errors.Is(err, ErrLost) {
				slog.WarnContext(ctx, "the locks on the store could not be renewed", "store", t.p.d.String(), "error", err.Error())
			}
			cancel()
		}
		t.dropOld(ctx)
		t.mu.Unlock()
	}
}

// dropOld removes the versions of the table that we replaced, in a bucket that keeps them. Sweep removes what is left.
func (t *table) dropOld(ctx context.Context) {
	for len(t.old) > 1 && ctx.Err() == nil {
		_ = t.p.c.RemoveObject(ctx, t.p.d.Bucket, t.p.d.Prefix+lockKey, minio.RemoveObjectOptions{VersionID: t.old[0]})
		t.old = t.old[1:]
	}
}

// close lets go of everything.
func (t *table) close(ctx context.Context) error {
	t.stop()
	<-t.done
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.closed {
		return nil
	}
	t.closed = true
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), lockLimit)
	defer cancel()
	t.dropOld(ctx)
	if t.id == "" {
		return nil
	}
	nothing := map[string]bool{}
	if err := t.swap(ctx, nothing, t.ours(nothing)); err != nil && !errors.Is(err, ErrLost) {
		return fmt.Errorf("let go of the locks on %s: %w; they end by themselves after %s", t.p.d, err, t.t.patience)
	}
	return nil
}
