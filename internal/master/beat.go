package master

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/musterdr/muster/internal/api"
	"github.com/musterdr/muster/internal/dr"
)

// every is how often silos are heard of.
func (m *Master) every() time.Duration { return m.Lease / (dr.LeaseTime / dr.BeatEvery) }

// beat keeps the leases of all silos alive, and finds those that are lost, until ctx ends.
func (m *Master) beat(ctx context.Context) {
	tick := time.NewTicker(m.every())
	defer tick.Stop()
	var under sync.WaitGroup
	defer under.Wait()
	for last := time.Now(); ; last = time.Now() {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		if time.Since(last) > m.Lease/2 {
			m.awake()
		}
		for _, name := range m.Silos.Names() {
			under.Go(func() {
				_, err := m.hear(ctx, name)
				if !errors.Is(err, errAsking) && ctx.Err() == nil {
					m.tellAway(ctx, name, err)
				}
			})
		}
		m.judge(ctx)
		m.place(ctx)
	}
}

// awake is called when this process stood still, or its host slept: that it heard of nobody meanwhile says nothing of them.
func (m *Master) awake() {
	m.farm.mu.Lock()
	defer m.farm.mu.Unlock()
	clear(m.farm.seen)
}

var errAsking = errors.New("it is being asked")

// tellAway logs that a silo went away, or answers again, once each time.
func (m *Master) tellAway(ctx context.Context, name string, err error) {
	m.farm.mu.Lock()
	defer m.farm.mu.Unlock()
	if away := err != nil; away != m.farm.away[name] {
		m.farm.away[name] = away
		if away {
			m.Log.WarnContext(ctx, "silo does not answer", "silo", name, "error", err)
		} else {
			m.Log.InfoContext(ctx, "silo answers again", "silo", name)
		}
	}
}

// hear asks a silo how it stands, and renews its leases.
func (m *Master) hear(ctx context.Context, name string) (pulse, error) {
	m.farm.mu.Lock()
	if m.farm.asking[name] == nil {
		m.farm.asking[name] = &sync.Mutex{}
	}
	asking := m.farm.asking[name]
	m.farm.mu.Unlock()
	if !asking.TryLock() {
		return pulse{}, errAsking // one that hangs is asked once
	}
	defer asking.Unlock()
	s, err := m.Silos.Silo(name)
	if err != nil {
		return pulse{}, err
	}
	all, err := m.Catalog.Leases(ctx)
	if err != nil {
		return pulse{}, err
	}
	m.farm.mu.Lock()
	before, known := m.farm.pulses[name]
	m.farm.mu.Unlock()
	beat := api.Beat{Stamp: before.stamp, For: m.Lease}
	for _, l := range all {
		if l.Silo == name {
			beat.Leases = append(beat.Leases, l.Term)
		}
	}
	limited, cancel := context.WithTimeout(ctx, m.Lease)
	answer, err := s.Beat(limited, beat)
	cancel()
	if err != nil {
		return pulse{}, err
	}
	if answer.Silo.Name != name {
		return pulse{}, fmt.Errorf("silo %s says that it is %q", name, answer.Silo.Name)
	}
	started := !known || before.stamp.Boot != answer.Stamp.Boot
	if started {
		m.reap(ctx, name, s)
	}
	_, back, err := m.Catalog.Beat(ctx, answer.Silo, m.Now().Add(m.Lease).UTC())
	if err != nil {
		return pulse{}, err
	}
	now := pulse{stamp: answer.Stamp, doing: answer.Doing, at: time.Now()}
	if !answer.Clock.IsZero() { // else its release does not tell
		now.skew = answer.Clock.Sub(now.at).Round(time.Second)
	}
	m.farm.mu.Lock()
	m.farm.pulses[name] = now
	m.farm.mu.Unlock()
	m.farm.mu.Lock()
	suspect := m.farm.suspect[name]
	if len(answer.Doing) == 0 { // else it is asked again: what it is at just now would be spared
		delete(m.farm.suspect, name)
	}
	m.farm.mu.Unlock()
	if (back || suspect) && !started {
		m.reap(ctx, name, s)
	}
	m.change()
	return now, nil
}

