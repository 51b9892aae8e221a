package agent

import (
	"context"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"github.com/klauspost/compress/zstd"
	"golang.org/x/sync/errgroup"
	"golang.org/x/time/rate"

	"github.com/musterdr/muster/internal/capture/view"
	"github.com/musterdr/muster/internal/capture/wire"
)

// Sizes and numbers of a pass.
const (
	chunk      = 1 << 20 // bytes read at once
	maxReaders = 4       // at once from one disk
	allReaders = 16      // at once from all disks
	tickEvery  = time.Second
)

// disk is a disk that is read, with what the appliance has of it.
type disk struct {
	*device
	number  int
	block   int // bytes
	seed    wire.Seed
	sums    *wire.Sums // nil if the disk is read blind: nothing is compared
	readers []*reader

	follower              // where it was written to
	tracked  bool         // it was known at the start where it was written to
	reason   string       // why not, or why not any more
	whole    bool         // the next pass reads all of it
	todo     []view.Range // what the next pass reads otherwise
	stage    *pieces      // what every pass reads until told otherwise, of a disk with snapshots
	view     *view.View   // the disk at the instant of its snapshots; nil: there are none
	swap     []view.Range // where the kernel swaps to: of no use to anybody, and not read

	now  pieces       // of this pass
	next atomic.Int64 // number of the next piece
	busy atomic.Int64 // nanoseconds of all readers in reading and comparing
	sent atomic.Int64 // blocks, in all passes
}

// reader is one of several that read a disk side by side, with memory of its own.
type reader struct {
	disk   *disk
	buf    []byte
	packed []byte
}

func newDisk(number int, d *device, disks int) *disk {
	out := &disk{device: d, number: number}
	for range min(maxReaders, max(1, allReaders/disks)) {
		out.readers = append(out.readers, &reader{disk: out})
	}
	return out
}

// zip compresses for all readers: as many at once as there are processors, since each needs memory of its own that has to stay in a
// processor's cache to be fast. At the fastest level: the processors are the server's, and the next level saves 3 % of a
// server's disk.
var zip = sync.OnceValue(func() *zstd.Encoder {
	// The options are constants that the library accepts.
	e, _ := zstd.NewWriter(nil, zstd.WithEncoderLevel(zstd.SpeedFastest), zstd.WithEncoderConcurrency(min(maxReaders, runtime.GOMAXPROCS(0))),
		zstd.WithEncoderCRC(false), zstd.WithLowerEncoderMem(true), zstd.WithWindowSize(wire.MaxBlock))
	return e
})

// report adds what the passes came to, disk by disk.
func report(done *wire.Done, disks []*disk) {
	for _, d := range disks {
		var digest []byte
		if d.sums != nil {
			digest = d.sums.Digest()
		}
		done.Digests = append(done.Digests, digest)
		done.Sent = append(done.Sent, d.sent.Load())
		done.Reasons = append(done.Reasons, d.reason)
	}
}

// worthPacking is how many bytes a piece must have to be compressed.
const worthPacking = 512

// pack compresses into a buffer, and says whether the result is to travel: where it is at least a sixteenth smaller.
func pack(into, data []byte) (packed []byte, smaller bool) {
	if len(data) < worthPacking {
		return into[:0], false
	}
	packed = zip().EncodeAll(data, into[:0])
	return packed, len(packed) < len(data)-len(data)/16
}

// prepare takes the memory that the readers need.
func (d *disk) prepare() {
	for _, r := range d.readers {
		if r.buf == nil {
			r.buf = view.Buffer(chunk)
			r.packed = make([]byte, 0, d.block+64<<10)
			r.packed, _ = pack(r.packed, r.buf[:d.block])
		}
	}
}

// pass is one reading of all disks.
type pass struct {
	w        *wire.Writer
	rate     *rate.Limiter
	into     *hold // for a frozen pass: where what differs is put
	total    int64
	done     atomic.Int64
	differed atomic.Int64
	sending  atomic.Int64 // nanoseconds of all readers in sending
	ticked   atomic.Int64 // time of the last tick, nanoseconds from the start
	start    time.Time
}

// found is what a pass came to.
type found struct {
	differed int64         // bytes in blocks that differed from what was known
	written  int64         // bytes that the server wrote to the disks meanwhile
	sending  bool          // much of the time went into sending, so expected is a guess
	left     int64         // bytes that the next pass will find, at least
	expected time.Duration // that the next pass would take if nothing had to be sent
}

// announce says that a pass begins. It is said before a freeze, not under it.
func (r *run) announce(frozen bool) error {
	r.passes++
	return r.w.Message(wire.KindPass, wire.Pass{Number: r.passes, Frozen: frozen, Total: r.total()})
}

