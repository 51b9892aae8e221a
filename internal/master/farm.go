package master

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/musterdr/muster/internal/api"
	"github.com/musterdr/muster/internal/catalog"
	"github.com/musterdr/muster/internal/dr"
	"github.com/musterdr/muster/internal/engine"
)

// Silos are those that a master reaches.
type Silos interface {
	// Names lists the silos that answer now, as far as is known without asking them.
	Names() []string
	// Silo gives one; Unavailable if it is not connected.
	Silo(name string) (api.Silo, error)
}

// SiloSet are silos that are always there.
type SiloSet map[string]api.Silo

// Names implements Silos.
func (s SiloSet) Names() []string { return slices.Sorted(maps.Keys(s)) }

// Silo implements Silos.
func (s SiloSet) Silo(name string) (api.Silo, error) {
	if silo := s[name]; silo != nil {
		return silo, nil
	}
	return nil, api.Errorf(api.Unavailable, "silo %s is not connected", name)
}

// Limits.
const (
	waitLimit   = 12 * time.Hour   // for a silo that has room for a test; then there is a ticket
	invokeLimit = 10 * time.Minute // for one that has room for an invocation; then a person has to know
	maxMoves    = 5                // of one piece of work from silos that were lost
	placeLimit  = 30 * time.Second // for one decision
	letGoLimit  = 30 * time.Second // for a silo to say that work which was cancelled has ended
)

// What ends a call to a silo before it answers.
var (
	errMoved     = errors.New("its silo was lost: it is done elsewhere")
	errDisplaced = errors.New("it made way for an invocation: it is done later")
)

// farm is the master's view of its silos: which of them live, what waits for one, and what each is asked just now.
// Whatever has to survive the process is in the catalog: the silos, their leases, the deltas they hold.
type farm struct {
	placing   sync.Mutex // one decision at a time
	spread    time.Time  // when that was last done, and nothing was left to do; under spreading
	spreading sync.Mutex // held while deltas are

	mu      sync.Mutex
	changed chan struct{} // closed at each change that somebody may wait for
	waiting map[string]*waiter
	calls   map[string]*call
	pulses  map[string]pulse
	seen    map[string]sighting
	asking  map[string]*sync.Mutex // one heartbeat of a silo at a time
	fencing map[string]bool        // invocations whose machines are being stopped
	away    map[string]bool        // silos that did not answer the last time
	suspect map[string]bool        // silos that may have what was given to another since: they are asked to remove it
}

type waiter struct {
	work   dr.Work
	run    int64
	tell   func(why string)
	lease  chan dr.Lease
	failed chan error
}

// call is a lease that this process uses.
type call struct {
	lease  dr.Lease
	run    string // the operation's identifier
	cancel context.CancelCauseFunc
}

// pulse is what a silo answered last.
type pulse struct {
	stamp api.Stamp
	doing []string
	at    time.Time     // of this process: monotonic
	skew  time.Duration // how far its host's clock is ahead of this one's
}

// sighting is when the catalog was first seen to say that a silo was heard of so often. Only this process' own clock is asked how
// long ago that is: neither another master's nor one that somebody sets.
type sighting struct {
	beats int64
	at    time.Time
}

func newFarm() *farm {
	return &farm{changed: make(chan struct{}), waiting: map[string]*waiter{}, calls: map[string]*call{},
		pulses: map[string]pulse{}, seen: map[string]sighting{}, asking: map[string]*sync.Mutex{}, fencing: map[string]bool{}, away: map[string]bool{}, suspect: map[string]bool{}}
}

// change wakes whoever waits for one.
func (m *Master) change() {
	m.farm.mu.Lock()
	defer m.farm.mu.Unlock()
	close(m.farm.changed)
	m.farm.changed = make(chan struct{})
}

func (m *Master) next() <-chan struct{} {
	m.farm.mu.Lock()
	defer m.farm.mu.Unlock()
	return m.farm.changed
}

// errand is what is asked of a silo under a lease.
type errand func(ctx context.Context, s api.Silo, l dr.Lease, g api.Grant) error

// send has a piece of work done by a silo with room for it: it waits for one, at most for wait, and for the work itself at most for
// limit. Work that its silo lost is done by another, under a higher term.
func (m *Master) send(ctx context.Context, r *engine.Run, w dr.Work, wait, limit time.Duration, of dr.Server, do errand) error {
	w.Since = m.Now()
	for moves := 0; ; moves++ {
		l, err := m.lease(ctx, r, w, wait)
		if err != nil {
			return err
		}
		err = m.under(ctx, r, l, limit, of, do)
		switch {
		case errors.Is(err, errDisplaced):
			moves--
		case !errors.Is(err, errMoved) || moves >= maxMoves:
			return err
		default:
			w.Avoid = append(w.Avoid, l.Silo)
		}
	}
}

