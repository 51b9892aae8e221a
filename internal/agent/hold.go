package agent

import (
	"sync"

	"github.com/musterdr/muster/internal/capture/wire"
)

// Limits of what a frozen pass may put aside, in bytes.
const (
	minHold = 16 << 20
	maxHold = 64 << 20
)

// hold is memory taken before the freeze, into which a frozen pass puts what differs. What has no more room is sent at once.
type hold struct {
	mu   sync.Mutex
	buf  []byte
	used int
	kept []kept
	runs []wire.Zeros
}

// kept is a block in a hold.
type kept struct {
	disk, at, length int
	number           int64
	sum              wire.Sum
}

// holdSize is an eighth of the memory that is free.
func holdSize() int64 { return min(maxHold, max(minHold, available()/8)) }

func newHold(size int64, disks []*disk) *hold {
	smallest := wire.MaxBlock
	for _, d := range disks {
		smallest = min(smallest, d.block)
	}
	h := &hold{buf: make([]byte, size), kept: make([]kept, 0, int(size)/smallest+wire.MaxDisks), runs: make([]wire.Zeros, 0, 64<<10)}
	for i := 0; i < len(h.buf); i += 4096 {
		h.buf[i] = 1 // so that the memory is there, and not only promised
	}
	return h
}

// put keeps a copy of a block and says whether there was room.
func (h *hold) put(disk int, number int64, sum wire.Sum, block []byte) bool {
	h.mu.Lock()
	if h.used+len(block) > len(h.buf) || len(h.kept) == cap(h.kept) {
		h.mu.Unlock()
		return false
	}
	at := h.used
	h.used += len(block)
	h.kept = append(h.kept, kept{disk: disk, at: at, length: len(block), number: number, sum: sum})
	h.mu.Unlock()
	copy(h.buf[at:], block)
	return true
}

// zeros keeps a run of zeros and says whether there was room.
func (h *hold) zeros(z wire.Zeros) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	if len(h.runs) == cap(h.runs) {
		return false
	}
	h.runs = append(h.runs, z)
	return true
}

// send sends what was kept and empties the hold, if there is one.
func (h *hold) send(w *wire.Writer, disks []*disk) error {
	if h == nil {
		return w.Flush()
	}
	for _, z := range h.runs {
		if err := w.Zeros(z); err != nil {
			return err
		}
	}
	for _, k := range h.kept {
		if err := disks[k.disk].readers[0].send(w, k.number, k.sum, h.buf[k.at:k.at+k.length]); err != nil {
			return err
		}
	}
	h.used, h.kept, h.runs = 0, h.kept[:0], h.runs[:0]
	return w.Flush()
}