// reap has a silo remove what belongs to nobody, after it has started or was lost.
func (m *Master) reap(ctx context.Context, name string, s api.Silo) {
	alive, err := m.alive(ctx, name)
	if err != nil {
		m.Log.ErrorContext(ctx, "look for what a silo runs", "silo", name, "error", err)
		return
	}
	removed, err := s.Reap(ctx, alive)
	if err != nil {
		m.Log.ErrorContext(ctx, "remove what a crash left", "silo", name, "error", err)
	}
	for _, what := range removed {
		m.event(ctx, "silo.reaped", "", what, "removed "+what+" from silo "+name+", left by a process that ended or was given up")
	}
}

// alive lists the invocations that are a silo's. One without a lease was begun by a release that knew only one silo.
func (m *Master) alive(ctx context.Context, name string) (alive []string, err error) {
	all, err := m.Catalog.Leases(ctx)
	if err != nil {
		return nil, err
	}
	elsewhere := map[string]bool{}
	for _, l := range all {
		if l.Silo == name && l.Work.Kind == dr.WorkInvocation {
			alive = append(alive, l.Work.ID)
		}
		elsewhere[l.Work.ID] = true
	}
	active, err := m.Catalog.Invocations(ctx, false)
	if err != nil {
		return nil, err
	}
	for _, inv := range active {
		if !elsewhere[inv.ID] {
			alive = append(alive, inv.ID)
		}
	}
	return alive, nil
}

// lookAfter does what had to wait for silos to be back: of machines that a person has given up it is made sure that they are
// stopped, and of the others that nobody worries about them any more.
func (m *Master) lookAfter(ctx context.Context, silos []dr.Silo) {
	all, err := m.Catalog.Leases(ctx)
	if err != nil {
		m.Log.ErrorContext(ctx, "look at leases", "error", err)
		return
	}
	for _, l := range all {
		there := slices.ContainsFunc(silos, func(s dr.Silo) bool { return s.Name == l.Silo && s.State != dr.SiloLost })
		if !there || l.Work.Kind != dr.WorkInvocation {
			continue
		}
		inv, err := m.Catalog.Invocation(ctx, l.Work.ID)
		switch {
		case err != nil:
		case inv.Active():
			err = m.closeTickets(ctx, inv, "silo "+l.Silo+" is back", dr.ProblemSiloLost)
		default:
			m.fenceOnce(ctx, inv, l)
		}
		if err != nil {
			m.Log.ErrorContext(ctx, "look after invocation", "invocation", l.Work.ID, "error", err)
		}
	}
}

// fenceOnce fences without waiting for it: what is kept may be large.
func (m *Master) fenceOnce(ctx context.Context, inv dr.Invocation, l dr.Lease) {
	m.farm.mu.Lock()
	defer m.farm.mu.Unlock()
	if m.farm.fencing[inv.ID] {
		return
	}
	m.farm.fencing[inv.ID] = true
	go func() {
		if err := m.fence(ctx, inv, l); err != nil {
			m.Log.ErrorContext(ctx, "stop machine that was given up", "invocation", inv.ID, "silo", l.Silo, "error", err)
		}
		m.farm.mu.Lock()
		delete(m.farm.fencing, inv.ID)
		m.farm.mu.Unlock()
	}()
}

// fence stops the machine of an invocation that was given up while its silo was lost.
func (m *Master) fence(ctx context.Context, inv dr.Invocation, l dr.Lease) error {
	kept, err := m.endMachine(ctx, inv, l.Run, inv.State == dr.Ended) // one that never was handed over wrote nothing of worth
	if err != nil {
		return fmt.Errorf("stop the machine of %s on silo %s: %w", inv.ID, l.Silo, err)
	}
	inv.Kept, inv.KeptAt = kept != "", kept
	if err := m.Catalog.RecordInvocation(ctx, inv); err != nil {
		return err
	}
	m.event(ctx, "invocation.fenced", inv.Server, inv.ID, strings.TrimSpace(fmt.Sprintf("silo %s is back: the machine that was given up is stopped. %s", l.Silo, keptAt(kept))))
	return nil
}