func (r *run) total() (n int64) {
	for _, d := range r.disks {
		n += d.left()
	}
	return n
}

// pass reads of every disk what there is to read and sends what differs from what is known, or with a hold puts it there
// while there is room.
func (r *run) pass(ctx context.Context, into *hold) (found, error) {
	p := &pass{w: r.w, into: into, start: time.Now()}
	if into == nil {
		p.rate = r.rate // who waits for the end of a freeze waits no longer for it
	}
	for _, d := range r.disks {
		d.now = d.due()
		d.whole, d.todo = false, nil
		p.total += d.now.total
		d.next.Store(0)
		d.busy.Store(0)
		d.prepare()
	}
	before := written(r.disks)
	group, ctx := errgroup.WithContext(ctx)
	for _, d := range r.disks {
		for _, reader := range d.readers {
			group.Go(func() error { return reader.run(ctx, p) })
		}
	}
	err := group.Wait()
	if err != nil {
		for _, d := range r.disks {
			d.again()
		}
	}
	r.read += p.done.Load()
	if err == nil && into == nil {
		err = r.w.Flush()
	}
	f := found{differed: p.differed.Load(), written: written(r.disks) - before}
	var busy int64
	for _, d := range r.disks {
		busy += d.busy.Load()
	}
	f.sending = p.sending.Load() > busy/10
	return f, err
}

// again has the next pass read what this one was to read.
func (d *disk) again() {
	if d.stage == nil {
		d.todo = append(d.todo, d.now.ranges...)
	}
}

// run reads piece after piece until there is no more.
func (r *reader) run(ctx context.Context, p *pass) error {
	d := r.disk
	for {
		off, length, ok := d.now.at(d.next.Add(1) - 1)
		if !ok {
			return nil
		}
		if err := ctx.Err(); err != nil {
			return err
		}
		if p.rate != nil {
			if err := p.rate.WaitN(ctx, int(length)); err != nil {
				return err
			}
		}
		began := time.Now()
		data := r.buf[:length]
		if _, err := d.ReadAt(data, off); err != nil {
			return err
		}
		inSending, err := r.compare(p, off, data)
		if err != nil {
			return err
		}
		d.busy.Add(int64(time.Since(began) - inSending))
		p.sending.Add(int64(inSending))
		p.done.Add(int64(len(data)))
		if err := p.tick(); err != nil {
			return err
		}
	}
}

// compare passes on the blocks of a piece that differ from what is known, and says how long it waited for the line.
func (r *reader) compare(p *pass, off int64, data []byte) (waited time.Duration, err error) {
	d, size := r.disk, r.disk.block
	var zeros wire.Zeros // a run of blocks that have become zeros
	flush := func() error {
		if zeros.Count == 0 {
			return nil
		}
		defer func() { zeros.Count = 0 }()
		if p.into != nil && p.into.zeros(zeros) {
			return nil
		}
		return p.w.Zeros(zeros)
	}
	for at := 0; at < len(data); at += size {
		block := data[at:min(at+size, len(data))]
		number := (off + int64(at)) / int64(size)
		sum := d.seed.Sum(number, block)
		if d.sums != nil {
			if sum == d.sums.At(number) {
				continue
			}
			d.sums.Set(number, sum)
		}
		p.differed.Add(int64(len(block)))
		d.sent.Add(1)
		if sum == (wire.Sum{}) {
			if zeros.Count > 0 && zeros.First+zeros.Count != number {
				if err := flush(); err != nil {
					return waited, err
				}
			}
			if zeros.Count == 0 {
				zeros = wire.Zeros{Disk: d.number, First: number}
			}
			zeros.Count++
			continue
		}
		if p.into != nil && p.into.put(d.number, number, sum, block) {
			continue
		}
		began := time.Now()
		if err := r.send(p.w, number, sum, block); err != nil {
			return waited, err
		}
		waited += time.Since(began)
	}
	return waited, flush()
}

// send sends a block, compressed where that is worth it. The store keeps it as it is compressed here.
func (r *reader) send(w *wire.Writer, number int64, sum wire.Sum, block []byte) error {
	b := wire.Block{Disk: r.disk.number, Number: number, Sum: sum, Data: block}
	if r.packed, b.Zstd = pack(r.packed, block); b.Zstd {
		b.Data = r.packed
	}
	return w.Block(b)
}

// tick says now and then how far the pass is. A frozen pass says nothing: nobody waits for the line then.
func (p *pass) tick() error {
	last, now := p.ticked.Load(), int64(time.Since(p.start))
	if p.into != nil || now-last < int64(tickEvery) || !p.ticked.CompareAndSwap(last, now) {
		return nil
	}
	return p.w.Message(wire.KindTick, wire.Tick{Done: p.done.Load(), Total: p.total})
}