// lease waits for a silo to have room for a piece of work, and has it given the lease. What the work had of an earlier start of
// the run is renewed.
func (m *Master) lease(ctx context.Context, r *engine.Run, w dr.Work, limit time.Duration) (dr.Lease, error) {
	before, had, err := m.Catalog.LeaseOf(ctx, w.ID)
	if err != nil {
		return dr.Lease{}, err
	}
	if had {
		w.Only = before.Silo
	}
	x := &waiter{work: w, run: r.Term(), lease: make(chan dr.Lease, 1), failed: make(chan error, 1),
		tell: func(why string) { r.Report("waiting: "+why, 0, 0, "") }}
	m.farm.mu.Lock()
	m.farm.waiting[w.ID] = x
	m.farm.mu.Unlock()
	limited, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	m.place(ctx)
	select {
	case l := <-x.lease:
		return l, nil
	case err := <-x.failed:
		return dr.Lease{}, err
	case <-limited.Done():
	}
	m.farm.mu.Lock()
	delete(m.farm.waiting, w.ID)
	m.farm.mu.Unlock()
	m.farm.placing.Lock() // a decision that is under way may be about to grant it
	defer m.farm.placing.Unlock()
	select {
	case l := <-x.lease:
		m.endLease(ctx, l)
	default:
	}
	if ctx.Err() != nil {
		return dr.Lease{}, context.Cause(ctx)
	}
	return dr.Lease{}, engine.Permanent(fmt.Errorf("find a silo for %s of %s: none had room for it within %s", w.Kind, w.Server, limit))
}

// place decides who takes what waits, and grants the leases.
func (m *Master) place(ctx context.Context) {
	m.farm.placing.Lock()
	defer m.farm.placing.Unlock()
	m.farm.mu.Lock()
	waiting := maps.Clone(m.farm.waiting)
	m.farm.mu.Unlock()
	if len(waiting) == 0 {
		return
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), placeLimit)
	defer cancel()
	if err := m.decide(ctx, waiting); err != nil {
		m.Log.ErrorContext(ctx, "place work", "error", err)
	}
}

func (m *Master) decide(ctx context.Context, waiting map[string]*waiter) error {
	silos, err := m.reached(ctx)
	if err != nil {
		return err
	}
	all, err := m.Catalog.Leases(ctx)
	if err != nil {
		return err
	}
	leases := slices.DeleteFunc(all, func(l dr.Lease) bool { return waiting[l.Work.ID] != nil }) // those are asked for again
	var work []dr.Work
	var near []string
	for _, x := range waiting {
		work = append(work, x.work)
		near = append(near, x.work.Near)
	}
	where, err := m.where(ctx, near...)
	if err != nil {
		return err
	}
	placed, rest := dr.Place(m.Now(), work, silos, leases, where)
	for _, p := range placed {
		m.grant(ctx, waiting[p.Work], p.Silo)
	}
	for _, w := range rest {
		x := waiting[w.Work]
		if w.Never {
			m.answer(x, func() {
				x.failed <- engine.Permanent(fmt.Errorf("find a silo for %s of %s: %s", x.work.Kind, x.work.Server, w.Why))
			})
			continue
		}
		x.tell(w.Why)
		m.farm.mu.Lock()
		for _, id := range w.Displace {
			if c := m.farm.calls[id]; c != nil {
				c.cancel(errDisplaced)
			}
		}
		m.farm.mu.Unlock()
	}
	return nil
}

func (m *Master) grant(ctx context.Context, x *waiter, silo string) {
	l, err := m.Catalog.Grant(ctx, x.work, silo, x.run, m.Now().Add(m.Lease).UTC())
	switch {
	case err == nil:
		m.answer(x, func() { x.lease <- l })
	case errors.Is(err, catalog.ErrInUse):
		x.tell(err.Error()) // another master was quicker
	case errors.Is(err, catalog.ErrStale):
		m.answer(x, func() { x.failed <- engine.Permanent(err) })
	default:
		m.answer(x, func() { x.failed <- err })
	}
}

// answer tells a waiter, once. One that has gone meanwhile looks once more while it holds placing.
func (m *Master) answer(x *waiter, tell func()) {
	m.farm.mu.Lock()
	delete(m.farm.waiting, x.work.ID)
	m.farm.mu.Unlock()
	tell()
}

