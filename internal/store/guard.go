package store

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"sync/atomic"
	"syscall"

	"github.com/kopia/kopia/repo/blob"
	"github.com/kopia/kopia/repo/content"
)

// guard stands between Kopia and a place. It reads back what was written before it says so, keeps a reserve of space
// so that a full store can still forget, turns "disk full" into an error people understand, and notices when the place
// is gone for good, where Kopia would try for ever.
type guard struct {
	Place
	store    *Store
	failures atomic.Int32 // listings that failed in a row

	compacting atomic.Bool  // Kopia may compact manifests now
	locked     atomic.Int64 // blobs that were not removed because the place keeps them
}

// IsReadOnly is only what Kopia asks before it compacts manifests on its own.
func (g *guard) IsReadOnly() bool { return !g.compacting.Load() }

// Space kept back for forgetting and collecting: a share of the place, at most a fixed size.
const (
	reserveShare = 20 // a twentieth
	reserveMax   = 64 << 20
)

// maxListFailures is how many listings may fail in a row before the place is given up.
const maxListFailures = 5

type reserveKey struct{}

type dryKey struct{}

// withoutWriting makes every attempt to write under a context fail.
func withoutWriting(ctx context.Context) context.Context {
	return context.WithValue(ctx, dryKey{}, true)
}

// withReserve lets the work under a context use the reserved space.
func withReserve(ctx context.Context) context.Context {
	return context.WithValue(ctx, reserveKey{}, true)
}

// sessions are the write sessions of one Writer: what tells a block that is new from one that was there.
type sessions struct {
	mu  sync.Mutex
	ids map[content.SessionID]bool
}

type sessionsKey struct{}

func (t *sessions) add(id content.SessionID) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.ids == nil {
		t.ids = make(map[content.SessionID]bool)
	}
	t.ids[id] = true
}

func (t *sessions) has(id content.SessionID) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.ids[id]
}

// GetBlob answers from memory what the caller has lent.
func (g *guard) GetBlob(ctx context.Context, id blob.ID, offset, length int64, out blob.OutputBuffer) error {
	l, ok := ctx.Value(lentKey{}).(lent)
	var data Bytes
	switch {
	case !ok || l.id != id:
	case length >= 0 && offset == l.at:
		data = l.end // all of it: see packIndex
	case length < 0:
		data = l.all
	}
	if data == nil {
		return g.Place.GetBlob(ctx, id, offset, length, out)
	}
	out.Reset()
	_, err := out.Write(data)
	return err
}

func (g *guard) Close(context.Context) error { return nil } // the place is the store's to close

func (g *guard) PutBlob(ctx context.Context, id blob.ID, data blob.Bytes, opts blob.PutOptions) error {
	if ctx.Value(dryKey{}) != nil {
		return fmt.Errorf("put blob %s: nothing may be written", id)
	}
	if err := g.room(ctx, id, int64(data.Length())); err != nil {
		return err
	}
	_, attests := g.Place.(Attesting)
	if attests {
		data = counted(ctx, data)
	}
	if err := g.Place.PutBlob(ctx, id, data, opts); err != nil {
		return g.notPut(ctx, id, err)
	}
	if !attests {
		if err := readBack(ctx, g.Place, id, Unpaced(data)); err != nil {
			return err
		}
		count(ctx, int64(data.Length()))
	}
	if t, ok := ctx.Value(sessionsKey{}).(*sessions); ok && len(id) > 0 && id[:1] == content.BlobIDPrefixSession {
		t.add(content.SessionIDFromBlobID(id))
	}
	return nil
}

func (g *guard) notPut(ctx context.Context, id blob.ID, err error) error {
	var known *placeError
	switch {
	case errors.As(err, &known):
		return err
	case errors.Is(err, syscall.ENOSPC), errors.Is(err, syscall.EDQUOT):
		return g.noSpace(ctx, id, err)
	}
	return &placeError{fmt.Errorf("put blob %s: %w", id, err)}
}

// DeleteBlob leaves a blob that is locked for a later collection: nobody names it any more, and Kopia comes upon it again.
func (g *guard) DeleteBlob(ctx context.Context, id blob.ID) error {
	err := g.Place.DeleteBlob(ctx, id)
	if errors.Is(err, ErrLocked) {
		g.locked.Add(1)
		return nil
	}
	if err != nil {
		return &placeError{fmt.Errorf("remove blob %s: %w", id, err)}
	}
	return nil
}

// bring puts a blob unless it is on the medium just as it is given. One that is there and is another is an error.
func (g *guard) bring(ctx context.Context, id blob.ID, data blob.Bytes) (sent bool, err error) {
	if a, ok := g.Place.(Attesting); ok {
		sent, err = a.Bring(ctx, id, counted(ctx, data), func() error { return g.room(ctx, id, int64(data.Length())) })
		if err != nil {
			return false, g.notPut(ctx, id, err)
		}
		return sent, nil
	}
	if _, err := g.GetMetadata(ctx, id); errors.Is(err, blob.ErrBlobNotFound) {
		return true, g.PutBlob(ctx, id, data, blob.PutOptions{})
	} else if err != nil {
		return false, err
	}
	return false, readBack(ctx, g.Place, id, Unpaced(data))
}

