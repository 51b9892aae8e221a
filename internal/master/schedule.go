package master

import (
	"context"
	"time"

	"github.com/musterdr/muster/internal/api"
	"github.com/musterdr/muster/internal/dr"
	"github.com/musterdr/muster/internal/engine"
)

// attempt is the last scheduled capture of a server in this process.
type attempt struct {
	at       time.Time
	failures int
}

// Waiting after failed captures: doubled from the first to the second, never longer than the schedule itself.
const (
	firstRetry = 5 * time.Minute
	lastRetry  = 2 * time.Hour
)

// collectEvery is how often the store is asked to free what expired.
const collectEvery = 24 * time.Hour

// keepOperations is how long a finished operation can be asked for. What came of it stays in the catalog.
const keepOperations = 30 * 24 * time.Hour

// Run schedules until ctx ends.
func (m *Master) Run(ctx context.Context) {
	ticker := time.NewTicker(m.Tick)
	defer ticker.Stop()
	for {
		m.Wake(ctx)
		m.mu.Lock()
		m.woke = m.Now()
		m.mu.Unlock()
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
	}
}

// Wake looks at what is and what should be, once: it starts snapshots that are due and tests that are missing, tends
// invocations and collects the store.
func (m *Master) Wake(ctx context.Context) {
	servers, err := m.Catalog.Servers(ctx)
	if err != nil {
		m.Log.ErrorContext(ctx, "schedule", "error", err)
		return
	}
	running, err := m.running(ctx)
	if err != nil {
		m.Log.ErrorContext(ctx, "schedule", "error", err)
		return
	}
	for _, s := range servers {
		if _, busy := running[s.Name]; busy {
			continue
		}
		if err := m.wakeServer(ctx, s); err != nil {
			m.Log.ErrorContext(ctx, "schedule server", "server", s.Name, "error", err)
		}
	}
	m.overdue(ctx, running)
	m.tend(ctx)
	m.spreadSoon(ctx)
	if now := m.Now(); len(running) == 0 && now.Sub(m.collect) > collectEvery {
		m.collect = now
		if _, err := m.CollectStore(ctx, false); err != nil {
			m.Log.ErrorContext(ctx, "collect store", "error", err)
		}
		if _, err := m.Engine.Prune(ctx, now.Add(-keepOperations)); err != nil {
			m.Log.ErrorContext(ctx, "forget old operations", "error", err)
		}
	}
}

func (m *Master) wakeServer(ctx context.Context, s dr.Server) error {
	if _, active, err := m.Catalog.ActiveInvocation(ctx, s.ID); err != nil || active {
		return err // its original is gone or must not be mistaken for the truth
	}
	newest, err := m.newest(ctx, s)
	if err != nil {
		return err
	}
	now := m.Now()
	due := dueOf(s, newest, now)
	if due.next().After(now) || m.backOff(s).After(now) {
		return nil
	}
	m.mu.Lock()
	a := m.attempts[s.ID]
	if !newest.last.IsZero() && !newest.last.Before(a.at) {
		a.failures = 0 // the last attempt kept something
	}
	m.attempts[s.ID] = attempt{at: now, failures: a.failures + 1}
	m.mu.Unlock()
	_, err = m.beginProtect(ctx, s, !s.HasImage() || due.image.After(now), true)
	return err
}

// taken says when the newest snapshots of each kind were taken, zero for never.
type taken struct {
	image, data time.Time
	last        time.Time // of the one that was recorded last
}

func (m *Master) newest(ctx context.Context, s dr.Server) (t taken, err error) {
	for kind, at := range map[dr.SnapshotKind]*time.Time{dr.SnapshotImage: &t.image, dr.SnapshotData: &t.data, "": &t.last} {
		rec, ok, err := m.Catalog.LastSnapshot(ctx, s.ID, kind)
		if err != nil {
			return t, err
		}
		if ok {
			*at = rec.Snapshot.Taken
		}
	}
	return t, nil
}

// dues says when the next snapshots are to be taken; zero for what the tier does not have.
type dues struct {
	image, data time.Time
}

func dueOf(s dr.Server, t taken, now time.Time) (d dues) {
	if s.HasImage() {
		d.image = s.Schedule.Due(t.image, now)
	}
	if s.HasData() {
		d.data = s.Data.Schedule().Due(t.data, now)
	}
	return d
}

// next is the earlier of the two.
func (d dues) next() time.Time {
	if d.image.IsZero() || !d.data.IsZero() && d.data.Before(d.image) {
		return d.data
	}
	return d.image
}

// backOff says when the next attempt may be made at the earliest, given those that kept nothing.
func (m *Master) backOff(s dr.Server) time.Time {
	m.mu.Lock()
	defer m.mu.Unlock()
	a, ok := m.attempts[s.ID]
	if !ok || a.at.After(m.Now()) {
		return time.Time{}
	}
	every := s.Schedule.Every
	if s.HasData() {
		every = min(every, s.Data.Schedule().Every)
	}
	wait := min(firstRetry<<min(a.failures-1, 10), lastRetry, every)
	return a.at.Add(wait)
}

// overdue finds snapshots that should have been tested and were not, raises a ticket and tests them (R72).
func (m *Master) overdue(ctx context.Context, running map[string]api.Operation) {
	missing, err := m.Catalog.TestsOverdue(ctx, m.Now(), m.Grace)
	if err != nil {
		m.Log.ErrorContext(ctx, "look for missing tests", "error", err)
		return
	}
	for _, rec := range missing {
		s, err := m.Catalog.Server(ctx, rec.Snapshot.ServerID)
		if err != nil {
			continue // no longer protected
		}
		if _, busy := running[s.Name]; busy {
			continue
		}
		detail := "snapshot " + rec.Snapshot.ID + " was kept at " + rec.Snapshot.Taken.Format(time.RFC3339) + " and has not been tested since; it is tested now"
		if _, err := m.Catalog.OpenTicket(ctx, s.ID, dr.ProblemTestMissing, "a test that should have run did not", detail, rec.Snapshot.ID, m.Now()); err != nil {
			m.Log.ErrorContext(ctx, "open ticket", "server", s.Name, "snapshot", rec.Snapshot.ID, "error", err)
		}
		in := work{ServerID: s.ID, SnapshotID: rec.Snapshot.ID, PreRecovery: dr.NewID("pre"), VerdictID: dr.NewID("verdict"), Data: rec.Snapshot.IsData(), Asked: m.Now()}
		if _, err := begin(ctx, m, kindTest, s.Name, in.VerdictID, in, engine.StartOptions{Key: serverKey(s.ID), Refuse: true}); err != nil {
			m.Log.ErrorContext(ctx, "start missing test", "server", s.Name, "snapshot", rec.Snapshot.ID, "error", err)
		}
		running[s.Name] = api.Operation{Server: s.Name}
	}
}
