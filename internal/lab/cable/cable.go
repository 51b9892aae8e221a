// Package cable is a network cable that is as long, as thin and as bad as one wishes, for tests and measurements: what the kernel's
// netem would do, on any kernel that has TAP devices.
//
//	Cable   two network interfaces, and what one says comes out of the other after a while
//	Line    how long that takes, how much fits through, what is lost on the way
//
// The frames are real and so are the stacks at both ends: TCP sees a round trip and a queue as it would on the road.
//
// Knows: Ethernet frames, time.
// Must not know: what is in a frame.
package cable

import (
	"container/heap"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// Line says what a cable does to frames, in each direction.
type Line struct {
	Delay  time.Duration // one way; a round trip takes twice that
	Jitter time.Duration // up to so much more, each frame another: frames overtake each other
	Loss   float64       // the share that never arrives
	Rate   int64         // bits a second; 0: as many as there are
}

// Limits of a cable.
const (
	maxFrame  = 1518
	maxQueued = 64 << 20 // bytes on their way in one direction, whatever the line: more is lost
	queueTime = 100 * time.Millisecond
)

// Cable is a cable that lies. Its methods may be called from many goroutines.
type Cable struct {
	line atomic.Pointer[Line]
	ends [2]*os.File
	ways [2]*way
	work sync.WaitGroup
	once sync.Once
	err  error
}

// Lay makes two interfaces in the network of the calling thread, with a cable between them. They may be moved to other networks
// then; they are gone when the cable is closed, or the process ends.
func Lay(a, b string, l Line) (*Cable, error) {
	c := &Cable{}
	c.line.Store(&l)
	for i, name := range []string{a, b} {
		end, err := tap(name)
		if err != nil {
			return nil, errors.Join(fmt.Errorf("lay a cable: make interface %s: %w", name, err), c.Close())
		}
		c.ends[i] = end
	}
	for i := range c.ways {
		w := &way{cable: c, from: c.ends[i], to: c.ends[1-i], more: make(chan struct{}, 1), end: make(chan struct{})}
		c.ways[i] = w
		c.work.Go(w.read)
		c.work.Go(w.write)
	}
	return c, nil
}

// Set makes it another line. What is on its way arrives as it would have.
func (c *Cable) Set(l Line) { c.line.Store(&l) }

// Carried is how many bytes of frames came out at the ends: of a from b, and of b from a.
func (c *Cable) Carried() (a, b int64) { return c.ways[1].carried.Load(), c.ways[0].carried.Load() }

// Close takes the cable and both interfaces away.
func (c *Cable) Close() error {
	c.once.Do(func() {
		for _, end := range c.ends {
			if end != nil {
				c.err = errors.Join(c.err, end.Close())
			}
		}
		c.work.Wait()
	})
	return c.err
}

// tap makes an interface whose frames are read from and written to a file.
func tap(name string) (*os.File, error) {
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	request, err := unix.NewIfreq(name)
	if err == nil {
		request.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI)
		err = unix.IoctlIfreq(fd, unix.TUNSETIFF, request)
	}
	if err != nil {
		return nil, errors.Join(err, unix.Close(fd))
	}
	return os.NewFile(uintptr(fd), name), nil // only now: before it had a name it could not be waited on
}

// way is one direction.
type way struct {
	cable    *Cable
	from, to *os.File
	carried  atomic.Int64
	more     chan struct{} // something came that is due before what was waited for
	end      chan struct{} // closed when nothing comes any more

	mu    sync.Mutex
	queue frames
	bytes int
	free  time.Time // when the line has let through what came before
	seq   int64
}

// read takes what one end says until that is closed.
func (w *way) read() {
	defer close(w.end)
	buffer := make([]byte, maxFrame)
	for {
		n, err := w.from.Read(buffer)
		switch {
		case errors.Is(err, unix.EIO): // the interface is not up (yet)
			time.Sleep(10 * time.Millisecond)
		case err != nil:
			return
		default:
			w.take(buffer[:n])
		}
	}
}

// take puts a frame on its way.
func (w *way) take(data []byte) {
	l := w.cable.line.Load()
	if l.Loss > 0 && rand.Float64() < l.Loss {
		return
	}
	at := time.Now()
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.bytes+len(data) > maxQueued {
		return
	}
	if l.Rate > 0 {
		begins := at
		if w.free.After(at) {
			begins = w.free
		}
		if begins.Sub(at) > max(queueTime, 2*l.Delay) { // the queue before the line is full: of what a round trip carries
			return
		}
		w.free = begins.Add(time.Duration(int64(len(data)) * 8 * int64(time.Second) / l.Rate))
		at = w.free
	}
	at = at.Add(l.Delay)
	if l.Jitter > 0 {
		at = at.Add(rand.N(l.Jitter))
	}
	w.seq++
	w.bytes += len(data)
	heap.Push(&w.queue, frame{at, w.seq, append([]byte(nil), data...)})
	if w.queue[0].seq == w.seq {
		select {
		case w.more <- struct{}{}:
		default:
		}
	}
}

// write lets frames out when they are due.
func (w *way) write() {
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		out, wait := w.due(time.Now())
		for _, data := range out {
			if _, err := w.to.Write(data); err == nil { // an interface that is down takes nothing, as a socket in the wall without a machine
				w.carried.Add(int64(len(data)))
			}
		}
		timer.Reset(wait)
		select {
		case <-timer.C:
		case <-w.more:
		case <-w.end:
			return
		}
	}
}

// due takes out what has arrived by now, and says how long it is until something will have.
func (w *way) due(now time.Time) (out [][]byte, wait time.Duration) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for len(w.queue) > 0 && !w.queue[0].at.After(now) {
		f, _ := heap.Pop(&w.queue).(frame)
		w.bytes -= len(f.data)
		out = append(out, f.data)
	}
	if len(w.queue) == 0 {
		return out, time.Hour
	}
	return out, w.queue[0].at.Sub(now)
}

// frame is on its way.
type frame struct {
	at   time.Time
	seq  int64
	data []byte
}

// frames are a heap by when they arrive.
type frames []frame

func (f frames) Len() int { return len(f) }
func (f frames) Less(i, j int) bool {
	if !f[i].at.Equal(f[j].at) {
		return f[i].at.Before(f[j].at)
	}
	return f[i].seq < f[j].seq
}
func (f frames) Swap(i, j int) { f[i], f[j] = f[j], f[i] }
func (f *frames) Push(x any)   { *f = append(*f, x.(frame)) } //nolint:forcetypeassert // take's
func (f *frames) Pop() any {
	old := *f
	last := old[len(old)-1]
	old[len(old)-1] = frame{}
	*f = old[:len(old)-1]
	return last
}