// reached gives the silos as placement is to see them: to this master one that it does not reach is as good as lost.
func (m *Master) reached(ctx context.Context) ([]dr.Silo, error) {
	silos, err := m.Catalog.Silos(ctx)
	if err != nil {
		return nil, err
	}
	m.farm.mu.Lock()
	defer m.farm.mu.Unlock()
	for i := range silos {
		if p, ok := m.farm.pulses[silos[i].Name]; silos[i].State == dr.SiloActive && (!ok || time.Since(p.at) > m.Lease) {
			silos[i].State = dr.SiloLost
		}
	}
	return silos, nil
}

func (m *Master) where(ctx context.Context, pres ...string) (dr.Where, error) {
	held, err := m.Catalog.Where(ctx, pres...)
	out := dr.Where{}
	for pre, silos := range held {
		out[pre] = slices.Sorted(maps.Keys(silos))
	}
	return out, err
}

// grantOf is what a silo needs to know of a lease.
func (m *Master) grantOf(l dr.Lease, access *api.Access) api.Grant {
	g := api.Grant{Term: l.Term, Access: access}
	if l.Work.Kind.TakenOver() {
		m.farm.mu.Lock()
		g.Stamp, g.For = m.farm.pulses[l.Silo].stamp, m.Lease
		m.farm.mu.Unlock()
	}
	return g
}

// under asks a silo under a lease, and gives the lease back when nothing of the work is left there; an invocation's stays.
func (m *Master) under(ctx context.Context, r *engine.Run, l dr.Lease, limit time.Duration, of dr.Server, do errand) error {
	called, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	m.farm.mu.Lock()
	m.farm.calls[l.Work.ID] = &call{lease: l, run: r.ID(), cancel: cancel}
	m.farm.mu.Unlock()
	defer func() {
		m.farm.mu.Lock()
		delete(m.farm.calls, l.Work.ID)
		m.farm.mu.Unlock()
	}()
	access, err := m.access(ctx, of)
	var s api.Silo
	if err == nil {
		s, err = m.Silos.Silo(l.Silo)
	}
	if err == nil {
		limited, stop := context.WithTimeout(called, limit)
		err = do(limited, s, l, m.grantOf(l, access))
		if err != nil && called.Err() == nil && limited.Err() != nil {
			err = fmt.Errorf("it took longer than %s: %w", limit, err)
		}
		stop()
	}
	if !l.Work.Kind.TakenOver() {
		return err
	}
	why := context.Cause(called)
	switch kind := api.KindOf(err); {
	case err == nil:
		m.endLease(ctx, l)
		return nil
	case errors.Is(err, catalog.ErrStale): // it was taken while the answer was under way
		return errMoved
	case errors.Is(why, errMoved):
		return errMoved
	case errors.Is(why, errDisplaced):
		m.letGo(ctx, l, letGoLimit)
		return errDisplaced
	case why != nil:
		m.letGo(ctx, l, letGoLimit)
		return err
	case kind == api.Unavailable || kind == api.Conflict:
		// It went away, or its lease ran out while the master could not renew it. Nobody else gets the work before it is known
		// that it has ended there.
		r.Report("waiting: silo "+l.Silo+" does not answer", 0, 0, "")
		m.letGo(called, l, m.Lease+m.LeaseGrace+letGoLimit)
		if ctx.Err() != nil {
			return err
		}
		m.Log.WarnContext(ctx, "silo went away", "silo", l.Silo, "work", l.Work.ID, "error", err)
		return errMoved
	}
	m.letGo(ctx, l, letGoLimit)
	return err
}

// letGo waits until a silo no longer works on what it was asked, and gives its lease back; or until the lease was taken from it.
func (m *Master) letGo(ctx context.Context, l dr.Lease, limit time.Duration) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), limit)
	defer cancel()
	for ctx.Err() == nil {
		changed := m.next()
		now, had, err := m.Catalog.LeaseOf(ctx, l.Work.ID)
		if err == nil && (!had || now.Term != l.Term) {
			return
		}
		if p, err := m.hear(ctx, l.Silo); err == nil && !slices.Contains(p.doing, l.Work.ID) {
			m.endLease(ctx, l)
			return
		}
		again := time.NewTimer(m.every() / 4)
		select {
		case <-ctx.Done():
		case <-changed:
		case <-again.C:
		}
		again.Stop()
	}
}

// endLease gives a lease back and lets others have the room.
func (m *Master) endLease(ctx context.Context, l dr.Lease) {
	if err := m.Catalog.EndLease(context.WithoutCancel(ctx), l.Work.ID, l.Term); err != nil {
		m.Log.ErrorContext(ctx, "give back lease", "work", l.Work.ID, "error", err)
		return
	}
	m.change()
	go m.place(ctx)
}