func keptAt(path string) string {
	if path == "" {
		return ""
	}
	return "What it wrote is kept there in " + path
}

// judge finds silos that were not heard of for too long, and ends calls of which the lease is gone.
func (m *Master) judge(ctx context.Context) {
	silos, err := m.Catalog.Silos(ctx)
	if err != nil {
		m.Log.ErrorContext(ctx, "look at silos", "error", err)
		return
	}
	for i, s := range silos {
		m.farm.mu.Lock()
		last, ok := m.farm.seen[s.Name]
		if !ok || last.beats != s.Beats {
			last = sighting{s.Beats, time.Now()}
			m.farm.seen[s.Name] = last
		}
		m.farm.mu.Unlock()
		if s.State == dr.SiloLost || time.Since(last.at) <= m.Lease+m.LeaseGrace {
			continue
		}
		taken, left, err := m.Catalog.LoseSilo(ctx, s.Name, s.Beats)
		if err != nil {
			m.Log.ErrorContext(ctx, "lose silo", "silo", s.Name, "error", err)
			continue
		}
		silos[i].State = dr.SiloLost
		m.Log.ErrorContext(ctx, "silo lost", "silo", s.Name, "taken", len(taken), "left", len(left))
		for _, l := range left {
			if l.Work.Kind == dr.WorkInvocation {
				m.machineLost(ctx, l)
			}
		}
	}
	m.endCalls(ctx)
	m.lookAfter(ctx, silos)
}

// machineLost tells people that nobody knows whether an invoked machine still runs.
func (m *Master) machineLost(ctx context.Context, l dr.Lease) {
	inv, err := m.Catalog.Invocation(ctx, l.Work.ID)
	if err == nil && inv.Active() {
		detail := fmt.Sprintf("silo %s is lost. Its machine may still be running and serving people, so no other was started. Bring the silo back; or make sure that it cannot run (power it off, close its port), say so with 'muster invocation end %s --abandon --reason …', and invoke again from last-known-good: what the machine wrote is then kept on the silo, if that comes back", l.Silo, inv.Server)
		_, err = m.Catalog.OpenTicket(ctx, inv.ServerID, dr.ProblemSiloLost, "the silo of an invoked machine is lost", detail, inv.SnapshotID, m.Now())
	}
	if err != nil {
		m.Log.ErrorContext(ctx, "open ticket", "invocation", l.Work.ID, "error", err)
	}
}

// endCalls ends calls of this process whose lease was taken, and gives back leases that nobody uses: of calls that ended with
// a master.
func (m *Master) endCalls(ctx context.Context) {
	leases, err := m.Catalog.Leases(ctx)
	if err != nil {
		m.Log.ErrorContext(ctx, "look at leases", "error", err)
		return
	}
	terms := map[string]int64{}
	for _, l := range leases {
		terms[l.Work.ID] = l.Term
	}
	var idle []dr.Lease
	m.farm.mu.Lock()
	for id, c := range m.farm.calls {
		if c.lease.Work.Kind.TakenOver() && terms[id] != c.lease.Term {
			c.cancel(errMoved)
		}
	}
	for _, l := range leases {
		p := m.farm.pulses[l.Silo]
		old := m.Now().Sub(l.Granted) > m.Lease+m.LeaseGrace
		if old && l.Work.Kind.TakenOver() && m.farm.calls[l.Work.ID] == nil && m.farm.waiting[l.Work.ID] == nil &&
			time.Since(p.at) < m.Lease && !slices.Contains(p.doing, l.Work.ID) {
			idle = append(idle, l)
		}
	}
	m.farm.mu.Unlock()
	for _, l := range idle {
		m.endLease(ctx, l)
	}
}
