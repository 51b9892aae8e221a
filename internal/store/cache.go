package store

import (
	"container/list"
	"context"
	"sync"
	"time"

	"github.com/kopia/kopia/repo/content"
)

// DefaultCache is how many bytes of decompressed blocks a store keeps for its images.
const DefaultCache = 64 << 20

// healEvery is how often at most a missing blob makes the index be read again.
const healEvery = time.Second

// cache holds decompressed blocks by their identifier, so that images that share blocks share them here too. A block
// that several want at the same time is read once.
type cache struct {
	mu      sync.Mutex
	limit   int64
	size    int64
	entries map[content.ID]*list.Element
	recent  *list.List // of *cached, the one used last in front
	loading map[content.ID]*load
	ahead   int // fetches nobody waits for
}

type cached struct {
	id   content.ID
	data []byte
}

type load struct {
	done chan struct{}
	data []byte
	err  error
}

func newCache(limit int64) *cache {
	return &cache{limit: limit, entries: map[content.ID]*list.Element{}, recent: list.New(), loading: map[content.ID]*load{}}
}

// SetCache sets how many bytes of decompressed blocks are kept for all images of this store together.
func (s *Store) SetCache(bytes int64) {
	c := s.cache
	c.mu.Lock()
	defer c.mu.Unlock()
	c.limit = bytes
	c.trim()
}

func (c *cache) trim() {
	for c.size > c.limit {
		e := c.recent.Back()
		if e == nil {
			return
		}
		old := c.recent.Remove(e).(*cached)
		delete(c.entries, old.id)
		c.size -= int64(len(old.data))
	}
}

func (c *cache) has(id content.ID) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.entries[id] != nil || c.loading[id] != nil
}

// get gives a block, to be read only.
func (c *cache) get(ctx context.Context, id content.ID, read func(context.Context) ([]byte, error)) ([]byte, error) {
	c.mu.Lock()
	for {
		if e := c.entries[id]; e != nil {
			c.recent.MoveToFront(e)
			c.mu.Unlock()
			return e.Value.(*cached).data, nil
		}
		l := c.loading[id]
		if l == nil {
			break
		}
		c.mu.Unlock()
		select {
		case <-l.done:
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
		if l.err == nil {
			return l.data, nil
		}
		// It may have been another reader who was stopped. Try for ourselves.
		c.mu.Lock()
		if c.loading[id] == l {
			delete(c.loading, id)
		}
	}
	l := &load{done: make(chan struct{})}
	c.loading[id] = l
	c.mu.Unlock()
	l.data, l.err = read(ctx)
	c.mu.Lock()
	if c.loading[id] == l {
		delete(c.loading, id)
	}
	if l.err == nil && int64(len(l.data)) <= c.limit && c.entries[id] == nil {
		c.entries[id] = c.recent.PushFront(&cached{id: id, data: l.data})
		c.size += int64(len(l.data))
		c.trim()
	}
	c.mu.Unlock()
	close(l.done)
	return l.data, l.err
}

// reserve asks for a fetch that nobody waits for.
func (c *cache) reserve() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.ahead >= fetchMax || c.limit < fetchMax*DefaultBlockSize {
		return false // in a small cache what is fetched early is gone before it is read
	}
	c.ahead++
	return true
}

func (c *cache) unreserve() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.ahead--
}

// due says whether something was last done long enough ago, and notes that it is done now.
func (s *Store) due(last *time.Time, every time.Duration) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !last.IsZero() && time.Since(*last) < every {
		return false
	}
	*last = time.Now()
	return true
}
