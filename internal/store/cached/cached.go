// Package cached keeps what was read of a place that is far away on a disk that is near: a driver over another driver.
//
// # What is kept
//
// Ranges of packs as they are read, which are sealed blocks, and whole index blobs. Each is a file that carries the checksum of
// its name and content; one that does not match is removed and read again. A blob never changes under its name, and
// blocks that several snapshots share lie in the same pack: what the last boot read is there for the next, also of another snapshot.
//
// # What is not
//
// A pack that is read whole is not kept: only the store does that, to compare what it wrote. Evict drops all there is of a blob, so that
// reading back and verifying always come from the place itself. A cache that cannot be written to, or is full, costs time and nothing else.
//
// Kopia has a cache of its own. It was not used: verifying would be answered from it, each process would keep to a limit of
// its own, and first reads wait for it to be written.
//
// Knows: files, checksums, which blobs never change.
// Must not know: where the place is, what is in a blob.
package cached

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"sync"

	"github.com/kopia/kopia/repo/blob"

	"github.com/musterdr/muster/internal/store"
)

// Driver is another driver with a cache in a folder. Several processes may share the folder.
type Driver struct {
	store.Driver
	Dir   string
	Limit int64 // bytes; at least MinLimit. Every further process may exceed it by a sixteenth.
}

// Limits.
const (
	MinLimit  = 16 << 20
	maxEntry  = 32 << 20
	maxQueued = 64 // entries waiting to be written; what comes beyond is not kept
)

// Create implements store.Driver.
func (d Driver) Create(ctx context.Context) (store.Place, error) {
	p, err := d.Driver.Create(ctx)
	if err != nil {
		return nil, err
	}
	return d.wrap(ctx, p)
}

// Open implements store.Driver.
func (d Driver) Open(ctx context.Context) (store.Place, error) {
	p, err := d.Driver.Open(ctx)
	if err != nil {
		return nil, err
	}
	return d.wrap(ctx, p)
}

func (d Driver) wrap(ctx context.Context, p store.Place) (store.Place, error) {
	if d.Limit < MinLimit {
		_ = p.Close(ctx)
		return nil, fmt.Errorf("cache %s: a limit of %d bytes is too small: give at least %d", d.Dir, d.Limit, MinLimit)
	}
	if err := os.MkdirAll(d.Dir, 0o700); err != nil {
		_ = p.Close(ctx)
		return nil, fmt.Errorf("make cache: %w", err)
	}
	c := &place{Place: p, dir: d.Dir, limit: d.Limit, queue: make(chan entry, maxQueued)}
	c.work.Go(c.write)
	if a, ok := p.(store.Attesting); ok {
		return attesting{c, a}, nil
	}
	return c, nil
}

// attesting is a place with a cache that reads back by itself.
type attesting struct {
	*place
	store.Attesting
}

// Bring implements store.Attesting.
func (p attesting) Bring(ctx context.Context, id blob.ID, data blob.Bytes, room func() error) (bool, error) {
	defer p.drop(id)
	return p.Attesting.Bring(ctx, id, data, room)
}

// place is a place with a cache.
type place struct {
	store.Place
	dir   string
	limit int64

	mu     sync.RWMutex // writing to the queue, against closing it
	closed bool
	queue  chan entry
	work   sync.WaitGroup
}

// entry is what is to be kept.
type entry struct {
	path, key string
	data      []byte
}

// keeps says whether a read is kept, and under which name. Names of blobs may come from a service that means ill.
func keeps(id blob.ID, offset, length int64) (name string, ok bool) {
	if id == "" || len(id) > 200 || length > maxEntry {
		return "", false
	}
	for _, c := range id {
		if (c < 'a' || c > 'z') && (c < '0' || c > '9') && c != '_' && c != '-' {
			return "", false
		}
	}
	switch {
	case (id[0] == 'p' || id[0] == 'q') && length > 0:
		return strconv.FormatInt(offset, 10) + "-" + strconv.FormatInt(length, 10), true
	case len(id) > 2 && (id[:2] == "xn" || id[:2] == "xs" || id[:2] == "xr") && length < 0:
		return "all", true
	}
	return "", false
}

// folder is where everything of a blob is kept.
func (p *place) folder(id blob.ID) string {
	tail := string(id)
	if len(tail) > 3 {
		tail = tail[1:3]
	}
	return filepath.Join(p.dir, string(id[0])+tail, string(id))
}

// GetBlob reads from the cache, or from the place and into the cache.
func (p *place) GetBlob(ctx context.Context, id blob.ID, offset, length int64, output blob.OutputBuffer) error {
	name, ok := keeps(id, offset, length)
	if !ok {
		return p.Place.GetBlob(ctx, id, offset, length, output)
	}
	output.Reset()
	e := entry{path: filepath.Join(p.folder(id), name), key: string(id) + "/" + name}
	if data, ok := load(e); ok {
		_, err := output.Write(data)
		return err
	}
	var m store.Buffer
	if err := p.Place.GetBlob(ctx, id, offset, length, &m); err != nil {
		return err
	}
	e.data = m.Bytes()
	p.keep(e)
	_, err := output.Write(e.data)
	return err
}

// keep hands an entry to whoever writes, unless too many wait.
func (p *place) keep(e entry) {
	p.mu.RLock()
	defer p.mu.RUnlock()
	if p.closed || int64(len(e.data)) > p.limit/16 {
		return
	}
	select {
	case p.queue <- e:
	default:
	}
}

// PutBlob writes past the cache.
func (p *place) PutBlob(ctx context.Context, id blob.ID, data blob.Bytes, opts blob.PutOptions) error {
	defer p.drop(id)
	return p.Place.PutBlob(ctx, id, data, opts)
}

// DeleteBlob removes a blob here and there.
func (p *place) DeleteBlob(ctx context.Context, id blob.ID) error {
	defer p.drop(id)
	return p.Place.DeleteBlob(ctx, id)
}

// Evict drops a blob here and there.
func (p *place) Evict(ctx context.Context, id blob.ID) {
	p.drop(id)
	p.Place.Evict(ctx, id)
}

func (p *place) drop(id blob.ID) {
	if _, ok := keeps(id, 0, 1); ok {
		_ = os.RemoveAll(p.folder(id))
	} else if _, ok := keeps(id, 0, -1); ok {
		_ = os.RemoveAll(p.folder(id))
	}
}

// Lock implements store.Locker, if the place does.
func (p *place) Lock(ctx context.Context, id blob.ID) (bool, error) {
	if l, ok := p.Place.(store.Locker); ok {
		return l.Lock(ctx, id)
	}
	return false, store.ErrNoLocks
}

// Close waits until what was read is kept.
func (p *place) Close(ctx context.Context) error {
	p.mu.Lock()
	if !p.closed {
		p.closed = true
		close(p.queue)
	}
	p.mu.Unlock()
	p.work.Wait()
	return p.Place.Close(ctx)
}
