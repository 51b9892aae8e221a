package image

import (
	"context"
	"sync"
)

// budget bounds the bytes of all buffers of a server. What is shared goes to whoever comes first; beside it every
// client owns room for one piece that no other can take, so that clients which do not fetch their answers slow the
// others down at worst and never stop them.
type budget struct {
	mu    sync.Mutex
	free  int64
	queue []*waiter
}

type waiter struct {
	need  int64
	ready chan struct{} // closed once need is granted
}

// room is leave to use so many bytes.
type room struct {
	bytes int64
	own   chan struct{} // where it goes back to; nil if it is shared
}

// take waits for room for n bytes, at most a piece's buffer, in the shared part or else the client's own.
func (b *budget) take(ctx context.Context, n int64, own chan struct{}) (room, error) {
	b.mu.Lock()
	if len(b.queue) == 0 && b.free >= n {
		b.free -= n
		b.mu.Unlock()
		return room{bytes: n}, nil
	}
	w := &waiter{need: n, ready: make(chan struct{})}
	b.queue = append(b.queue, w)
	b.mu.Unlock()

	select {
	case <-w.ready:
		return room{bytes: n}, nil
	case <-own:
		b.leave(w)
		return room{bytes: n, own: own}, nil
	case <-ctx.Done():
		b.leave(w)
		return room{}, ctx.Err()
	}
}

// leave gives up waiting, and gives back what was granted meanwhile.
func (b *budget) leave(w *waiter) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for i, q := range b.queue {
		if q == w {
			b.queue = append(b.queue[:i], b.queue[i+1:]...)
			b.grant()
			return
		}
	}
	b.free += w.need
	b.grant()
}

func (b *budget) give(r room) {
	if r.own != nil {
		r.own <- struct{}{}
		return
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.free += r.bytes
	b.grant()
}

// grant serves the queue in order. The caller holds the lock.
func (b *budget) grant() {
	for len(b.queue) > 0 && b.free >= b.queue[0].need {
		b.free -= b.queue[0].need
		close(b.queue[0].ready)
		b.queue = b.queue[1:]
	}
}

const (
	pieceSize  = 256 << 10 // a read is served in pieces of at most this many bytes
	minHole    = 4 << 10   // shorter holes are sent as data
	sparseRead = 32 << 10  // a shorter read is not worth asking where the holes are

	// frameRoom is what a buffer has beside the data. It is enough, because a hole saves minHole bytes of data and costs
	// no more than the frame of the hole and that of the data after it.
	frameRoom = 128
	pieceRoom = pieceSize + frameRoom // of the largest buffer
)

// The sizes in which buffers are made, so that a small read does not hold a large one's memory.
var bufferSizes = [...]int{4<<10 + frameRoom, 16<<10 + frameRoom, 64<<10 + frameRoom, pieceRoom}

var buffers [len(bufferSizes)]sync.Pool

// bufferClass picks the smallest buffer that holds the answer to a read of n bytes.
func bufferClass(n int) int {
	class := 0
	for bufferSizes[class] < n+frameRoom {
		class++
	}
	return class
}

func takeBuffer(class int) *[]byte {
	if b, ok := buffers[class].Get().(*[]byte); ok {
		return b
	}
	b := make([]byte, bufferSizes[class])
	return &b
}
