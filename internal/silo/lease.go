package silo

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/musterdr/muster/internal/api"
	"github.com/musterdr/muster/internal/dr"
)

// ErrStale is given to work whose lease has gone to somebody else.
var ErrStale = errors.New("this work was given to somebody else meanwhile")

// errExpired ends work whose lease was not renewed: the master does not reach this silo, and may have given it to another.
var errExpired = errors.New("its lease was not renewed in time")

// Limits.
const (
	maxTerms  = 10_000                 // identifiers whose highest term is remembered; what is asked later than that is ancient
	watchEach = 250 * time.Millisecond // how late at most a lease is seen to have run out
)

// duties are the pieces of work under way on this silo, each under a lease. The clock is one that nobody sets and that goes on
// while the host sleeps.
type duties struct {
	boot  string // this process
	clock func() time.Duration

	mu    sync.Mutex
	held  map[string]*duty
	terms map[string]int64
	order []string // of terms, oldest first
}

type duty struct {
	term   int64
	until  time.Duration // 0: it does not run out
	cancel context.CancelCauseFunc
	ended  chan struct{}
}

func newDuties(clock func() time.Duration) *duties {
	return &duties{boot: dr.NewID("boot"), clock: clock, held: map[string]*duty{}, terms: map[string]int64{}}
}

// sinceBoot is a clock that nobody sets and that goes on while the host sleeps.
func sinceBoot() time.Duration {
	var t unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &t); err != nil {
		panic("silo: the host has no clock: " + err.Error())
	}
	return time.Duration(t.Nano())
}

func (d *duties) stamp() api.Stamp { return api.Stamp{Boot: d.boot, At: d.clock()} }

// until reads a grant: the instant at which it runs out, 0 for never. The stamp of another process of this silo is as good as none.
func (d *duties) until(stamp api.Stamp, lasts time.Duration) (time.Duration, error) {
	if lasts == 0 {
		return 0, nil
	}
	until := stamp.At + lasts
	if stamp.Boot != d.boot || until <= d.clock() {
		return 0, fmt.Errorf("%w: it was granted %s ago", errExpired, (d.clock() - stamp.At).Round(time.Second))
	}
	return until, nil
}

// begin takes up a piece of work. What is under way under its identifier is ended first, unless its term is higher. The
// context it gives ends when the lease does; end is called when nothing of the work is left on this host.
func (d *duties) begin(ctx context.Context, id string, g api.Grant) (_ context.Context, end func(), err error) {
	for {
		d.mu.Lock()
		until, err := d.until(g.Stamp, g.For)
		if err == nil && g.Term < d.terms[id] {
			err = fmt.Errorf("%w (term %d)", ErrStale, d.terms[id])
		}
		if err != nil {
			d.mu.Unlock()
			return nil, nil, api.Errorf(api.Conflict, "take up %s in term %d: %w", id, g.Term, err)
		}
		d.remember(id, g.Term)
		before := d.held[id]
		if before == nil {
			x := &duty{term: g.Term, until: until, ended: make(chan struct{})}
			ctx, x.cancel = context.WithCancelCause(ctx)
			d.held[id] = x
			d.mu.Unlock()
			go d.watch(x)
			return ctx, func() { d.end(id, x) }, nil
		}
		before.cancel(ErrStale)
		d.mu.Unlock()
		select {
		case <-before.ended:
		case <-ctx.Done():
			return nil, nil, context.Cause(ctx)
		}
	}
}

func (d *duties) remember(id string, term int64) {
	if _, known := d.terms[id]; !known {
		if d.order = append(d.order, id); len(d.order) > maxTerms {
			delete(d.terms, d.order[0])
			d.order = d.order[1:]
		}
	}
	d.terms[id] = term
}

func (d *duties) end(id string, x *duty) {
	x.cancel(nil)
	d.mu.Lock()
	delete(d.held, id)
	d.mu.Unlock()
	close(x.ended)
}

// watch ends a duty whose lease runs out.
func (d *duties) watch(x *duty) {
	tick := time.NewTicker(watchEach)
	defer tick.Stop()
	for {
		select {
		case <-x.ended:
			return
		case <-tick.C:
			d.mu.Lock()
			over := x.until != 0 && d.clock() >= x.until
			d.mu.Unlock()
			if over {
				x.cancel(errExpired)
				return
			}
		}
	}
}

// renew prolongs the leases that the master says this silo has.
func (d *duties) renew(b api.Beat) {
	d.mu.Lock()
	defer d.mu.Unlock()
	until, err := d.until(b.Stamp, b.For)
	if err != nil {
		return
	}
	for _, x := range d.held {
		if x.until != 0 && slices.Contains(b.Leases, x.term) {
			x.until = max(x.until, until)
		}
	}
}

// doing lists the work under way.
func (d *duties) doing() []string {
	d.mu.Lock()
	defer d.mu.Unlock()
	return slices.Sorted(maps.Keys(d.held))
}

// ended gives work that ended because of its lease the reason for that.
func ended(ctx context.Context, err error) error {
	if cause := context.Cause(ctx); err != nil && (errors.Is(cause, errExpired) || errors.Is(cause, ErrStale)) {
		return api.Errorf(api.Conflict, "%w (%w)", cause, err)
	}
	return err
}

// Beat implements api.Silo.
func (s *Silo) Beat(ctx context.Context, b api.Beat) (api.Pulse, error) {
	// Taken before anything is looked at: what is granted with it counts from here.
	stamp := s.duties.stamp()
	s.duties.renew(b)
	me, err := s.describe(ctx)
	return api.Pulse{Stamp: stamp, Clock: time.Now(), Silo: me, Doing: s.duties.doing()}, err
}

// describe says what this host can.
func (s *Silo) describe(ctx context.Context) (dr.Silo, error) {
	host, err := s.Hypervisor.Host(ctx)
	if err != nil {
		return dr.Silo{}, fmt.Errorf("ask hypervisor: %w", err)
	}
	var fs unix.Statfs_t
	if err := unix.Statfs(s.Dir, &fs); err != nil {
		return dr.Silo{}, fmt.Errorf("look at %s: %w", s.Dir, err)
	}
	me := dr.Silo{Name: s.Name, Hypervisor: dr.HypervisorEmulation, Memory: s.Memory, Cores: host.CPUs,
		Space: int64(fs.Bavail) * fs.Bsize, Tests: s.Tests, Reserved: s.Reserved, Version: s.Version} //nolint:unconvert // a block's size is not an int64 everywhere
	if host.Accelerator == "kvm" {
		me.Hypervisor = dr.HypervisorKVM
	}
	if me.Memory == 0 {
		me.Memory = int(host.Memory >> 20 / 8 * 7)
	}
	if s.Bridges != nil {
		me.Networks = s.Bridges()
	}
	return me, nil
}
