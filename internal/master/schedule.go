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
		m.Log.Error("schedule", "error", err)
		return
	}
	running, err := m.running(ctx)
	if err != nil {
		m.Log.Error("schedule", "error", err)
		return
	}
	for _, s := range servers {
		if _, busy := running[s.Name]; busy {
			continue
		}
		if err := m.wakeServer(ctx, s); err != nil {
			m.Log.Error("schedule server", "server", s.Name, "error", err)
		}
	}
	m.overdue(ctx, running)
	m.tend(ctx)
	if now := m.Now(); len(running) == 0 && now.Sub(m.collect) > collectEvery {
		m.collect = now
		if _, err := m.CollectStore(ctx, false); err != nil {
			m.Log.Error("collect store", "error", err)
		}
		if _, err := m.Engine.Prune(ctx, now.Add(-keepOperations)); err != nil {
			m.Log.Error("forget old operations", "error", err)
		}
	}
}

func (m *Master) wakeServer(ctx context.Context, s dr.Server) error {
	if _, active, err := m.Catalog.ActiveInvocation(ctx, s.ID); err != nil || active {
		return err // its original is gone or must not be mistaken for the truth
	}
	last, ok, err := m.Catalog.LastSnapshot(ctx, s.ID)
	if err != nil {
		return err
	}
	now := m.Now()
	var newest *dr.Record
	if ok {
		newest = &last
	}
	if m.due(s, newest, now).After(now) || m.backOff(s).After(now) {
		return nil
	}
	m.mu.Lock()
	a := m.attempts[s.ID]
	if newest != nil && !newest.Snapshot.Taken.Before(a.at) {
		a.failures = 0 // the last attempt kept something
	}
	m.attempts[s.ID] = attempt{at: now, failures: a.failures + 1}
	m.mu.Unlock()
	_, err = m.beginProtect(ctx, s, true)
	return err
}

// due says when a server's next snapshot is to be taken.
func (m *Master) due(s dr.Server, newest *dr.Record, now time.Time) time.Time {
	var last time.Time
	if newest != nil {
		last = newest.Snapshot.Taken
	}
	return s.Schedule.Due(last, now)
}

// backOff says when the next attempt may be made at the earliest, given those that kept nothing.
func (m *Master) backOff(s dr.Server) time.Time {
	m.mu.Lock()
	defer m.mu.Unlock()
	a, ok := m.attempts[s.ID]
	if !ok || a.at.After(m.Now()) {
		return time.Time{}
	}
	wait := min(firstRetry<<min(a.failures-1, 10), lastRetry, s.Schedule.Every)
	return a.at.Add(wait)
}

// overdue finds snapshots that should have been tested and were not, raises a ticket and tests them (R72).
func (m *Master) overdue(ctx context.Context, running map[string]api.Operation) {
	missing, err := m.Catalog.TestsOverdue(ctx, m.Now(), m.Grace)
	if err != nil {
		m.Log.Error("look for missing tests", "error", err)
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
			m.Log.Error("open ticket", "error", err)
		}
		in := work{ServerID: s.ID, SnapshotID: rec.Snapshot.ID, PreRecovery: dr.NewID("pre"), VerdictID: dr.NewID("verdict"), Asked: m.Now()}
		if _, err := begin(ctx, m, kindTest, s.Name, in.VerdictID, in, engine.StartOptions{Key: serverKey(s.ID), Refuse: true}); err != nil {
			m.Log.Error("start missing test", "server", s.Name, "error", err)
		}
		running[s.Name] = api.Operation{Server: s.Name}
	}
}