// PutBlob puts a blob into a place and reads it back from the medium. It is for those who serve a place to others; a Store does so
// itself.
func PutBlob(ctx context.Context, p Place, id blob.ID, data Bytes, opts blob.PutOptions) error {
	if err := p.PutBlob(ctx, id, data, opts); err != nil {
		return err
	}
	if err := readBack(ctx, p, id, data); err != nil { // nobody must take it for good later
		return errors.Join(err, p.DeleteBlob(ctx, id))
	}
	return nil
}

// room refuses to use up the last space for anything but forgetting and collecting.
func (g *guard) room(ctx context.Context, id blob.ID, length int64) error {
	if ctx.Value(reserveKey{}) != nil {
		return nil
	}
	c, err := g.GetCapacity(ctx)
	if err != nil {
		return nil // this place cannot say; writing will
	}
	if int64(c.FreeB)-length < min(int64(c.SizeB)/reserveShare, reserveMax) {
		return g.noSpace(ctx, id, nil)
	}
	return nil
}

func (g *guard) noSpace(ctx context.Context, id blob.ID, cause error) error {
	free := "an unknown number of"
	if c, err := g.GetCapacity(ctx); err == nil {
		free = fmt.Sprint(c.FreeB)
	}
	if cause == nil {
		return &placeError{fmt.Errorf("put blob %s: %w: %s has %s bytes free; add space, or forget snapshots and collect", id, ErrNoSpace, g.store.drv, free)}
	}
	return &placeError{fmt.Errorf("put blob %s: %w: %s has %s bytes free; add space, or forget snapshots and collect (%w)", id, ErrNoSpace, g.store.drv, free, cause)}
}

// readBack compares a blob on the medium with what should be there.
func readBack(ctx context.Context, p Place, id blob.ID, data blob.Bytes) error {
	c := &comparer{total: data.Length()}
	if b, ok := data.(Bytes); ok && len(b) > 0 {
		c.all = b
	} else {
		r := data.Reader()
		defer r.Close() //nolint:errcheck // memory
		c.want = r
	}
	if err := GetFromMedium(ctx, p, id, c); err != nil && !errors.Is(err, errDiffers) {
		return &placeError{fmt.Errorf("read back blob %s: %w", id, err)}
	}
	if err := c.done(); err != nil {
		return &placeError{fmt.Errorf("read back blob %s: %w: the medium does not return what was written to it; check disk and memory (%w)", id, ErrDamaged, err)}
	}
	return nil
}

// placeError is what the guard says of a place. Kopia wraps it into sentences about its own insides, twice; explain
// takes it out of them again.
type placeError struct{ error }

func (e *placeError) Unwrap() error { return e.error }

var errDiffers = errors.New("the bytes differ")

// comparer is where a blob is read to that is only to be compared.
type comparer struct {
	all     []byte        // what it should be, if that is one piece of memory
	want    io.ReadSeeker // otherwise
	total   int
	got     int
	buf     [32 << 10]byte
	differs bool
}

func (c *comparer) Length() int { return c.got }

func (c *comparer) Reset() {
	c.got, c.differs = 0, false
	if c.all == nil {
		_, err := c.want.Seek(0, io.SeekStart)
		c.differs = err != nil
	}
}

func (c *comparer) Write(p []byte) (int, error) {
	for rest := p; len(rest) > 0; {
		part, err := c.next(len(rest))
		if err != nil || !bytes.Equal(part, rest[:len(part)]) {
			c.differs = true
			return 0, errDiffers
		}
		c.got, rest = c.got+len(part), rest[len(part):]
	}
	return len(p), nil
}

// next gives at least one and at most n bytes of what should come.
func (c *comparer) next(n int) ([]byte, error) {
	if c.all != nil {
		if c.got == c.total {
			return nil, io.ErrUnexpectedEOF
		}
		return c.all[c.got:min(c.got+n, c.total)], nil
	}
	b := c.buf[:min(n, len(c.buf))]
	_, err := io.ReadFull(c.want, b)
	return b, err
}

func (c *comparer) done() error {
	if c.differs {
		return fmt.Errorf("%w after byte %d", errDiffers, c.got)
	}
	if c.got != c.total {
		return fmt.Errorf("%d bytes came back of %d", c.got, c.total)
	}
	return nil
}

func (g *guard) ListBlobs(ctx context.Context, prefix blob.ID, cb func(blob.Metadata) error) error {
	var stopped error
	err := g.Place.ListBlobs(ctx, prefix, func(m blob.Metadata) error {
		stopped = cb(m)
		return stopped
	})
	switch {
	case err == nil:
		g.failures.Store(0)
	case stopped != nil || ctx.Err() != nil: // says nothing about the place
	case g.failures.Add(1) >= maxListFailures:
		g.store.giveUp(fmt.Errorf("list blobs: %w", err))
	}
	return err
}
